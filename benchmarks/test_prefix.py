"""Gates: the time to first token of a request whose first 1,000 tokens are those of an earlier one.

It comes at least 10 times sooner than the earlier one's, so the ratio is at most 0.1. Against llama-server's second request, with
`cache_prompt`, it informs. Both requests have 16 tokens of their own after what they share, and the first has ended when the second comes.
Every round shares other tokens.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

import llama_moe
from benchmarks.conftest import compare, compare_pairs
from benchmarks.peers import LlamaServer
from benchmarks.streams import random_prompts, read_together, streams_of
from benchmarks.synthetic_model import synthetic_model_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.streams import OpenStream

SHARED = 1000
OWN = 16
CONTEXT = 1280
ROUNDS = 3


@pytest.fixture
def llm(threads: int) -> Iterator[llama_moe.Engine]:
    path = synthetic_model_path()
    with llama_moe.load(path, experts="gpu", devices=[], context_size=CONTEXT, max_sequences=2, threads=threads) as engine:
        yield engine


def first_and_second(open_stream: OpenStream, vocab_size: int) -> Callable[[], tuple[float, float]]:
    """Measures the seconds to the first token of a request, and of the next one with the same beginning."""
    seeds = itertools.count()

    def measure(shared: int = SHARED) -> tuple[float, float]:
        beginning = random_prompts(1, shared, vocab_size=vocab_size, seed=next(seeds))[0]
        ends = random_prompts(2, OWN, vocab_size=vocab_size, seed=next(seeds))
        first, second = (read_together(open_stream, [beginning + end], 4)[0].first_token_seconds for end in ends)
        return first, second

    measure(OWN)  # what the first graph costs is not what is measured
    return measure


def test_shared_prefix_against_the_first_request(benchmark: BenchmarkFixture, llm: llama_moe.Engine, threads: int) -> None:
    measure = first_and_second(streams_of(llm), llm.model.vocab_size)

    def second_and_first() -> tuple[float, float]:
        first, second = measure()
        return second, first

    compare_pairs(
        benchmark,
        second_and_first,
        model=synthetic_model_path().name,
        threads=threads,
        unit="s",
        peer="the first request",
        rounds=ROUNDS,
        target="<= 0.1",
    )


def test_shared_prefix_against_llama_server(benchmark: BenchmarkFixture, llm: llama_moe.Engine, threads: int) -> None:
    model = synthetic_model_path()
    with LlamaServer(model, threads=threads, sequences=2, context_size=CONTEXT, reuse_prompts=True) as server:
        ours = first_and_second(streams_of(llm), llm.model.vocab_size)
        theirs = first_and_second(server.open_stream, llm.model.vocab_size)
        compare(
            benchmark,
            lambda: ours()[1],
            lambda: theirs()[1],
            model=model.name,
            threads=threads,
            unit="s",
            peer="llama-server",
            rounds=ROUNDS,
        )
