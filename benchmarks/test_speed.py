"""Informs, does not gate: our speed against the pinned llama.cpp's own programs and against llama-cpp-python.

Each round measures the peer, then us, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import llama_moe
from benchmarks.conftest import compare
from benchmarks.peers import LlamaCppPython, llama_bench_load_seconds, llama_bench_rates
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
    times = [time.perf_counter() for _ in llm.stream([0], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))]
    assert len(times) == tokens
    return (tokens - 1) / (times[-1] - times[0])


def test_streaming_decode_against_llama_bench(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int) -> None:
    compare(
        benchmark,
        lambda: stream_rate(llm, TOKENS + 1),
        lambda: llama_bench_rates(model, threads=threads, tokens=TOKENS),
        model=model.name,
        threads=threads,
        unit="tokens/s",
        peer="llama-bench",
    )


def test_prompt_against_llama_bench(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int) -> None:
    random = np.random.default_rng(0)

    def prompt_rate() -> float:
        tokens = random.integers(0, llm.model.vocab_size, size=PROMPT).tolist()
        begin = time.perf_counter()
        llm.generate(tokens, SamplingParams(max_tokens=1, temperature=0))
        return PROMPT / (time.perf_counter() - begin)

    prompt_rate()
    compare(
        benchmark,
        prompt_rate,
        lambda: llama_bench_rates(model, threads=threads, prompt=PROMPT),
        model=model.name,
        threads=threads,
        unit="tokens/s",
        peer="llama-bench",
    )


def test_streaming_decode_against_llama_cpp_python(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make bench` installs it")
    with LlamaCppPython(model, threads=threads) as peer:
        peer.decode_rate([[0]], 4)
        compare(
            benchmark,
            lambda: stream_rate(llm, TOKENS + 1),
            lambda: peer.decode_rate([[0]], TOKENS + 1),
            model=model.name,
            threads=threads,
            unit="tokens/s",
            peer="llama-cpp-python",
        )


def test_load_against_llama_bench(benchmark: BenchmarkFixture, model: Path, threads: int) -> None:
    def load_seconds() -> float:
        begin = time.perf_counter()
        engine = llama_moe.load(model, experts="gpu", devices=[], context_size=512, threads=threads)
        seconds = time.perf_counter() - begin
        engine.close()
        return seconds

    compare(
        benchmark,
        load_seconds,
        lambda: llama_bench_load_seconds(model, threads=threads),
        model=model.name,
        threads=threads,
        unit="s",
        peer="llama-bench",
    )
