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
from tests.support.processes import REPOSITORY, run_python

GREEDY = SamplingParams(max_tokens=16, temperature=0)
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off", "threads": 1, "context_size": 256}


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


def test_perplexity_of_the_demo_model_is_that_of_ggml(demo_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")[:3000]
    found = {}
    for kernels in ("ggml", "llama_moe"):
        with llama_moe.load(demo_path, devices=[], expert_kernels=kernels, context_size=1024, kv_type="f32") as engine:
            found[kernels] = engine.perplexity(text)
    assert found["llama_moe"] == pytest.approx(found["ggml"], rel=0.003)
