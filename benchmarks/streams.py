"""Reading many streams at once, one thread for each, ours and a peer's in the same way; and what their arrival times say."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np

import llama_moe
from llama_moe import SamplingParams

Prompt: TypeAlias = list[int]
OpenStream: TypeAlias = Callable[[Prompt, int], AbstractContextManager[Iterator[int]]]
"""Asks for so many tokens after a prompt; the iterator says how many have come, one item for each arrival. Leaving early cancels."""

# Enough that no stream ends before what it is measured for.
_ENDLESS = 1024


@dataclass
class Arrivals:
    """When the tokens of one stream came, in seconds of time.perf_counter()."""

    asked: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens so far, at each time."""

    @property
    def first_token_seconds(self) -> float:
        """From the request to its first token."""
        return self.times[0] - self.asked


@dataclass(frozen=True)
class Intrusion:
    """What a long prompt did to the streams that ran when it came.

    Attributes:
        worst_gap: longest time between two tokens of one of them, from the arrival of the prompt to the first token after the prompt's own.
        first_token_seconds: from the arrival of the prompt to its first token.
    """

    worst_gap: float
    first_token_seconds: float


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[Prompt]:
    """Prompts of random tokens: no two begin alike, and they use different experts."""
    tokens: list[Prompt] = np.random.default_rng(seed).integers(0, vocab_size, size=(count, length)).tolist()
    return tokens


def streams_of(engine: llama_moe.Engine) -> OpenStream:
    """Our streams: greedy, never the end of the text."""

    @contextlib.contextmanager
    def open_stream(prompt: Prompt, tokens: int) -> Iterator[Iterator[int]]:
        with engine.stream(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)) as stream:
            yield (count for count, _ in enumerate(stream, 1))

    return open_stream


def read_together(open_stream: OpenStream, prompts: Sequence[Prompt], tokens: int) -> list[Arrivals]:
    """Asks for all prompts at once and reads all streams to their end."""
    ready = threading.Barrier(len(prompts))

    def read(prompt: Prompt) -> Arrivals:
        ready.wait()
        arrivals = Arrivals(asked=time.perf_counter())
        with open_stream(prompt, tokens) as stream:
            for count in stream:
                arrivals.times.append(time.perf_counter())
                arrivals.counts.append(count)
        return arrivals

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(read, prompts))


def decode_rate(streams: Sequence[Arrivals]) -> float:
    """Tokens per second of all streams together while all of them generate.

    That is from when the last of them has its first token to when the first of them has its last. Each stream counts from its own first
    arrival in that time to its own last one, so that it does not matter in which order the tokens of one step are read.
    """
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    rate = 0.0
    for stream in streams:
        within = [i for i, arrived in enumerate(stream.times) if begin <= arrived <= end]
        if len(within) < 2:
            raise RuntimeError("the streams did not run together; there is nothing to measure")
        first, last = within[0], within[-1]
        rate += (stream.counts[last] - stream.counts[first]) / (stream.times[last] - stream.times[first])
    return rate


def intrude(open_stream: OpenStream, running: Sequence[Prompt], long: Prompt, *, lead: int = 4) -> Intrusion:
    """Lets the long prompt come when each of `running` has `lead` tokens, and cancels them all after its first token."""
    settled = threading.Semaphore(0)
    over = threading.Event()

    def read(prompt: Prompt) -> list[float]:
        times = []
        try:
            with open_stream(prompt, _ENDLESS) as stream:
                for _ in stream:
                    times.append(time.perf_counter())
                    if len(times) == lead:
                        settled.release()
                    if over.is_set():
                        return times
            raise RuntimeError("a stream ended before the long prompt was computed")
        finally:
            settled.release()  # should it fail: nobody waits for it then

    with ThreadPoolExecutor(len(running)) as pool:
        futures = [pool.submit(read, prompt) for prompt in running]
        try:
            for _ in running:
                settled.acquire()
            asked = time.perf_counter()
            with open_stream(long, 2) as stream:
                next(stream)
                first_token = time.perf_counter()
        finally:
            over.set()
        times = [future.result() for future in futures]
    gaps = [after - before for each in times for before, after in pairwise(each) if after > asked]
    return Intrusion(worst_gap=max(gaps), first_token_seconds=first_token - asked)
