"""`llama-moe trace` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import llama_moe
from llama_moe import RoutingTrace, SamplingParams
from llama_moe.worker import Worker
from tests.support.processes import environment
from tests.support.tiny_models import DENSE

TEXT = "The router of each layer chooses experts for each token, and the cache keeps those that were chosen last. " * 9


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def trace(path: Path | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_moe.cli", "trace", path, "--ctx", 256, "--threads", 1, "--no-repack", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, check=False, env=environment())


def test_a_text_longer_than_the_context_is_traced_whole_and_kept_in_files(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    ran = trace(
        path,
        "-f",
        text,
        "--cache-slots",
        8,
        "--cache-slots",
        32,
        "--heatmap",
        tmp_path / "heatmap.png",
        "--save",
        tmp_path / "trace.npz",
        "--json",
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    with llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False) as llm:
        tokens = llm.model.tokenize(TEXT)
    assert len(tokens) > 2 * 256
    assert found["tokens"] == len(tokens) - 1  # the last one needs no computing
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    assert all(sum(layer["counts"]) == 2 * found["tokens"] for layer in found["layers"])
    kept = RoutingTrace.load(tmp_path / "trace.npz")
    assert kept.token_ids.tolist() == tokens[:-1]
    assert [layer["counts"] for layer in found["layers"]] == kept.counts.tolist()
    assert [(cache["slots"], cache["policy"]) for cache in found["caches"]] == [
        (n, policy) for n in (8, 32) for policy in ("lru", "lfu", "static")
    ]
    for cache in found["caches"]:
        assert cache["hit_rate"] == kept.simulate_cache(cache["slots"], cache["policy"]).hit_rate
    assert found["caches"][-1]["misses"] == 0  # all 4 x 8 experts
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("placement", [[], ["--cpu-moe"], ["--n-cpu-moe", "2"]])
def test_a_prompt_is_continued_on_a_worker_and_summed_up_by_layer(path: Path, worker: Worker, placement: list[str]) -> None:
    ran = trace(path, "-p", "Hello", "--generate", 9, "--rpc", worker.endpoint, "--cache-slots", 16, *placement)
    assert ran.returncode == 0, ran.stderr
    with llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False) as llm:
        completion = llm.generate("Hello", SamplingParams(max_tokens=9, temperature=0))
        computed = completion.prompt_tokens + len(completion.tokens) - 1
    assert f"Hello{completion.text}" in ran.stderr
    assert f"{computed} tokens, 2 of 8 experts each" in ran.stdout
    assert "25.0%" in ran.stdout  # the share of each, if used alike
    lines = ran.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    assert [line.split()[0] for line in lines[header + 1 : header + 5]] == ["0", "1", "2", "3"]
    assert "50.0%" in lines[-1]  # 16 of 32 experts


def test_what_cannot_be_traced_is_said(path: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for arguments, status, said in (
        ([path], 2, "nothing to compute"),
        ([path, "-f", tmp_path / "none.txt"], 2, "cannot be read"),
        ([path, "-f", __file__, "--generate", 3], 2, "only a prompt is continued"),
        ([path, "-p", "a", "--cpu-moe", "--n-cpu-moe", 1], 2, "only one of them"),
        # Refused before the model is looked for.
        (["none.gguf", "-p", "a", "--heatmap", tmp_path / "x.xyz"], 1, ".xyz"),
        (["none.gguf", "-p", "a", "--heatmap", tmp_path / "none" / "x.png"], 1, str(tmp_path / "none" / "x.png")),
        (["none.gguf", "-p", "a", "--save", tmp_path / "none" / "x.npz"], 1, str(tmp_path / "none" / "x.npz")),
        ([tiny_model(DENSE), "-p", "a"], 1, "no experts"),
    ):
        ran = trace(*arguments)
        assert (ran.returncode, said in ran.stderr) == (status, True), ran.stderr
        assert "Traceback" not in ran.stderr
    assert list(tmp_path.iterdir()) == []
