"""What a request gives does not depend on what is computed beside it.

Where floating point makes a difference at all, how large it is follows from what changes the order of sums: the kernel that a batch's size
chooses, and the attention over the cache. A difference grows where a router sees two experts as almost equal and takes the other one: with
a Mixture of Experts the rare token differs much more than the others do. These tests measure that with logits, and show that greedy text
is the same where the differences are smaller than what separates the best two tokens.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_moe import Completion, Context, Engine, Model, SamplingParams, Speculative

Floats = npt.NDArray[np.float32]

# Sums in F32 throughout, whatever the batch.
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off"}
FLASH: dict[str, Any] = {"kv_type": "f16", "flash_attention": "on"}
LENGTHS = (120, 37, 1, 64)
CHUNKS = (1, 2, 7, 16, 32, 100)
# Tokens that a sequence adds at a step, taken in turn.
STEPS = ((1,), (1, 3, 20), (40, 1, 1))


# ---- logits


def chunked(context: Context, tokens: Sequence[int], size: int) -> Floats:
    """The logits after every token of a sequence that is computed alone, `size` tokens at a time."""
    context.clear()
    return np.concatenate([context.decode(tokens[at : at + size], outputs="all") for at in range(0, len(tokens), size)])


def together(context: Context, sequences: Sequence[Sequence[int]], steps: Sequence[int]) -> list[Floats]:
    """The same for sequences that arrive one after the other and share every batch."""
    context.clear()
    rows: list[list[Floats]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for step in itertools.count():
        tokens: list[int] = []
        owners: list[int] = []
        for number, sequence in enumerate(sequences):
            if step >= 2 * number:
                part = sequence[done[number] : done[number] + steps[(step + number) % len(steps)]]
                done[number] += len(part)
                tokens += part
                owners += [number] * len(part)
        if not tokens:
            return [np.concatenate(each) for each in rows]
        logits = context.decode(tokens, sequence_ids=owners, outputs="all")
        for number in set(owners):
            rows[number].append(logits[np.array(owners) == number])
    raise AssertionError


def differences(model: Model, options: dict[str, Any]) -> Floats:
    """The largest difference of a logit, for each token of all sequences and all ways to compute them, from the sequence computed whole."""
    largest: list[Floats] = []
    with Context(model, context_size=256, max_sequences=len(LENGTHS), threads=1, **options) as context:
        for seed in range(4):
            chance = np.random.default_rng(seed)
            sequences = [chance.integers(10, 250, size=length).tolist() for length in LENGTHS]
            whole = [chunked(context, sequence, len(sequence)) for sequence in sequences]
            others = [[chunked(context, sequence, size) for sequence in sequences] for size in CHUNKS]
            others += [together(context, sequences, steps) for steps in STEPS]
            largest += [np.abs(ours - theirs).max(axis=1) for other in others for ours, theirs in zip(other, whole, strict=True)]
    return np.concatenate(largest)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Limits of the differences of logits; the logits of these models go to about 11."""

    model: str
    options: dict[str, Any]
    median: float
    most: float
    """Of 99 in 100 tokens."""
    largest: float
    repack: bool = False


