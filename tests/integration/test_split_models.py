"""Models of several files: the same as one file in every way, and errors that name the file that is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llama_moe
from llama_moe import Device, DeviceSpec, ExpertPlacement, Model, SamplingParams
from llama_moe.errors import ModelLoadError
from tests.support.gguf_files import split_copy
from tests.support.http_files import FileServer
from tests.support.processes import cli

if TYPE_CHECKING:
    from llama_moe.placement import PlacementLike

PLACEMENTS: list[PlacementLike] = ["gpu", "cpu", ExpertPlacement.cpu_first(2), ExpertPlacement.match(r"blk\.1\.ffn_down_exps")]


@pytest.fixture(scope="module")
def whole(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    return split_copy(whole, tmp_path, 3, name="m")


def text_of(path: Path, **options: object) -> str:
    with llama_moe.load(path, context_size=256, repack=False, threads=1, **options) as llm:  # type: ignore[arg-type]
        return llm.generate("Hello", SamplingParams(max_tokens=12, temperature=0)).text


def test_the_header_is_the_same(whole: Path, parts: list[Path]) -> None:
    one, several = llama_moe.inspect(whole), llama_moe.inspect(parts[0])
    assert several.tensors == one.tensors
    assert (several.size_bytes, several.parameter_count, several.layer_count) == (one.size_bytes, one.parameter_count, one.layer_count)
    added = {"split.no": 0, "split.count": 3, "split.tensors.count": len(one.tensors)}
    assert several.metadata == one.metadata | added


@pytest.mark.parametrize("experts", PLACEMENTS)
def test_text_placement_and_memory_are_the_same(whole: Path, parts: list[Path], accelerator: Device, experts: PlacementLike) -> None:
    with (
        Model(whole, experts=experts, devices=accelerator) as one,
        Model(parts[0], experts=experts, devices=accelerator) as several,
    ):
        assert list(several.placement) == list(one.placement)
        assert several.memory().rows == one.memory().rows
        assert several.size_bytes == one.size_bytes
    assert text_of(parts[0], experts=experts, devices=accelerator) == text_of(whole, experts=experts, devices=accelerator)


@pytest.mark.parametrize("host_memory", ["mmap", "pageable"])
def test_it_is_loaded_in_every_way_of_holding_memory(whole: Path, parts: list[Path], host_memory: str) -> None:
    assert text_of(parts[0], devices=[], host_memory=host_memory) == text_of(whole, devices=[], host_memory=host_memory)


def test_a_plan_is_the_same_here_and_from_a_server(whole: Path, parts: list[Path]) -> None:
    spec = DeviceSpec("GPU", "1GiB")
    one = llama_moe.plan(whole, devices=spec, experts="cpu", context_size=256)
    several = llama_moe.plan(parts[0], devices=spec, experts="cpu", context_size=256)
    assert several.rows == one.rows
    assert list(several.placement) == list(one.placement)
    with FileServer(parts[0].parent) as server:
        remote = llama_moe.plan(f"{server.url}/{parts[0].name}", devices=spec, experts="cpu", context_size=256)
    assert remote.rows == one.rows
    room = one.device_bytes + (llama_moe.plan(whole, devices=spec, experts="gpu", context_size=256).device_bytes - one.device_bytes) // 2
    fit = ExpertPlacement.fit(reserve=0)
    summaries = {llama_moe.plan(path, devices=DeviceSpec("GPU", room), experts=fit, context_size=256).summary for path in (whole, parts[0])}
    assert len(summaries) == 1


def test_commands_take_the_first_file(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    ran = cli("run", parts[0], "-p", "Hello", "-n", 12, "--ctx", 256, "--temp", 0, "--threads", 1, "--no-repack")
    assert ran.stdout == text_of(whole, devices=[]) + "\n"
    quantized = [tmp_path / "from_one.gguf", tmp_path / "from_three.gguf"]
    for source, target in zip((whole, parts[0]), quantized, strict=True):
        done = cli("quantize", source, target, "Q8_0")
        assert done.returncode == 0, done.stderr
    assert llama_moe.inspect(quantized[0]).tensors == llama_moe.inspect(quantized[1]).tensors
    assert text_of(quantized[0], devices=[]) == text_of(quantized[1], devices=[])
    benched = cli("bench", parts[0], "-p", 8, "-n", 4, "-r", 1, "--ctx", 256, "--placements", "gpu", "--json")
    assert benched.returncode == 0, benched.stderr


# ---- what is wrong with it is named, before anything is loaded


def refused(path: Path, match: str, kind: type[Exception] = ModelLoadError) -> None:
    progress: list[float] = []
    with pytest.raises(kind, match=match):
        Model(path, devices=[], on_progress=progress.append)
    assert all(share == 0 for share in progress)
    for function in (llama_moe.inspect, llama_moe.plan):
        with pytest.raises(kind, match=match):
            function(path)


def test_a_missing_file(parts: list[Path]) -> None:
    parts[2].unlink()
    refused(
        parts[0], r"no such file: '.*m-00003-of-00003\.gguf', which is file 3 of the 3 of the split model '.*m-00001", FileNotFoundError
    )


def test_files_in_another_order(parts: list[Path], tmp_path: Path) -> None:
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    refused(parts[0], r"m-00002-of-00003\.gguf' is not file 2 of 3 of .*: its header says that it is file 3 of 3; was it renamed\?")


def test_a_later_file_in_place_of_the_first(parts: list[Path]) -> None:
    refused(
        parts[1], r"m-00002-of-00003\.gguf' is part of a split model, file 2 of 3; give its first file, named like model-00001-of-00003"
    )
    shutil.copy(parts[1], parts[0])
    refused(parts[0], r"m-00001-of-00003\.gguf' is not file 1 of 3")


def test_a_first_file_under_another_name(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    refused(renamed, r"model\.gguf' is part of a split model, file 1 of 3; give its first file, named like model-00001-of-00003\.gguf")


def test_a_file_of_another_model(parts: list[Path], whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(split_copy(whole, other, 2)[1], parts[1])
    refused(parts[0], r"m-00002-of-00003\.gguf' is not file 2 of 3 of .*: its header says that it is file 2 of 2")
    shutil.copy(whole, parts[1])
    refused(parts[0], r"m-00002-of-00003\.gguf' is not file 2 of 3 of .*: it is no part of a split model")


def test_files_that_hold_too_much_or_too_little(parts: list[Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    smaller = split_copy(tiny_model("llama"), other, 3, name="m")
    shutil.copy(smaller[1], parts[1])
    refused(parts[0], r"has a tensor '.*' that '.*' has too|has \d+ tensors in its 3 files; its header says that there are \d+")


def test_a_truncated_file(parts: list[Path]) -> None:
    data = parts[2].read_bytes()
    parts[2].write_bytes(data[: len(data) // 2])
    refused(parts[0], r"m-00003-of-00003\.gguf' is truncated: tensor '.*' ends at byte \d+, the file has \d+")
    parts[2].write_bytes(b"not GGUF at all")
    refused(parts[0], r"m-00003-of-00003\.gguf' is not a GGUF file")
