"""What a prompt of 2,000 tokens does to 8 running streams, against llama-server with the same batch and micro-batch sizes.

The prompt comes when each stream has 4 tokens. The worst gap gates: the longest time between two tokens of any stream, from the prompt's
arrival to the first token after the prompt's own, at most 1.5 times llama-server's. The prompt's own time to first token informs: it is the
price of the short gaps. One Python thread reads each stream, ours and llama-server's alike.
"""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import llama_moe
from benchmarks.conftest import compare
from benchmarks.peers import LlamaServer
from benchmarks.streams import Intrusion, intrude, random_prompts, streams_of
from benchmarks.synthetic_model import synthetic_model_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

    from benchmarks.streams import OpenStream

STREAMS = 8
PROMPT = 16
LONG_PROMPT = 2000
CONTEXT = 2304
ROUNDS = 3


def test_long_prompt_among_streams_against_llama_server(benchmark: BenchmarkFixture, threads: int) -> None:
    model = synthetic_model_path()
    with (
        llama_moe.load(model, experts="gpu", devices=[], context_size=CONTEXT, max_sequences=STREAMS + 1, threads=threads) as llm,
        LlamaServer(model, threads=threads, sequences=STREAMS + 1, context_size=CONTEXT) as server,
    ):
        seeds = itertools.count()
        waits: dict[str, list[float]] = {"ours": [], "theirs": []}

        def intrusion(open_stream: OpenStream, long: int = LONG_PROMPT) -> Intrusion:
            running = random_prompts(STREAMS, PROMPT, vocab_size=llm.model.vocab_size, seed=next(seeds))
            return intrude(open_stream, running, random_prompts(1, long, vocab_size=llm.model.vocab_size, seed=next(seeds))[0])

        def gap(name: str, open_stream: OpenStream) -> Callable[[], float]:
            intrusion(open_stream, PROMPT)  # what the first graph costs is not what is measured

            def measure() -> float:
                measured = intrusion(open_stream)
                waits[name].append(measured.first_token_seconds)
                return measured.worst_gap

            return measure

        compare(
            benchmark,
            gap("ours", streams_of(llm)),
            gap("theirs", server.open_stream),
            model=model.name,
            threads=threads,
            unit="s",
            peer="llama-server",
            rounds=ROUNDS,
            target="<= 1.5",
        )
        ours, theirs = (statistics.median(waits[name]) for name in ("ours", "theirs"))
        benchmark.extra_info["first_token_seconds"] = waits
        benchmark.extra_info["note"] = f"the prompt's first token after {ours:.3g} s against {theirs:.3g} s"