BOUNDS = {
    "F32": Bound(model="llama", options=EXACT, median=1e-6, most=5e-5, largest=1e-4),
    # Integers are summed exactly, and with F32 in attention the numbers that are rounded to them are the same.
    "Q8_0 weights": Bound(model="qwen2moe", options=EXACT, median=1e-6, most=5e-5, largest=1e-4),
    "Q8_0 weights, repacked where the CPU can": Bound(model="qwen2moe", options=EXACT, repack=True, median=1e-6, most=1.0, largest=12.0),
    "F16 cache": Bound(model="llama", options=EXACT | {"kv_type": "f16"}, median=1e-3, most=0.02, largest=1.0),
    # No experts, no router: also the rarest token differs little.
    "F16 cache, flash attention, dense": Bound(model="llama-dense", options=FLASH, median=0.05, most=0.2, largest=0.5),
    "F16 cache, flash attention": Bound(model="llama", options=FLASH, median=0.05, most=0.3, largest=12.0),
    # Every change is rounded to 8 bits again in each layer, and a router that is close takes another expert.
    "Q8_0 weights, F16 cache, flash attention": Bound(model="qwen2moe", options=FLASH, repack=True, median=0.6, most=4.0, largest=12.0),
    "Q4_0 experts, repacked": Bound(model="olmoe", options=EXACT, repack=True, median=0.01, most=0.5, largest=12.0),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_logits_of_a_sequence_hardly_depend_on_its_batches(name: str, tiny_model: Callable[[str], Path]) -> None:
    bound = BOUNDS[name]
    with Model(tiny_model(bound.model), experts="gpu", devices=[], repack=bound.repack) as model:
        found = differences(model, bound.options)
    measured = {"median": float(np.median(found)), "most": float(np.quantile(found, 0.99)), "largest": float(found.max())}
    for limit, value in measured.items():
        assert value <= getattr(bound, limit), measured


# ---- text

SHARED = list(range(20, 110))
PROMPTS: list[list[int]] = [
    [*SHARED, 7, 8, 9],
    [5],
    [*SHARED, 11],
    [30, 31, 32] * 20,
    list(range(100, 140)),
    [*SHARED[:50], 200],
    list(range(10, 240)),
    [*SHARED, 7, 8, 10],
]
PARAMS = [SamplingParams(max_tokens=20 + 9 * number, temperature=0, ignore_eos=True) for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[int, ...]]:
    """The tokens of each request in an engine that knows no other."""
    tokens = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        with Engine(model, context_size=512, threads=1, **EXACT) as engine:
            tokens.append(engine.generate(prompt, params).tokens)
    return tokens


def test_the_best_two_tokens_are_further_apart_than_logits_differ(model: Model, alone: list[tuple[int, ...]]) -> None:
    """So greedy text cannot differ, whatever shares its batches."""
    with Context(model, context_size=512, threads=1, **EXACT) as context:
        for prompt, tokens in zip(PROMPTS, alone, strict=True):
            logits = chunked(context, [*prompt, *tokens[:-1]], 512)[len(prompt) - 1 :]
            assert logits.argmax(axis=1).tolist() == list(tokens)
            best = np.sort(logits, axis=1)[:, -2:]
            assert (best[:, 1] - best[:, 0]).min() > 2 * BOUNDS["F32"].largest


@pytest.fixture(params=["none", "lookup", "draft"])
def speculative(request: pytest.FixtureRequest, model: Model, tiny_model: Callable[[str], Path]) -> Iterator[Speculative | None]:
    if request.param == "draft":
        with Model(tiny_model("llama-dense"), experts="gpu", devices=[], repack=False) as draft:
            yield Speculative.draft(draft, draft_tokens=3, min_probability=0)
    else:
        yield Speculative.lookup(ngram_size=1, draft_tokens=4) if request.param == "lookup" else None


@pytest.mark.parametrize("pool", [None, 768], ids=["own", "pool"])
def test_every_request_of_a_mixed_batch_gives_what_it_gives_alone(
    pool: int | None, speculative: Speculative | None, model: Model, alone: list[tuple[int, ...]]
) -> None:
    with Engine(
        model, context_size=512, context_pool=pool, max_sequences=4, micro_batch_size=64, threads=1, speculative=speculative, **EXACT
    ) as engine:
        assert staggered(engine) == alone
        # Again, with what the first round left in the cache, in another order, from several threads.
        again: dict[int, Completion] = {}

        def work(numbers: Sequence[int]) -> None:
            for number in numbers:
                again[number] = engine.generate(PROMPTS[number], PARAMS[number])

        threads = [threading.Thread(target=work, args=(range(first, -1, -3),)) for first in (7, 6, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [again[number].tokens for number in range(len(PROMPTS))] == alone
        stats = engine.stats()
        assert stats["cached_tokens"] > 0
        assert stats["decode_calls"] > 0
        assert (stats["draft_tokens"] > 0) == (speculative is not None)


def staggered(engine: Engine) -> list[tuple[int, ...]]:
    """Each request begins when the one before it has given a few tokens."""
    streams = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        streams.append(engine.stream(prompt, params))
        for token in itertools.islice(streams[max(len(streams) - 4, 0)], 5):
            assert token.id >= 0
    return [stream.read_all().tokens for stream in streams]
