"""Informs, does not gate: our speed against the pinned llama.cpp's own programs and against llama-cpp-python.

Each round measures the peer, then us, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import ROUNDS, compare
from peers import LlamaCppPython, llama_bench_load_seconds, llama_bench_rates

import llama_moe
from llama_moe import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

TOKENS = 64
PROMPT = 512


@pytest.fixture
def llm(model: Path, threads: int) -> Iterator[llama_moe.Engine]:
    with llama_moe.load(model, experts="gpu", devices=[], context_size=4096, threads=threads) as engine:
        engine.generate([0], SamplingParams(max_tokens=4))  # what the first graph costs is not what is measured
        yield engine


def stream_rate(llm: llama_moe.Engine, tokens: int) -> float:
    """Tokens per second between the first and the last of the streamed tokens, as their consumer sees them."""
    times = []
    for _ in llm.stream([0], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)):
        times.append(time.perf_counter())
    assert len(times) == tokens
    return (tokens - 1) / (times[-1] - times[0])


def test_streaming_decode_against_llama_bench(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(stream_rate(llm, TOKENS + 1)),
        setup=lambda: theirs.append(llama_bench_rates(model, threads=threads, tokens=TOKENS)),
        rounds=ROUNDS,
    )
    compare(benchmark, model=model, threads=threads, unit="tokens/s", peer="llama-bench", ours=ours, theirs=theirs)


def test_prompt_against_llama_bench(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    prompts = np.random.default_rng(0).integers(0, llm.model.vocab_size, size=(ROUNDS + 1, PROMPT))
    llm.generate(prompts[-1].tolist(), SamplingParams(max_tokens=1))
    rounds = iter(prompts)

    def prompt() -> None:
        tokens = next(rounds).tolist()
        begin = time.perf_counter()
        llm.generate(tokens, SamplingParams(max_tokens=1, temperature=0))
        ours.append(PROMPT / (time.perf_counter() - begin))

    benchmark.pedantic(
        prompt, setup=lambda: theirs.append(llama_bench_rates(model, threads=threads, prompt=PROMPT)), rounds=ROUNDS
    )
    compare(benchmark, model=model, threads=threads, unit="tokens/s", peer="llama-bench", ours=ours, theirs=theirs)


def test_streaming_decode_against_llama_cpp_python(
    benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make bench` installs it")
    ours: list[float] = []
    theirs: list[float] = []
    with LlamaCppPython(model, threads=threads) as peer:
        peer.decode_rate(4)
        benchmark.pedantic(
            lambda: ours.append(stream_rate(llm, TOKENS + 1)), setup=lambda: theirs.append(peer.decode_rate(TOKENS + 1)), rounds=ROUNDS
        )
    compare(benchmark, model=model, threads=threads, unit="tokens/s", peer="llama-cpp-python", ours=ours, theirs=theirs)


def test_load_against_llama_bench(benchmark: BenchmarkFixture, model: Path, threads: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []

    def load() -> None:
        begin = time.perf_counter()
        engine = llama_moe.load(model, experts="gpu", devices=[], context_size=512, threads=threads)
        ours.append(time.perf_counter() - begin)
        engine.close()

    benchmark.pedantic(load, setup=lambda: theirs.append(llama_bench_load_seconds(model, threads=threads)), rounds=ROUNDS)
    compare(benchmark, model=model, threads=threads, unit="s", peer="llama-bench", ours=ours, theirs=theirs)
