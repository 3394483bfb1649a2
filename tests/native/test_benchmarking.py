"""What `benchmark()` and `compare()` report is what the engine did."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import llama_moe
from llama_moe import Device, Engine, ExpertPlacement, Model
from llama_moe._speed import Spread, measure_speed
from llama_moe.devices import chosen_accelerators
from llama_moe.errors import InvalidOptionError, ModelLoadError, PlacementError
from tests.support.tiny_models import write_tiny_model

if TYPE_CHECKING:
    from llama_moe.model import DevicesLike

TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def test_tokens_are_those_the_engine_computed(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        speed = measure_speed(engine, prompt_tokens=40, generate_tokens=12, repetitions=3)
        stats = engine.stats()
    assert speed.prompt is not None
    assert speed.decode is not None
    assert speed.time_to_first_token is not None
    assert speed.prompt.tokens == (40, 40, 40)
    assert speed.decode.tokens == (12, 12, 12)
    assert len(speed.time_to_first_token.values) == 3
    # Four prompts with the warm-up, four of one token to generate from; one token after each prompt, n + 1 of which the first is free.
    assert stats["cached_tokens"] == 0
    assert stats["prompt_tokens"] == 4 * 40 + 4
    assert stats["generated_tokens"] == 4 + (1 + 1) + 3 * (12 + 1)
    assert all(seconds > 0 for seconds in (*speed.prompt.seconds, *speed.decode.seconds))
    for first, seconds in zip(speed.time_to_first_token.values, speed.prompt.seconds, strict=True):
        assert first >= seconds


def test_a_text_that_ends_with_the_context_counts_what_came(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        speed = measure_speed(engine, prompt_tokens=0, generate_tokens=1000, repetitions=1)
    assert speed.prompt is None
    assert speed.time_to_first_token is None
    assert speed.decode is not None
    assert 200 < speed.decode.tokens[0] < 256


def test_a_limit_in_seconds_leaves_one_repetition(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        speed = measure_speed(engine, prompt_tokens=8, generate_tokens=4, repetitions=50, seconds=0)
    assert speed.prompt is not None
    assert speed.decode is not None
    assert (len(speed.prompt.tokens), len(speed.decode.tokens)) == (1, 1)


def test_spread_is_llama_benchs() -> None:
    spread = Spread((10.0, 12.0, 17.0))
    assert spread.to_dict() == pytest.approx({"mean": 13, "stdev": math.sqrt(13), "median": 12, "min": 10, "max": 17})
    assert str(spread) == "13.00 ± 3.61"
    assert Spread((4.0,)).stdev == 0


def test_without_an_accelerator_nothing_is_said_to_be_saved(path: Path) -> None:
    report = llama_moe.benchmark(path, prompt_tokens=8, generate_tokens=4, repetitions=2, context_size=64, threads=1, devices=[])
    (row,) = report.rows
    assert row.placement == "gpu"
    assert row.error is None
    assert (row.saved_bytes, row.reduction, row.device_bytes) == (None, None, 0)
    assert any("no accelerator" in note for note in report.notes)
    assert "saved" not in str(report).replace("none saves anything", "")
    # llama.cpp rounds the context up to a multiple of 256.
    assert (report.threads, report.threads_batch, report.context_size) == (1, 1, 256)
    assert report.build == llama_moe.build_info()
    assert not report.failed


def test_saved_memory_is_that_of_the_engines(path: Path, accelerator: Device) -> None:
    report = llama_moe.benchmark(
        path,
        placements=["gpu", "cpu", ExpertPlacement.cpu_first(1), "first:99", "wrong", "fit:little", ExpertPlacement.cpu(projections=["up"])],
        prompt_tokens=8,
        generate_tokens=2,
        repetitions=1,
        context_size=64,
        threads=1,
        devices=accelerator,
    )
    rows = {row.placement: row for row in report.rows}
    gpu, cpu, first = rows["gpu"], rows["cpu"], rows["first:1"]
    with llama_moe.load(path, experts="cpu", context_size=64, threads=1, devices=accelerator) as llm:
        assert cpu.device_bytes == llm.memory().by_device()[accelerator.name]
        assert cpu.memory == llm.memory()
    assert gpu.device_bytes is not None
    assert cpu.device_bytes is not None
    assert first.device_bytes is not None
    assert (gpu.saved_bytes, gpu.reduction) == (0, 0)
    assert cpu.saved_bytes == gpu.device_bytes - cpu.device_bytes
    assert cpu.reduction == pytest.approx(1 - cpu.device_bytes / gpu.device_bytes)
    assert cpu.device_bytes < first.device_bytes < gpu.device_bytes
    assert gpu.baseline == "measured"
    assert gpu.free_memory_drop == {}  # a worker tells its machine's memory
    assert report.failed
    for name, part in (("first:99", "99"), ("wrong", "'wrong'"), ("fit:little", "'little'")):
        assert part in (rows[name].error or "")
        assert rows[name].speed is None
        assert f"{name} failed: " in str(report)
    assert report.rows[-1].placement == "ExpertPlacement.cpu(projections=('up',))"
    assert f"{cpu.reduction:.1%}" in str(report)


def test_fit_leaves_room_for_the_engine_that_is_measured(path: Path, accelerator: Device) -> None:
    engine: dict[str, Any] = {"context_size": 4096, "micro_batch_size": 16, "devices": accelerator}
    enough = llama_moe.plan(path, experts="gpu", **engine).memory.by_device()[accelerator.name]
    # An engine with the default micro-batch would leave no room for all experts.
    assert llama_moe.plan(path, experts="gpu", **{**engine, "micro_batch_size": 512}).memory.by_device()[accelerator.name] > enough
    experts = ExpertPlacement.fit(vram=enough, reserve=0)
    report = llama_moe.benchmark(path, placements=[experts], prompt_tokens=8, generate_tokens=2, repetitions=1, threads=1, **engine)
    with llama_moe.load(path, experts=experts, threads=1, **engine) as llm:
        assert report.rows[0].memory == llm.memory()
        assert {tensor.device for tensor in llm.model.placement if tensor.role == "experts"} == {accelerator.name}


def test_devices_are_known_as_a_load_knows_them(accelerator: Device, path: Path) -> None:
    mine, endpoint = accelerator.name, accelerator.description
    names: list[DevicesLike] = [accelerator, mine.lower(), endpoint.upper(), [mine, accelerator], ["cpu", accelerator]]
    for name in names:
        assert [device.name for device in chosen_accelerators(name)] == [accelerator.name]
        Model(path, experts="gpu", devices=name).close()
    assert accelerator.name in {device.name for device in chosen_accelerators(None)}
    assert chosen_accelerators([]) == chosen_accelerators("CPU") == []
    with pytest.raises(PlacementError, match="no device 'CUDA7'; there are: CPU"):
        llama_moe.benchmark(path, devices=[accelerator, "CUDA7"])


def test_a_file_that_vanishes_fails_the_rows_that_are_left(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())

    def remove_for_the_second(step: str) -> None:
        if step.startswith("cpu"):
            copy.unlink()

    report = llama_moe.benchmark(
        copy,
        placements=["gpu", "cpu"],
        prompt_tokens=8,
        generate_tokens=2,
        repetitions=1,
        context_size=64,
        threads=1,
        devices=[],
        on_progress=remove_for_the_second,
    )
    gpu, cpu = report.rows
    assert gpu.speed is not None
    assert "copy.gguf" in (cpu.error or "")


def test_without_a_row_for_gpu_weights_are_compared(path: Path, accelerator: Device) -> None:
    report = llama_moe.benchmark(
        path, placements=["cpu"], prompt_tokens=0, generate_tokens=2, repetitions=1, context_size=64, threads=1, devices=accelerator
    )
    (row,) = report.rows
    assert row.baseline == "weights"
    with Model(path, experts="gpu", devices=accelerator) as everything, Model(path, experts="cpu", devices=accelerator) as kept:
        weights = [model.memory().by_device()[accelerator.name] for model in (everything, kept)]
    assert row.saved_bytes == weights[0] - weights[1]
    assert any("not measured" in note for note in report.notes)


def test_a_dense_model_has_a_row_and_says_why_others_fail(tiny_model: Callable[[str], Path]) -> None:
    report = llama_moe.benchmark(
        tiny_model("llama-dense"), placements=["gpu", "cpu"], prompt_tokens=4, generate_tokens=2, context_size=32, threads=1, devices=[]
    )
    gpu, cpu = report.rows
    assert gpu.error is None
    assert "no experts" in (cpu.error or "")


def test_formats_hold_the_same_figures(path: Path) -> None:
    report = llama_moe.benchmark(
        path, placements=["gpu", "first:99"], prompt_tokens=8, generate_tokens=4, repetitions=2, context_size=64, threads=1, devices=[]
    )
    good, bad = csv.DictReader(io.StringIO(report.to_csv()))
    speed = report.rows[0].speed
    assert speed is not None
    assert speed.decode is not None
    assert float(good["decode_tokens_per_second_mean"]) == speed.decode.tokens_per_second.mean
    assert (good["prompt_tokens"], good["generated_tokens"], good["repetitions"], good["error"]) == ("8", "4", "2", "")
    assert "99" in bad["error"]
    assert bad["decode_tokens_per_second_mean"] == ""
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1


def test_wrong_numbers_are_refused_before_a_load(path: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"prompt_tokens": -1}, "prompt_tokens is -1"),
        ({"generate_tokens": -2}, "generate_tokens is -2"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"context_size": 100, "prompt_tokens": 200}, "need 201"),
        ({"quality_tokens": 2, "quality": "x"}, "max_tokens is 2"),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            llama_moe.benchmark(path, devices=[], **options)
    with pytest.raises(InvalidOptionError, match="placements is empty"):
        llama_moe.benchmark(path, placements=[], devices=[])
    with pytest.raises(InvalidOptionError, match="paper"):
        llama_moe.benchmark(path, host_memory="paper", devices=[])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        llama_moe.benchmark(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("no model", encoding="utf-8")
    with pytest.raises(ModelLoadError):
        llama_moe.benchmark(tmp_path / "text.gguf")


def test_quality_is_the_perplexity_of_the_engine(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")  # its weights compute the same whatever the batch
    report = llama_moe.compare(path, TEXT, placements=["gpu", "cpu"], window=256, threads=1, devices=[], repack=False)
    with llama_moe.load(path, experts="gpu", context_size=256, threads=1, devices=[], repack=False) as llm:
        expected = llm.perplexity(llm.model.tokenize(TEXT))
        tokens = len(llm.model.tokenize(TEXT))
    reference, other = (row.quality for row in report.rows)
    assert reference.tokens == other.tokens == tokens - 1
    assert reference.perplexity == pytest.approx(expected, rel=1e-2)  # the KV cache is f16
    assert (reference.top_agreement, reference.mean_kl, reference.max_kl) == (None, None, None)
    # Without an accelerator both are the same computation.
    assert (other.top_agreement, other.mean_kl, other.max_kl) == (1, 0, 0)
    assert other.perplexity == reference.perplexity
    assert "reference" in str(report)
    assert report.to_dict()["rows"][1]["placement"] == "cpu"


def test_quality_tells_other_weights_from_the_same(path: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", "qwen3moe", seed=5)
    report = llama_moe.benchmark(
        path,
        placements=["gpu"],
        prompt_tokens=0,
        generate_tokens=0,
        context_size=64,
        threads=1,
        devices=[],
        quality=TEXT,
        quality_tokens=100,
        against=other,
    )
    mine, others = report.rows
    assert mine.quality is not None
    assert others.quality is not None
    assert others.quality.tokens == mine.quality.tokens == 99
    assert others.quality.top_agreement is not None
    assert others.quality.mean_kl is not None
    assert others.quality.max_kl is not None
    assert others.quality.top_agreement < 0.9
    assert 0 < others.quality.mean_kl < others.quality.max_kl
    assert "(model 2)" in str(report)


def test_what_cannot_be_compared_says_so(path: Path, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidOptionError, match="the text has"):
        llama_moe.compare(path, "a", placements=["gpu"], devices=[])
    with pytest.raises(InvalidOptionError, match="window is 1"):
        llama_moe.compare(path, TEXT, window=1, devices=[])
    with pytest.raises(InvalidOptionError, match="placements is empty"):
        llama_moe.compare(path, TEXT, placements=[])
