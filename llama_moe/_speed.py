"""How quick an engine is at prompts and at single tokens, measured as llama.cpp's llama-bench does it."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, TypeVar

from .errors import InvalidOptionError
from .results import rate
from .sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .engine import Engine

_SampleT = TypeVar("_SampleT")


class SpreadDict(TypedDict):
    """A `Spread` as plain data."""

    mean: float
    stdev: float
    median: float
    min: float
    max: float


class RunsDict(TypedDict):
    """`Runs` as plain data."""

    tokens: list[int]
    seconds: list[float]
    tokens_per_second: SpreadDict


@dataclass(frozen=True, slots=True, repr=False)
class Spread:
    """Repeated measurements of one figure; `str()` is "mean ± standard deviation", which is what llama-bench prints.

    Attributes:
        values: the measurements, in the order in which they were made.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their arithmetic mean."""
        return statistics.fmean(self.values)

    @property
    def stdev(self) -> float:
        """The standard deviation of the sample (n - 1), as llama-bench has it; 0 for one measurement."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.values)

    @property
    def min(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def max(self) -> float:
        """The largest."""
        return max(self.values)

    def to_dict(self) -> SpreadDict:
        """As plain data, for JSON."""
        return {"mean": self.mean, "stdev": self.stdev, "median": self.median, "min": self.min, "max": self.max}

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.stdev:.2f}"

    def __repr__(self) -> str:
        return f"<Spread {self}, {self.min:.2f} to {self.max:.2f}, of {len(self.values)}>"


@dataclass(frozen=True, slots=True)
class Runs:
    """The repetitions of one test.

    Attributes:
        tokens: what each of them computed, which is counted, not what was asked for.
        seconds: how long each took.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> Spread:
        """The speed of each repetition."""
        return Spread(tuple(map(rate, self.tokens, self.seconds)))

    def to_dict(self) -> RunsDict:
        """As plain data, for JSON."""
        return {"tokens": list(self.tokens), "seconds": list(self.seconds), "tokens_per_second": self.tokens_per_second.to_dict()}


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured of an engine.

    Attributes:
        prompt: prompts into an empty cache, up to the first token; None: not asked for.
        decode: tokens after the first, from an empty context on; None: not asked for.
        time_to_first_token: seconds from submitting each of the prompts to its first token; None without them.
    """

    prompt: Runs | None
    decode: Runs | None
    time_to_first_token: Spread | None


def check_test(*, prompt_tokens: int, generate_tokens: int, repetitions: int, context_size: int) -> None:
    """Refuses tests that cannot be run.

    Raises:
        InvalidOptionError: a number is negative, there are no repetitions, or `context_size`, unless 0, holds too few tokens.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("generate_tokens", generate_tokens)):
        if value < 0:
            raise InvalidOptionError(f"{name} is {value}; it must be 0, for no such test, or more")
    if repetitions < 1:
        raise InvalidOptionError(f"repetitions is {repetitions}; it must be 1 or more")
    if 0 < context_size < tokens_needed(prompt_tokens, generate_tokens):
        raise InvalidOptionError(
            f"context_size is {context_size}; prompts of {prompt_tokens} tokens and {generate_tokens} generated ones need "
            f"{tokens_needed(prompt_tokens, generate_tokens)}"
        )


def tokens_needed(prompt_tokens: int, generate_tokens: int) -> int:
    """Tokens of context that the larger of both tests takes."""
    return max(prompt_tokens + 1, generate_tokens + 2)


def measure_speed(
    engine: Engine,
    *,
    prompt_tokens: int,
    generate_tokens: int,
    repetitions: int,
    seconds: float | None = None,
    streams: int = 1,
) -> Speed:
    """Measures prompts and single tokens, each after a run that warms up and does not count.

    Args:
        engine: an engine that nobody else uses.
        prompt_tokens: length of the prompts, of random tokens; 0: no prompts.
        generate_tokens: tokens to decode one after the other from an empty context, which are chosen at random from the 40 most likely
            ones: mixtures of experts are quicker at text that repeats itself. 0: none.
        repetitions: of each test.
        seconds: no further repetition of a test begins this long after its first one did; None: no limit.
        streams: texts that are generated at once, `generate_tokens` each; their speed is that of all together.
    """
    test = _Test(engine)
    prompts: tuple[Runs, Spread] | None = None
    decode: Runs | None = None
    if prompt_tokens:
        test.prompt(prompt_tokens)
        samples = _repeat(lambda: test.prompt(prompt_tokens), repetitions, seconds)
        prompts = _runs((tokens, taken) for tokens, taken, _ in samples), Spread(tuple(first for _, _, first in samples))
    if generate_tokens:
        test.decode(1, streams)
        decode = _runs(_repeat(lambda: test.decode(generate_tokens, streams), repetitions, seconds))
    return Speed(prompts[0] if prompts else None, decode, prompts[1] if prompts else None)


class _Test:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(0)  # noqa: S311 the same tokens for every placement
        self._vocabulary = engine.model.vocab_size
        # No prompt begins like one before it, so that nothing of the cache is used again.
        self._first = self._random.randrange(self._vocabulary)

    def prompt(self, tokens: int) -> tuple[int, float, float]:
        """Tokens computed, the seconds that took, and the time to the first token."""
        rest = [self._random.randrange(self._vocabulary) for _ in range(tokens - 1)]
        done = self._engine.generate([self._next_first(), *rest], SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        return done.prompt_tokens - done.cached_tokens, done.timings.prompt_seconds, done.timings.time_to_first_token

    def decode(self, tokens: int, streams: int) -> tuple[int, float]:
        """Tokens decoded one at a time, and the seconds from the first one of all streams to the last."""
        anything = [
            SamplingParams(max_tokens=tokens + 1, temperature=10, top_k=40, top_p=1, min_p=0, seed=self._seed(), ignore_eos=True)
            for _ in range(streams)
        ]
        done = self._engine.generate([[self._next_first()] for _ in range(streams)], anything)
        return sum(len(each.tokens) - 1 for each in done), max(each.timings.decode_seconds for each in done)

    def _seed(self) -> int:
        return self._random.randrange(1 << 32)

    def _next_first(self) -> int:
        self._first = (self._first + 1) % self._vocabulary
        return self._first


def _repeat(measure: Callable[[], _SampleT], repetitions: int, seconds: float | None) -> list[_SampleT]:
    begin = time.monotonic()
    samples = [measure()]
    while len(samples) < repetitions and (seconds is None or time.monotonic() - begin < seconds):
        samples.append(measure())
    return samples


def _runs(samples: Iterable[tuple[int, float]]) -> Runs:
    tokens, seconds = zip(*samples, strict=True)
    return Runs(tokens, seconds)
