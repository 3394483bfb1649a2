"""This package's own kernels for weights in host memory: when a load uses them, and that what they compute is right."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_moe
from llama_moe import Context, Device, Model, SamplingParams
from llama_moe.errors import InvalidOptionError
from tests.support.processes import run_python

GREEDY = SamplingParams(max_tokens=16, temperature=0)
UNROUNDED: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off"}
EXACT: dict[str, Any] = {**UNROUNDED, "threads": 1, "context_size": 256}
TEXT = """\
A lighthouse keeper writes down the weather every evening. In the spring he notes when the first swallows arrive, and in the autumn when
the last of them leave. The book on his desk is the forty-third of its kind; the others stand on a shelf above the stove, where the air is
dry. Most pages say little: wind from the west, four to five, showers, good visibility after dark. Some say more. On a night in November
the sea was so calm that he could hear people talk on a ship that was two miles away, and once, in a storm, a wave broke the window below
the lamp, which is twenty metres above the rocks. When young people visit the island they ask him whether he is lonely. He shows them the
radio, the telescope and the garden behind the wall, in which potatoes, beans and a single apple tree grow, and says that he has never had
enough time. Then he climbs the stairs, one hundred and sixteen of them, to see whether the lamp turns as it should. Machines could do his
work, and in most places they do: a computer measures the wind, another one the waves, and a third sends both to the harbour every hour.
But a computer does not wonder why the swallows came late this year.
"""


@pytest.fixture
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def test_auto_is_our_own_where_they_are_made_for_the_processor(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kernels = llama_moe.build_info()["expert_kernels"]
    with caplog.at_level(logging.INFO, "llama_moe"), Model(path, devices=[]) as model:
        assert model.expert_kernels == ("ggml" if kernels == "portable" else "llama_moe")
    if kernels != "portable":
        assert f"llama_moe's kernels for weights in host memory: they are made for this processor ({kernels})" in caplog.text
        assert "Experts model buffer size" in caplog.text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repack": False}, "repack=False leaves weights as the file has them"),
        ({"host_memory": "locked"}, "host_memory='locked' keeps weights as the file has them"),
    ],
)
def test_auto_is_ggml_where_weights_stay_as_they_are(
    options: dict[str, Any], reason: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llama_moe"), Model(path, devices=[], **options) as model:
        assert model.expert_kernels == "ggml"
    assert f"ggml's kernels for weights in host memory: {reason}" in caplog.text
    assert "Experts" not in caplog.text


@pytest.mark.parametrize("expert_kernels", ["ggml", "llama_moe"])
def test_they_can_be_chosen(expert_kernels: Any, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llama_moe"), Model(path, devices=[], expert_kernels=expert_kernels) as model:
        assert model.expert_kernels == expert_kernels
    assert ("Experts model buffer size" in caplog.text) == (expert_kernels == "llama_moe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_kernels": "fast"}, "expert_kernels is 'fast'; it must be one of auto, llama_moe, ggml"),
        ({"expert_kernels": "llama_moe", "repack": False}, "repack=False does not allow"),
        ({"expert_kernels": "llama_moe", "host_memory": "pinned"}, "host_memory='pinned' does not allow"),
        ({"expert_kernels": "llama_moe", "host_memory": "locked"}, "host_memory='locked' does not allow"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        Model(path, devices=[], **options)


def test_models_with_either_are_computed_side_by_side(path: Path) -> None:
    loads = {kernels: llama_moe.load(path, devices=[], expert_kernels=kernels, **EXACT) for kernels in ("llama_moe", "ggml")}
    try:
        tokens = {kernels: engine.generate("Hello", GREEDY).tokens for kernels, engine in loads.items()}
        for kernels, engine in loads.items():
            assert engine.generate("Hello", GREEDY).tokens == tokens[kernels]
    finally:
        for engine in loads.values():
            engine.close()


def test_they_compute_the_experts_in_host_memory_while_a_device_has_the_rest(demo_path: Path, accelerator: Device) -> None:
    logits = {}
    for kernels in ("ggml", "llama_moe"):
        with (
            Model(demo_path, experts="cpu", devices=accelerator, expert_kernels=kernels) as model,
            Context(model, context_size=256, threads=2) as context,
        ):
            assert model.expert_kernels == kernels
            prompt = context.decode(model.tokenize("The capital of France is the city of"), outputs="all")
            steps = [context.decode([token]) for token in range(40, 44)]
            logits[kernels] = np.concatenate([prompt, *steps])
            rows = {(buffer_type, kind) for buffer_type, _, kind, _ in context._native.breakdown()}
            assert (("Experts", "model") in rows) == (kernels == "llama_moe")
    # What rounding to 8 bits makes of 30 layers; the tests of the core compare each product.
    assert np.median(np.abs(logits["llama_moe"] - logits["ggml"])) < 0.05 * logits["ggml"].std()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process had")
def test_a_load_needs_no_more_memory_than_the_model(demo_path: Path) -> None:
    ran = run_python(
        """
        import pathlib, sys, llama_moe
        def peak():
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        before = peak()
        with llama_moe.Model(sys.argv[1], devices=[], expert_kernels="llama_moe") as model:
            print((peak() - before) / model.size_bytes)
        """,
        demo_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.15


def test_perplexity_is_that_of_exact_products(dense_path: Path, tmp_path: Path) -> None:
    # The same weights as 32-bit numbers, with which no activation is rounded.
    exact_path = tmp_path / "exact.gguf"
    llama_moe.quantize(dense_path, exact_path, "F32", requantize=True)

    def perplexity(path: Path, expert_kernels: Any) -> float:
        with llama_moe.load(path, devices=[], expert_kernels=expert_kernels, context_size=1024, **UNROUNDED) as engine:
            return engine.perplexity(TEXT)

    assert perplexity(dense_path, "llama_moe") == pytest.approx(perplexity(exact_path, "ggml"), rel=0.005)


def test_perplexity_of_the_demo_model_is_that_of_the_dense_one(demo_path: Path, dense_path: Path) -> None:
    found = []
    for path in (demo_path, dense_path):
        with llama_moe.load(path, devices=[], expert_kernels="llama_moe", context_size=1024, **UNROUNDED) as engine:
            found.append(engine.perplexity(TEXT))
    assert found[0] == pytest.approx(found[1], rel=0.001)
