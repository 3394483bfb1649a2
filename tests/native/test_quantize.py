"""Quantised files: what the dry run says is what is written, and whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_moe
from llama_moe import QuantizedTensor, QuantizeReport, SamplingParams, inspect, quantize
from llama_moe.demo_model import write_demo_model
from llama_moe.errors import InvalidOptionError, ModelLoadError
from tests.support.full_size_models import FULL_SIZE_MODELS, write_full_size_model
from tests.support.interrupts import stops_at_ctrl_c
from tests.support.tiny_models import MODELS, write_tiny_model

# The next tokens are beyond doubt, so that rounding does not change them.
_COUNTING = "1, 2, 3, 4, 5, 6, 7, 8,"


@pytest.fixture
def source(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def types(report: QuantizeReport, part: str) -> set[str]:
    return {tensor.type_after for tensor in report.tensors if part in tensor.name}


def facts(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    return {tensor.name: (tensor.type, tensor.shape, tensor.bytes) for tensor in inspect(path).tensors}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("qwen2moe", "olmoe", "gpt-oss")])
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "MXFP4_MOE", "F16"])
def test_the_dry_run_says_what_is_then_written(tiny_model: Callable[[str], Path], name: str, mix: str, tmp_path: Path) -> None:
    source, target = tiny_model(name), tmp_path / "quantized.gguf"
    planned = quantize(source, None, mix, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert quantize(source, target, mix, threads=2) == planned
    assert target.stat().st_size == planned.file_bytes
    assert facts(target) == {tensor.name: (tensor.type_after, tensor.shape, tensor.bytes_after) for tensor in planned.tensors}
    assert facts(source) == {tensor.name: (tensor.type_before, tensor.shape, tensor.bytes_before) for tensor in planned.tensors}
    assert list(tmp_path.iterdir()) == [target]


def test_a_quantized_model_generates_the_same_text(dense_path: Path, tmp_path: Path) -> None:
    source = write_demo_model(tmp_path / "source.gguf", experts=2, used=1)
    report = quantize(source, tmp_path / "q8.gguf", "Q8_0", requantize=True, threads=2)
    assert types(report, "_exps") == {"Q8_0"}

    def text(path: Path) -> str:
        with llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False) as llm:
            return llm.generate(_COUNTING, SamplingParams(max_tokens=12, temperature=0)).text

    assert text(tmp_path / "q8.gguf") == text(source) == text(dense_path)


def test_roles_and_overrides_choose_types(source: Path) -> None:
    report = quantize(source, None, "Q8_0", experts="Q4_0", attention="Q5_1", output="Q4_1", embedding="IQ4_NL", dry_run=True)
    assert types(report, "_exps") == {"Q4_0"}
    assert types(report, "attn_q.weight") == types(report, "attn_output") == {"Q5_1"}
    assert types(report, "token_embd") == {"IQ4_NL"}
    assert {tensor.type_after for tensor in report.tensors if tensor.name == "output.weight"} == {"Q4_1"}
    assert types(report, "_norm") == types(report, "ffn_gate_inp") == {"F32"}
    first = [(r"blk\.[01]\.ffn_down_exps", "Q8_0"), (r"ffn_down_exps", "Q5_0")]
    report = quantize(source, None, "Q8_0", experts="Q4_0", overrides=first, dry_run=True)
    assert [tensor.type_after for tensor in report.tensors if "ffn_down_exps" in tensor.name] == ["Q8_0", "Q8_0", "Q5_0", "Q5_0"]
    assert types(report, "ffn_up_exps") == {"Q4_0"}


def test_a_mix_of_plain_floats_can_have_quantized_experts(source: Path, tmp_path: Path) -> None:
    # llama.cpp's own quantiser follows overrides only when the mix is a quantised one.
    target = tmp_path / "mixed.gguf"
    report = quantize(source, target, "F16", experts="Q4_0", threads=1)
    assert types(report, "_exps") == {"Q4_0"}
    assert types(report, "attn_q.weight") == types(report, "token_embd") == {"F16"}
    assert inspect(target).metadata["general.file_type"] == 1


def test_a_tied_embedding_is_the_output_too(tiny_model: Callable[[str], Path]) -> None:
    tied = tiny_model("granitemoe")
    assert types(quantize(tied, None, "Q4_0", output="Q8_0", dry_run=True), "token_embd") == {"Q8_0"}
    assert types(quantize(tied, None, "Q4_0", embedding="Q5_0", dry_run=True), "token_embd") == {"Q5_0"}
    with pytest.raises(InvalidOptionError, match="embedding is its output too"):
        quantize(tied, None, "Q4_0", output="Q8_0", embedding="Q5_0", dry_run=True)


@pytest.mark.parametrize("name", FULL_SIZE_MODELS)
def test_the_report_of_a_full_size_model(name: str, tmp_path: Path) -> None:
    source = write_full_size_model(tmp_path / "model.gguf", name)
    report = quantize(source, None, "Q4_K_M", experts="Q2_K", attention="Q6_K", dry_run=True)
    model = FULL_SIZE_MODELS[name]
    # Experts 1408 wide have no blocks of 256 in the rows of their down projection.
    assert types(report, "ffn_up_exps") == {"Q2_K"}
    assert types(report, "ffn_down_exps") == {"Q2_K" if model.expert_feed_forward % 256 == 0 else "Q4_0"}
    assert types(report, "attn_v.weight") == {"Q6_K"}
    assert report.by_role()["experts"] == (
        sum(tensor.bytes_before for tensor in report.tensors if "_exps" in tensor.name),
        sum(tensor.bytes_after for tensor in report.tensors if "_exps" in tensor.name),
    )
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["role", "experts", "weights", "embedding", "output", "total"]
    narrow = {(tensor.wanted_type, tensor.type_after, tensor.shape[0]) for tensor in report.fallbacks}
    assert len(lines) == 6 + len(narrow)
    assert ("Q2_K", "Q4_0", 1408) in narrow or model.expert_feed_forward % 256 == 0


def test_the_report_is_plain_data(source: Path) -> None:
    report = quantize(source, None, "Q8_0", dry_run=True)
    data = report.to_dict()
    assert data["file_bytes"] == report.file_bytes
    rows = data["rows"]
    assert isinstance(rows, list)
    assert [QuantizedTensor(**row) for row in rows] == list(report.tensors)


def test_progress_goes_from_0_to_1(source: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    quantize(source, tmp_path / "q.gguf", "Q8_0", threads=1, on_progress=shares.append)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert all(0.0 <= share <= 1.0 for share in shares)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "Q4_K_X"}, "'Q4_K_X' is not known; it must be one of F32, F16"),
        ({"experts": "Q4_K_M"}, "experts: 'Q4_K_M' is not a tensor type; it must be one of F32"),
        ({"attention": "fast"}, "attention: 'fast' is not a tensor type"),
        ({"overrides": [("blk", "Q9")]}, "'blk': 'Q9' is not a tensor type"),
        ({"overrides": [("blk[", "Q8_0")]}, r"'blk\[' is not a regular expression"),
        ({"overrides": [(r"blk\.99\.", "Q8_0")]}, r"'blk\\.99\\.' matches no tensor"),
        ({"overrides": [("_norm", "Q8_0")]}, "'_norm' matches no tensor that can be quantized"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
        ({"threads": -1}, "threads must be 1 or more, not -1"),
    ],
)
def test_an_option_that_makes_no_sense_is_an_error(source: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        quantize(source, tmp_path / "q.gguf", **{"type": "Q8_0", **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_experts_need_a_model_with_experts(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidOptionError, match="experts matches no tensor; the model has no experts"):
        quantize(tiny_model("llama-dense"), None, "Q8_0", experts="Q4_0", dry_run=True)


def test_a_quantized_source_needs_a_word(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("qwen2moe")  # its weights are Q8_0
    for dry_run in (True, False):
        with pytest.raises(InvalidOptionError, match=r"is quantized already: '.*' is Q8_0"):
            quantize(source, tmp_path / "q.gguf", "Q4_0", dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []
    report = quantize(source, tmp_path / "q.gguf", "Q4_0", requantize=True, threads=1)
    assert types(report, "_exps") == {"Q4_0"}
    # The same type again changes nothing, and needs no word.
    quantize(source, tmp_path / "same.gguf", "Q8_0", threads=1)


@pytest.mark.parametrize("mix", ["IQ2_XXS", "IQ3_XXS", "IQ1_S", "Q2_K_S"])
def test_a_type_that_needs_an_importance_matrix_says_so_first(tmp_path: Path, mix: str) -> None:
    source = write_full_size_model(tmp_path / "model.gguf", "DeepSeek-MoE-16B")
    report = quantize(source, None, mix, dry_run=True)
    assert report.needs_imatrix
    assert "cannot be made without an importance matrix" in str(report)
    with pytest.raises(InvalidOptionError, match=r"for 'blk\..*' needs an importance matrix"):
        quantize(source, tmp_path / "q.gguf", mix)
    assert list(tmp_path.iterdir()) == [source]


def test_the_target_must_not_be_the_source(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(source, tmp_path / "model.gguf"))
    (tmp_path / "symbolic.gguf").symlink_to(model)
    os.link(model, tmp_path / "hard.gguf")
    before = model.read_bytes()
    for name in ("model.gguf", "symbolic.gguf", "hard.gguf"):
        with pytest.raises(InvalidOptionError, match="is the source itself"):
            quantize(model, tmp_path / name, "Q8_0")
    assert model.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_files_that_are_not_there_or_no_models(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        quantize(tmp_path / "none.gguf", tmp_path / "q.gguf", "Q8_0")
    (tmp_path / "text.gguf").write_text("a text")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        quantize(tmp_path / "text.gguf", tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(IsADirectoryError):
        quantize(source, tmp_path, "Q8_0")
    with pytest.raises(OSError, match="No such file or directory"):
        quantize(source, tmp_path / "missing" / "q.gguf", "Q8_0")
    with pytest.raises(InvalidOptionError, match="dst is needed"):
        quantize(source, None, "Q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.gguf"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    source = write_full_size_model(tmp_path / "model.gguf", "Phi-3.5-MoE")
    free = shutil.disk_usage("/dev/shm").free
    if free > 70 << 30:
        pytest.skip("the file system in memory has room for the whole model")
    folder = Path("/dev/shm")
    target = folder / f"llama_moe_test_{os.getpid()}.gguf"
    with pytest.raises(OSError, match=r"no room for .*: it needs \d+ bytes") as caught:
        quantize(source, target, "F32", threads=1)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir() if target.name in path.name] == []


# ---- what stops it


def test_ctrl_c_stops_it_and_leaves_what_was_there(tmp_path: Path) -> None:
    source = write_full_size_model(tmp_path / "model.gguf", "DeepSeek-MoE-16B")
    target = tmp_path / "q.gguf"
    target.write_text("an older file")
    stops_at_ctrl_c(lambda: quantize(source, target, "Q2_K", threads=1))
    assert target.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "q.gguf"]


def test_an_exception_in_on_progress_stops_it(tmp_path: Path) -> None:
    class StopHereError(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0:
            raise StopHereError

    source = write_full_size_model(tmp_path / "model.gguf", "Phi-3.5-MoE")
    with pytest.raises(StopHereError):
        quantize(source, tmp_path / "q.gguf", "Q2_K", threads=1, on_progress=stop)
    assert list(tmp_path.iterdir()) == [source]


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole.gguf", "deepseek")
    first = split_in_two(whole, tmp_path)
    quantize(whole, tmp_path / "from_whole.gguf", "Q4_0", threads=1)
    quantize(first, tmp_path / "from_parts.gguf", "Q4_0", threads=1)
    assert facts(tmp_path / "from_parts.gguf") == facts(tmp_path / "from_whole.gguf")
    assert not [key for key in inspect(tmp_path / "from_parts.gguf").metadata if key.startswith("split.")]
    with pytest.raises(InvalidOptionError, match="is the source itself"):
        quantize(first, tmp_path / "part-00002-of-00002.gguf", "Q4_0")


def split_in_two(source: Path, folder: Path) -> Path:
    """The model as two files; returns the first."""
    import gguf

    reader = gguf.GGUFReader(source)
    parts = [folder / f"part-0000{number}-of-00002.gguf" for number in (1, 2)]
    middle = len(reader.tensors) // 2
    for index, (path, tensors) in enumerate(zip(parts, (reader.tensors[:middle], reader.tensors[middle:]), strict=True)):
        writer = gguf.GGUFWriter(None, reader.fields["general.architecture"].contents())
        if index == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    writer.add_key_value(name, field.contents(), field.types[0], kind)
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.open_output_file(path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts[0]
