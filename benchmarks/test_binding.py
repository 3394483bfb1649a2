"""Gates: what a token costs outside llama.cpp, in microseconds of one stream; less than 5.

The decoder does nothing, so that what is left is ours: the scheduler's step, greedy sampling from a small vocabulary, the token's text,
handing it from the engine's thread to the caller's, and making a Python object of it. Counted is the time from a stream's first to its last
token by the tokens between them. That of tokens that wait already, which are only handed over, informs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.conftest import measure_alone
from llama_moe import Engine, Model, SamplingParams, _core
from llama_moe._options import fill_context
from tests.support.tiny_models import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

TOKENS = 10_000
ROUNDS = 7
PARAMS = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)


def idle_engine(model: Model, *, context_size: int) -> Engine:
    """An engine like any other, but for its decoder, which computes nothing. The one place that makes it."""
    engine = Engine.__new__(Engine)
    engine._model = model
    engine._owns_model = False
    engine._native = _core.Engine.idle(model._native, fill_context(_core.EngineOptions(), context_size=context_size))
    return engine


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[Engine]:
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "qwen3moe")
    with Model(path, experts="gpu", devices=[]) as model, idle_engine(model, context_size=2 * TOKENS) as engine:
        yield engine


def test_token_through_an_idle_engine(benchmark: BenchmarkFixture, llm: Engine) -> None:
    def microseconds() -> float:
        stream = llm.stream([1], PARAMS)
        next(stream)
        begin = time.perf_counter()
        for _ in stream:
            pass
        return 1e6 * (time.perf_counter() - begin) / (TOKENS - 1)

    measure_alone(benchmark, microseconds, model="tiny qwen3moe, idle decoder", threads=1, unit="us/token", rounds=ROUNDS, target="<= 5")


def test_token_that_waits_already(benchmark: BenchmarkFixture, llm: Engine) -> None:
    def microseconds() -> float:
        stream = llm.stream([1], PARAMS)
        llm.generate([1], SamplingParams(max_tokens=1))  # the engine has one sequence: when this is done, the stream is whole
        begin = time.perf_counter()
        for _ in stream:
            pass
        return 1e6 * (time.perf_counter() - begin) / TOKENS

    measure_alone(benchmark, microseconds, model="tiny qwen3moe, idle decoder", threads=1, unit="us/token", rounds=ROUNDS)
