"""Gates: tokens per second of 1, 4, 8 and 16 streams together.

| against | target |
|---|---|
| llama-batched-bench: decodes random tokens, samples nothing, makes no text | at least 0.97 |
| llama-server with as many slots, read by as many HTTP clients | at least 1.0 |
| llama-cpp-python given the same prompts in turn, 8 on the synthetic model | at least 1.3 |

What is counted: every prompt is 32 random tokens, every stream makes 48 tokens, greedily, and never the end of the text. Ours and
llama-server's streams are asked for at once and read by one Python thread each; `decode_rate()` says how the rate comes from the tokens'
times, prompts left out. llama-batched-bench reports its S_TG, which leaves prompts out too; llama-cpp-python's rate is of the time between
each prompt's first and last token. All have the same threads, micro-batch and context for each sequence.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

import llama_moe
from benchmarks.conftest import compare
from benchmarks.peers import LlamaCppPython, LlamaServer, batched_bench_rate
from benchmarks.streams import Prompt, decode_rate, random_prompts, read_together, streams_of
from benchmarks.synthetic_model import synthetic_model_path
from llama_moe import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.streams import OpenStream

PROMPT = 32
TOKENS = 48
CONTEXT = 256
ROUNDS = 3


@pytest.fixture(params=[1, 4, 8, 16])
def streams(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def llm(model: Path, threads: int, streams: int) -> Iterator[llama_moe.Engine]:
    with make_engine(model, threads, streams) as engine:
        yield engine


def make_engine(model: Path, threads: int, streams: int) -> llama_moe.Engine:
    return llama_moe.load(model, experts="gpu", devices=[], context_size=CONTEXT, max_sequences=streams, threads=threads)


def prompt_maker(llm: llama_moe.Engine, streams: int) -> Callable[[], list[Prompt]]:
    """New prompts at each call, so that none is found in a cache."""
    seeds = itertools.count()
    return lambda: random_prompts(streams, PROMPT, vocab_size=llm.model.vocab_size, seed=next(seeds))


def rate_of(open_stream: OpenStream, prompts: Callable[[], list[Prompt]]) -> Callable[[], float]:
    """Measures what `open_stream` opens; the first graph of each size, which costs more, is computed here."""
    read_together(open_stream, prompts(), 4)
    return lambda: decode_rate(read_together(open_stream, prompts(), TOKENS))


def test_streams_against_batched_bench(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int, streams: int) -> None:
    compare(
        benchmark,
        rate_of(streams_of(llm), prompt_maker(llm, streams)),
        lambda: batched_bench_rate(model, threads=threads, streams=streams, prompt=PROMPT, tokens=TOKENS, context_size=CONTEXT),
        model=model.name,
        threads=threads,
        unit="tokens/s",
        peer="llama-batched-bench",
        rounds=ROUNDS,
        target=">= 0.97",
    )


def test_streams_against_llama_server(benchmark: BenchmarkFixture, llm: llama_moe.Engine, model: Path, threads: int, streams: int) -> None:
    with LlamaServer(model, threads=threads, sequences=streams, context_size=CONTEXT) as server:
        compare(
            benchmark,
            rate_of(streams_of(llm), prompt_maker(llm, streams)),
            rate_of(server.open_stream, prompt_maker(llm, streams)),
            model=model.name,
            threads=threads,
            unit="tokens/s",
            peer="llama-server",
            rounds=ROUNDS,
            target=">= 1.0",
        )


def test_list_of_8_against_batched_bench(benchmark: BenchmarkFixture, threads: int) -> None:
    """As the streams, but through `generate()` with a list, whose rate is that of its completions' own timings."""
    model = synthetic_model_path()
    with make_engine(model, threads, 8) as llm:
        prompts = prompt_maker(llm, 8)

        def list_rate(tokens: int = TOKENS) -> float:
            completions = llm.generate(prompts(), SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
            return sum(completion.timings.decode_tokens_per_second for completion in completions)

        list_rate(4)
        compare(
            benchmark,
            list_rate,
            lambda: batched_bench_rate(model, threads=threads, streams=8, prompt=PROMPT, tokens=TOKENS, context_size=CONTEXT),
            model=model.name,
            threads=threads,
            unit="tokens/s",
            peer="llama-batched-bench",
            rounds=ROUNDS,
            target=">= 0.97",
        )


def test_8_streams_against_llama_cpp_python(benchmark: BenchmarkFixture, threads: int) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make bench` installs it")
    model = synthetic_model_path()
    with make_engine(model, threads, 8) as llm, LlamaCppPython(model, threads=threads) as peer:
        theirs = prompt_maker(llm, 8)
        peer.decode_rate(theirs()[:1], 4)
        compare(
            benchmark,
            rate_of(streams_of(llm), prompt_maker(llm, 8)),
            lambda: peer.decode_rate(theirs(), TOKENS),
            model=model.name,
            threads=threads,
            unit="tokens/s",
            peer="llama-cpp-python, in turn",
            rounds=ROUNDS,
            target=">= 1.3",
        )
