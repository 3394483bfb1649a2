"""Generation with real models: what is asked for is what comes, alone and in a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llama_moe import Context, Engine, Model, SamplingParams
from llama_moe.errors import ContextFullError, InvalidOptionError, LlamaMoeError
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_tokens=20, temperature=0)
PROMPTS = ["Hello", "The experts of the router", "a", "One, two, three, four, five", "Zebra"]


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, context_size=256, max_sequences=3, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[int, ...]]:
    """Greedy tokens of every prompt, each computed by itself."""
    with Engine(model, context_size=256, threads=1) as engine:
        return [engine.generate(prompt, GREEDY).tokens for prompt in PROMPTS]


def test_different_prompts_give_different_tokens(alone: list[tuple[int, ...]]) -> None:
    assert len(set(alone)) == len(PROMPTS)


def test_more_prompts_than_sequences_equal_the_same_prompts_alone(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    assert [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)] == alone


def test_many_threads_share_an_engine(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    results: dict[int, list[tuple[int, ...]]] = {}

    def work(index: int) -> None:
        results[index] = [engine.generate(prompt, GREEDY).tokens for prompt in PROMPTS]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(6), alone)


def test_greedy_tokens_are_those_with_the_largest_logits(engine: Engine, model: Model) -> None:
    completion = engine.generate("Hello", GREEDY)
    prompt = model.tokenize("Hello", parse_special=True)
    with Context(model, context_size=256, threads=1) as context:
        logits = context.decode([*prompt, *completion.tokens], outputs="all")
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == list(completion.tokens)


def test_a_stream_is_what_generate_returns(engine: Engine) -> None:
    with engine.stream("Hello", GREEDY) as stream:
        tokens = list(stream)
    assert "".join(map(str, tokens)) == stream.completion.text == engine.generate("Hello", GREEDY).text
    assert tuple(token.id for token in tokens) == stream.completion.tokens


def test_the_text_is_the_tokens_text(engine: Engine, model: Model) -> None:
    completion = engine.generate("Hello", GREEDY)
    text = b"".join(model._native.token_bytes(token) for token in completion.tokens).decode(errors="replace")
    assert completion.text == text


def test_token_ids_are_a_prompt(engine: Engine, model: Model) -> None:
    ids = model.tokenize("Hello", parse_special=True)
    assert engine.generate(ids, GREEDY).tokens == engine.generate("Hello", GREEDY).tokens
    assert engine.generate(np.array(ids, dtype=np.int64), GREEDY).tokens == engine.generate("Hello", GREEDY).tokens


def test_max_tokens_and_the_counts(engine: Engine, model: Model) -> None:
    completion = engine.generate("Hello", SamplingParams(max_tokens=5, temperature=0))
    assert len(completion.tokens) == 5
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == len(model.tokenize("Hello"))
    timings = completion.timings
    assert 0 <= timings.queue_seconds <= timings.time_to_first_token
    assert timings.decode_tokens_per_second > 0


def test_the_context_ends_a_generation_with_length(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        prompt = [5] * (engine.context_size - 10)
        completion = engine.generate(prompt, SamplingParams(temperature=0, ignore_eos=True))
        # One token for each free place, and the last one, which need not be stored.
        assert len(completion.tokens) == 11
        assert completion.finish_reason == "length"
        assert engine.generate([5] * engine.context_size, SamplingParams(temperature=0)).finish_reason == "length"
        with pytest.raises(ContextFullError, match=f"{engine.context_size + 1} tokens.*holds {engine.context_size}"):
            engine.generate([5] * (engine.context_size + 1))


def test_a_stop_string_ends_the_text_before_it_whatever_tokens_it_is_made_of(engine: Engine) -> None:
    whole = engine.generate("Hello", SamplingParams(max_tokens=40, temperature=0)).text
    for size in (1, 3, 7):
        for start in range(2, len(whole) - size, 5):
            stop = whole[start : start + size]
            completion = engine.generate("Hello", SamplingParams(max_tokens=40, temperature=0, stop=["\0never", stop]))
            assert completion.text == whole[: whole.index(stop)]
            assert completion.finish_reason == "stop"


def test_the_end_of_generation_token_ends_with_stop(engine: Engine, model: Model) -> None:
    assert model.eos_token is not None
    towards_the_end = SamplingParams(max_tokens=20, temperature=0, logit_bias={model.eos_token: 1000.0})
    completion = engine.generate("Hello", towards_the_end)
    assert (completion.tokens, completion.text, completion.finish_reason) == ((), "", "stop")
    ignored = SamplingParams(max_tokens=20, temperature=0, logit_bias={model.eos_token: 1000.0}, ignore_eos=True)
    assert engine.generate("Hello", ignored).finish_reason == "length"


def test_logit_bias_bans_and_forces_tokens(engine: Engine) -> None:
    first = engine.generate("Hello", GREEDY).tokens[0]
    banned = SamplingParams(max_tokens=8, temperature=0, logit_bias={first: -float("inf")})
    assert first not in engine.generate("Hello", banned).tokens
    forced = SamplingParams(max_tokens=8, temperature=0, logit_bias={40: 1000.0})
    assert engine.generate("Hello", forced).tokens == (40,) * 8
    with pytest.raises(InvalidOptionError, match="999999"):
        engine.generate("Hello", SamplingParams(logit_bias={999999: 1.0}))


def test_a_repeat_penalty_changes_repetition(engine: Engine) -> None:
    # Forced to one token by a bias, the penalty alone lets another one in.
    bias = {40: 30.0}
    without = engine.generate("Hello", SamplingParams(max_tokens=12, temperature=0, logit_bias=bias)).tokens
    penalised = engine.generate("Hello", SamplingParams(max_tokens=12, temperature=0, logit_bias=bias, repeat_penalty=50.0)).tokens
    assert set(without) == {40}
    assert len(set(penalised)) > 1


def test_a_seed_reproduces_whatever_else_is_in_the_batch(engine: Engine) -> None:
    seeded = SamplingParams(max_tokens=16, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=11)
    first = engine.generate("Hello", seeded).tokens
    others = [SamplingParams(max_tokens=16, temperature=1.5, seed=seed) for seed in range(4)]
    together = engine.generate(["Hello", *PROMPTS[1:]], [seeded, *others])
    assert together[0].tokens == first
    assert engine.generate("Hello", SamplingParams(max_tokens=16, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=12)).tokens != first


def test_without_a_seed_generations_differ(engine: Engine) -> None:
    random = SamplingParams(max_tokens=16, temperature=2.0, top_k=0, top_p=1, min_p=0)
    assert len({engine.generate("Hello", random).tokens for _ in range(4)}) > 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=8, temperature=1.5, top_k=1),
        SamplingParams(max_tokens=8, temperature=1.5, top_p=1e-6),
        SamplingParams(max_tokens=8, temperature=1.5, min_p=1.0),
        SamplingParams(max_tokens=8, temperature=1.5, top_n_sigma=1e-6),
    ],
    ids=["top_k", "top_p", "min_p", "top_n_sigma"],
)
def test_samplers_cut_down_to_the_best_candidate_are_greedy(engine: Engine, params: SamplingParams) -> None:
    assert engine.generate("Hello", params).tokens == engine.generate("Hello", SamplingParams(max_tokens=8, temperature=0)).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"mirostat": 1},
        {"mirostat": 2},
        {"typical_p": 0.3},
        {"xtc_probability": 1.0},
        {"dry_multiplier": 5.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
        {"repeat_penalty": 2.0, "penalty_window": -1},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "penalty_window": -1},
        {"dynatemp_range": 0.8},
        {"adaptive_target": 0.1},
        {"logit_bias": {70: 8.0}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_other_sampler_makes_a_difference_and_repeats_by_seed(engine: Engine, options: dict[str, Any]) -> None:
    prompt = [30, 31, 32, 33] * 8

    def tokens(seed: int, **options: Any) -> tuple[int, ...]:
        return engine.generate(prompt, SamplingParams(max_tokens=24, seed=seed, ignore_eos=True, **options)).tokens

    seeds = range(6)
    with_it = [tokens(seed, **options) for seed in seeds]
    assert with_it == [tokens(seed, **options) for seed in seeds]
    assert with_it != [tokens(seed) for seed in seeds]


def test_a_full_context_ends_that_request_alone(model: Model) -> None:
    limits = [20, 200, 60]
    params = [SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True) for limit in limits]
    prompts = [[token, 9, 8] for token in (30, 40, 50)]
    with Engine(model, context_size=256, max_sequences=4, threads=1, kv_type="f32", flash_attention="off") as engine:
        expected = [engine.generate(prompt, each).tokens for prompt, each in zip(prompts, params, strict=True)]
        streams = engine.stream(prompts, params)
        for stream in streams:
            next(stream)
        # These fill their context while the others run.
        full = engine.generate([[5] * 250, [6] * 240], SamplingParams(temperature=0, ignore_eos=True))
        assert [(len(completion.tokens), completion.finish_reason) for completion in full] == [(7, "length"), (17, "length")]
        assert [stream.read_all().tokens for stream in streams] == expected
        assert engine.generate(prompts[0], params[0]).tokens == expected[0]


def test_a_stream_that_nobody_reads_holds_up_no_other_and_is_bounded(model: Model) -> None:
    with Engine(model, context_size=256, max_sequences=3, threads=1) as engine:
        limited = engine.stream("Hello", SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        endless = engine.stream("Hello", SamplingParams(temperature=0, ignore_eos=True))
        for _ in range(20):
            assert len(engine.generate("a", GREEDY).tokens) <= 20
        assert eventually(lambda: engine.stats()["requests_running"] == 0)  # by max_tokens, and by the context's end
        generated = engine.stats()["generated_tokens"]
        assert len(list(limited)) == 60
        assert len(list(endless)) <= engine.context_size
        assert (limited.completion.finish_reason, endless.completion.finish_reason) == ("length", "length")
        assert engine.stats()["generated_tokens"] == generated


def test_log_probabilities_are_those_of_the_logits(engine: Engine, model: Model) -> None:
    completion = engine.generate("Hello", SamplingParams(max_tokens=6, temperature=0, logprobs=3))
    prompt = model.tokenize("Hello", parse_special=True)
    with Context(model, context_size=256, threads=1) as context:
        # Decoded as the engine does it, one token after the other: one batch of all would be rounded otherwise, on some processors by 1e-3.
        parts = [prompt, *([token] for token in completion.tokens[:-1])]
        logits = np.stack([context.decode(part, outputs="all")[-1] for part in parts]).astype(np.float64)
    expected = (
        logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - logits.max(axis=1, keepdims=True)
    )
    assert completion.logprobs is not None
    for token, row in zip(completion.logprobs, expected, strict=True):
        assert token.top_logprobs is not None
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [top.id for top in token.top_logprobs] == np.argsort(-row)[:3].tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)
    assert engine.generate("Hello", GREEDY).logprobs is None


def test_bad_prompts_are_refused_with_the_value(engine: Engine, model: Model) -> None:
    with pytest.raises(InvalidOptionError, match="empty"):
        engine.generate([[1], []], GREEDY)
    with pytest.raises(InvalidOptionError, match=rf"prompt\[1\] is {model.vocab_size}"):
        engine.generate([1, model.vocab_size])
    no_prompts: list[str] = []
    assert engine.generate(no_prompts, GREEDY) == []


def test_an_engine_counts_its_work(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        completions = engine.generate(PROMPTS, GREEDY)
        stats = engine.stats()
    assert stats["requests_submitted"] == stats["requests_finished"] == len(PROMPTS)
    assert stats["requests_running"] == stats["requests_waiting"] == 0
    assert stats["prompt_tokens"] == sum(completion.prompt_tokens - completion.cached_tokens for completion in completions)
    assert stats["cached_tokens"] == sum(completion.cached_tokens for completion in completions)
    assert stats["generated_tokens"] == sum(len(completion.tokens) for completion in completions)
    assert stats["decode_seconds"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_sequences": 100_000}, "max_sequences is 100000"),
        ({"context_size": -1}, "context_size is -1"),
        ({"kv_type": "q7"}, "kv_type is 'q7'"),
        ({"flash_attention": "maybe"}, "flash_attention is 'maybe'"),
        ({"context_size": 2_000_000_000, "max_sequences": 2}, "2000000000"),
    ],
)
def test_bad_options_are_refused_with_the_value(model: Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(LlamaMoeError, match=message):
        Engine(model, **options)  # type: ignore[arg-type]


def test_a_long_prompt_is_computed_in_parts(model: Model) -> None:
    prompt = np.random.default_rng(1).integers(10, 250, size=200).tolist()
    whole = Engine(model, context_size=256, threads=1)
    parts = Engine(model, context_size=256, batch_size=16, micro_batch_size=8, threads=1)
    with whole, parts:
        assert parts.generate(prompt, GREEDY).tokens == whole.generate(prompt, GREEDY).tokens
