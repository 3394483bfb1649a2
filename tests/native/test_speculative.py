"""Drafted tokens make no difference to what is generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llama_moe import Engine, Model, SamplingParams, Speculative
from llama_moe.errors import ClosedError, InvalidOptionError

GREEDY = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)
REPETITIVE = [*range(20, 60)] * 3
PROMPTS = [REPETITIVE, [30, 31, 32] * 8, list(range(100, 140)), [5]]


@pytest.fixture(scope="module")
def expected(model: Model) -> list[tuple[int, ...]]:
    with Engine(model, context_size=512, threads=1) as engine:
        return [engine.generate(prompt, GREEDY).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("pool", [None, 2048])
def test_lookup_gives_the_same_tokens_alone_and_together(model: Model, expected: list[tuple[int, ...]], pool: int | None) -> None:
    speculative = Speculative.lookup(ngram_size=1, draft_tokens=6)
    with Engine(model, context_size=512, context_pool=pool, max_sequences=3, threads=1, speculative=speculative) as engine:
        assert [engine.generate(prompt, GREEDY).tokens for prompt in PROMPTS] == expected
        assert [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)] == expected
        stats = engine.stats()
        assert stats["draft_tokens"] > 0
        assert stats["draft_acceptance_rate"] == stats["draft_tokens_accepted"] / stats["draft_tokens"]


def test_the_model_as_its_own_draft_is_right_every_time_and_saves_calls(model: Model, expected: list[tuple[int, ...]]) -> None:
    speculative = Speculative.draft(model, draft_tokens=4, min_probability=0)
    with Engine(model, context_size=512, threads=1) as plain, Engine(model, context_size=512, threads=1, speculative=speculative) as engine:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert plain.generate(prompt, GREEDY).tokens == engine.generate(prompt, GREEDY).tokens == tokens
        assert engine.stats()["draft_acceptance_rate"] > 0.95
        assert engine.stats()["decode_calls"] < plain.stats()["decode_calls"] / 2


def test_a_draft_model_that_guesses_badly_changes_nothing(
    model: Model, tiny_model: Callable[[str], Path], expected: list[tuple[int, ...]]
) -> None:
    with (
        Model(tiny_model("llama-dense"), experts="gpu", devices=[], repack=False) as other,
        Engine(
            model, context_size=512, max_sequences=2, threads=1, speculative=Speculative.draft(other, draft_tokens=3, min_probability=0)
        ) as engine,
    ):
        assert [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)] == expected
        assert [engine.generate(PROMPTS[0], GREEDY).cached_tokens for _ in range(2)][-1] == len(PROMPTS[0]) - 1
        assert engine.stats()["draft_acceptance_rate"] < 0.5
        assert engine.memory().total_bytes > 0


def test_seeds_stops_and_limits_are_the_same_with_drafts(model: Model) -> None:
    params = [
        SamplingParams(max_tokens=30, temperature=0.9, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=0),
        SamplingParams(temperature=0, ignore_eos=True),
    ]
    with (
        Engine(model, context_size=256, threads=1) as plain,
        Engine(model, context_size=256, threads=1, speculative=Speculative.draft(model, min_probability=0)) as engine,
    ):
        text = plain.generate(REPETITIVE, params[2]).text
        params.append(SamplingParams(temperature=0, stop=text[20:23], ignore_eos=True))
        for item in params:
            with_drafts, without = engine.generate(REPETITIVE, item), plain.generate(REPETITIVE, item)
            assert (with_drafts.tokens, with_drafts.text, with_drafts.finish_reason) == (
                without.tokens,
                without.text,
                without.finish_reason,
            )


def test_what_cannot_draft_is_refused(model: Model, tiny_model: Callable[[str], Path]) -> None:
    with Model(tiny_model("olmoe"), experts="gpu", devices=[]) as stranger, pytest.raises(InvalidOptionError, match="draft model"):
        Engine(model, context_size=256, speculative=Speculative.draft(stranger))
    with pytest.raises(ClosedError):
        Engine(model, context_size=256, speculative=Speculative.draft(stranger))
    with pytest.raises(InvalidOptionError, match="draft_tokens is 0"):
        Speculative.lookup(draft_tokens=0)
    with pytest.raises(InvalidOptionError, match="ngram_size is 9"):
        Speculative.lookup(ngram_size=9, draft_tokens=8)
    with pytest.raises(InvalidOptionError, match="ngram_size or draft_model"):
        Speculative(draft_tokens=4)
