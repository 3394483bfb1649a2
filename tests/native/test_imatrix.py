"""Importance matrices: true sums, a file that others read, and quantising with it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

import llama_moe
from llama_moe import Context, Device, ExpertPlacement, Model, SamplingParams, imatrix, quantize
from llama_moe.errors import InvalidOptionError, ModelLoadError
from tests.support.gguf_files import edited_copy
from tests.support.interrupts import stops_at_ctrl_c
from tests.support.tiny_models import ARCHITECTURES, MODELS, TinyModel, write_tiny_model

TEXT = "The experts of the router are chosen for each token, and the sums are those of their inputs. " * 12
CHUNK = 64


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def moe(tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    with Model(tiny_model("llama"), experts="gpu", devices=[], repack=False) as model:  # its weights are F32
        yield model


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def chunks_of(model: Model) -> list[list[int]]:
    """The tokens that are computed: each chunk begins with the token that a text begins with."""
    tokens = model.tokenize(TEXT)
    chunks = [tokens[begin : begin + CHUNK] for begin in range(0, len(tokens) - CHUNK + 1, CHUNK)]
    assert len(chunks) > 2
    return [[tokens[0], *chunk[1:]] for chunk in chunks]


def test_the_sums_of_the_first_layer_are_those_of_numpy(moe: Model, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = imatrix(moe, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
    chunks = chunks_of(moe)
    weights = read(tiny_model("llama"))
    hidden = weights["token_embd.weight"][list(itertools.chain(*chunks))].astype(np.float64)
    normed = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + 1e-6) * weights["blk.0.attn_norm.weight"]
    expected = (normed**2).sum(axis=0)
    found = read(tmp_path / "imatrix.gguf")
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight.in_sum2"].ravel(), expected, rtol=1e-4)
        assert found[f"blk.0.{name}.weight.counts"].ravel().tolist() == [len(hidden)]
    assert (report.chunks, report.tokens) == (len(chunks), len(hidden))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_are_counted_as_the_router_chose_them(tiny_model: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    spec = MODELS[name]
    with Model(tiny_model(name), experts="gpu", devices=[], repack=False) as model:
        imatrix(model, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
        tokens = model.tokenize(TEXT)
        begins = model.tokenize("")  # what each text begins with
        counts = None
        for begin in range(0, len(tokens) - CHUNK + 1, CHUNK):
            chunk = [*begins, *tokens[begin + len(begins) : begin + CHUNK]]
            with (
                Context(model, context_size=CHUNK, batch_size=CHUNK, micro_batch_size=CHUNK, threads=1) as context,
                context.trace_routing() as routing,
            ):
                context.decode(chunk, outputs="all")
            counts = routing.counts if counts is None else counts + routing.counts
    assert counts is not None
    found = read(tmp_path / "imatrix.gguf")
    for layer in spec.moe_layers:
        part = "gate_up" if spec.merged_gate_up else "up"
        for tensor in (f"blk.{layer}.ffn_{part}_exps.weight", f"blk.{layer}.ffn_down_exps.weight"):
            assert found[f"{tensor}.counts"].ravel().tolist() == counts[layer].tolist(), tensor
            assert found[f"{tensor}.in_sum2"].shape[0] == spec.experts


def test_every_matrix_of_the_layers_has_an_entry(moe: Model, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    report = imatrix(moe, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1, output=True)
    matrices = {
        tensor.name: tensor.shape
        for tensor in llama_moe.inspect(tiny_model("llama")).tensors
        if len(tensor.shape) > 1 and tensor.name != "token_embd.weight"
    }
    assert {entry.name for entry in report.entries} == set(matrices)
    for entry in report.entries:
        shape = matrices[entry.name]
        assert entry.columns == shape[0]
        assert entry.experts == (shape[2] if len(shape) > 2 else None)
        assert entry.rows == report.tokens * (MODELS["llama"].experts_used if entry.experts else 1)
    without = imatrix(moe, TEXT, tmp_path / "without.gguf", context_size=CHUNK, threads=1)
    assert {entry.name for entry in without.entries} == set(matrices) - {"output.weight"}


def test_a_device_gives_the_same_sums(tiny_model: Callable[[str], Path], moe: Model, accelerator: Device, tmp_path: Path) -> None:
    imatrix(moe, TEXT, tmp_path / "cpu.gguf", context_size=CHUNK, threads=1)
    for number, placement in enumerate((ExpertPlacement.gpu(), ExpertPlacement.cpu())):
        with Model(tiny_model("llama"), experts=placement, devices=[accelerator], repack=False) as model:
            imatrix(model, TEXT, tmp_path / f"{number}.gguf", context_size=CHUNK, threads=1)
        expected, found = read(tmp_path / "cpu.gguf"), read(tmp_path / f"{number}.gguf")
        assert expected.keys() == found.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_file_says_what_it_is(tiny_model: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    out = tmp_path / "imatrix.gguf"
    report = imatrix(tiny_model("llama"), text_file, out, context_size=CHUNK, chunks=2, threads=1, on_progress=shares.append)
    fields = gguf.GGUFReader(out).fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.datasets"].contents() == ["text.txt"]
    assert fields["imatrix.chunk_count"].contents() == report.chunks == 2
    assert fields["imatrix.chunk_size"].contents() == CHUNK
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert list(tmp_path.iterdir()) == [out]


# ---- quantising with it


def wide_model(path: Path, monkeypatch: pytest.MonkeyPatch, *, used: int = 2) -> Path:
    """A tiny model whose rows have blocks of 256."""
    spec = TinyModel(
        name="wide",
        architecture="llama",
        layers=2,
        experts=4,
        experts_used=used,
        embedding=256,
        head_size=64,
        expert_feed_forward=256,
        vocabulary="spm",
    )
    monkeypatch.setattr("tests.support.tiny_models.MODELS", {"wide": spec})
    return write_tiny_model(path, "wide")


def test_types_that_need_one_can_be_made_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = wide_model(tmp_path / "wide.gguf", monkeypatch)
    with pytest.raises(InvalidOptionError, match="needs an importance matrix"):
        quantize(source, tmp_path / "q.gguf", "IQ2_XXS", threads=1)
    imatrix(source, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
    planned = quantize(source, None, "IQ2_XXS", imatrix=tmp_path / "imatrix.gguf", dry_run=True)
    report = quantize(source, tmp_path / "q.gguf", "IQ2_XXS", imatrix=tmp_path / "imatrix.gguf", threads=2)
    assert report == planned
    info = llama_moe.inspect(tmp_path / "q.gguf")
    assert "IQ2_XXS" in info.types_by_role()["experts"]
    assert info.metadata["quantize.imatrix.entries_count"] == len(gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors) // 2
    with llama_moe.load(tmp_path / "q.gguf", experts="gpu", devices=[], context_size=256, threads=1) as llm:
        assert len(llm.generate("Hello", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)).tokens) == 4


def test_it_brings_the_quantized_model_closer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = wide_model(tmp_path / "wide.gguf", monkeypatch)
    imatrix(source, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
    importance = read(tmp_path / "imatrix.gguf")["blk.0.attn_q.weight.in_sum2"].ravel()
    errors = []
    for matrix in (None, tmp_path / "imatrix.gguf"):
        quantize(source, tmp_path / "q.gguf", "Q2_K", imatrix=matrix, threads=1)
        (tensor,) = [tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors if tensor.name == "blk.0.attn_q.weight"]
        (original,) = [tensor for tensor in gguf.GGUFReader(source).tensors if tensor.name == "blk.0.attn_q.weight"]
        difference = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - np.array(original.data, dtype=np.float32)
        errors.append(float((difference**2 * importance).sum()))
    assert errors[1] < errors[0]


def test_experts_that_no_token_used_are_reported_and_quantized_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = wide_model(tmp_path / "wide.gguf", monkeypatch, used=1)
    one_sided(source, tmp_path / "one_sided.gguf")
    with caplog.at_level(logging.WARNING, "llama_moe"):
        report = imatrix(tmp_path / "one_sided.gguf", TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
    assert report.unused_experts == 2 * 2 * 3  # two of four experts, in two layers, in three matrices
    assert {entry.unused_experts for entry in report.entries if entry.experts} == {(2, 3)}
    assert "no token of the text used 12 of the 24 experts' matrices" in caplog.text
    quantize(tmp_path / "one_sided.gguf", tmp_path / "q.gguf", "IQ2_XXS", imatrix=tmp_path / "imatrix.gguf", threads=2)


def one_sided(source: Path, target: Path) -> Path:
    """A copy whose router knows the first two experts only: one of them has a score above zero, which the others have."""
    edited_copy(source, target)
    writable = gguf.GGUFReader(target, "r+")
    for tensor in writable.tensors:
        if "ffn_gate_inp" in tensor.name:
            tensor.data[2:] = 0.0
            tensor.data[1] = -tensor.data[0]
    writable.data.flush()
    return target


def test_a_matrix_of_another_model_is_refused(moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imatrix(moe, TEXT, tmp_path / "imatrix.gguf", context_size=CHUNK, threads=1)
    source = wide_model(tmp_path / "wide.gguf", monkeypatch)
    with pytest.raises(InvalidOptionError, match=r"of another model: it has 64 values for 'blk.0.attn_.*', which needs 256"):
        quantize(source, tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "imatrix.gguf", threads=1)
    with pytest.raises(ModelLoadError, match=r"is not an importance matrix: it has no imatrix\.datasets"):
        quantize(source, tmp_path / "q.gguf", "Q4_K_M", imatrix=source, threads=1)
    with pytest.raises(FileNotFoundError):
        quantize(source, tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "none.gguf", threads=1)
    assert not (tmp_path / "q.gguf").exists()


# ---- what is refused, and what stops it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_size": 16}, "context_size is 16; it must be 32 or more"),
        ({"chunks": 0}, "chunks must be 1 or more, not 0"),
        ({"threads": 0}, "threads must be 1 or more, not 0"),
        ({"context_size": 1 << 20}, "the text has .* tokens; one chunk of context_size 1048576 is the least"),
    ],
)
def test_an_option_that_makes_no_sense_is_an_error(moe: Model, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        imatrix(moe, TEXT, tmp_path / "imatrix.gguf", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_noticed_before_the_work(moe: Model, tmp_path: Path) -> None:
    shares: list[float] = []
    with pytest.raises(FileNotFoundError):
        imatrix(moe, TEXT, tmp_path / "missing" / "imatrix.gguf", context_size=CHUNK, on_progress=shares.append)
    assert shares == []


def test_ctrl_c_and_exceptions_stop_it(demo_model: Model, tmp_path: Path) -> None:
    out = tmp_path / "imatrix.gguf"
    text = TEXT * 20
    stops_at_ctrl_c(lambda: imatrix(demo_model, text, out, threads=1))

    class StopHereError(Exception):
        pass

    def stop(share: float) -> None:
        if share > 0:
            raise StopHereError

    with pytest.raises(StopHereError):
        imatrix(demo_model, text, out, threads=1, on_progress=stop)
    assert list(tmp_path.iterdir()) == []
