"""Log-probabilities and embeddings are those of the model's logits and hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
import pytest

from llama_moe import Context, Engine, Model, SamplingParams
from llama_moe.errors import ContextFullError, InvalidOptionError, RequestTimeoutError

PROMPT = [1, *range(30, 130)]


# Attention that computes the same whatever the size of a batch.
EXACT: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off", "threads": 1}


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, context_size=256, max_sequences=3, **EXACT) as engine:
        yield engine


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # type: ignore[no-any-return]


def test_scores_are_those_of_the_logits(engine: Engine, model: Model) -> None:
    with Context(model, context_size=256, **EXACT) as context:
        expected = log_softmax(context.decode(PROMPT, outputs="all"))[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    score = engine.score(PROMPT)
    assert score.tokens == tuple(PROMPT)
    assert score.logprobs.dtype == np.float32
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)
    assert "101 tokens" in repr(score)


def test_scores_of_several_texts_beside_generation(engine: Engine) -> None:
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    alone = engine.generate("Hello", greedy).tokens
    stream = engine.stream("Hello", greedy)
    scores = engine.score(["Hello there", PROMPT, [4, 5]])
    assert [len(score.logprobs) for score in scores] == [len(score.tokens) - 1 for score in scores]
    assert scores[1].logprobs == pytest.approx(engine.score(PROMPT).logprobs, abs=1e-5)
    assert stream.read_all().tokens == alone


def test_greedy_tokens_are_more_likely_than_others(engine: Engine) -> None:
    prompt = list(range(40, 60))
    likely = engine.generate(prompt, SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)).tokens
    assert engine.score([*prompt, *likely]).logprobs[-10:].sum() > engine.score([*prompt, *range(200, 210)]).logprobs[-10:].sum()


def test_perplexity_of_a_long_text_counts_every_token_once(engine: Engine, model: Model) -> None:
    text = np.random.default_rng(3).integers(10, 250, size=600).tolist()
    whole = engine.perplexity(text[:200])
    assert whole == pytest.approx(engine.score(text[:200]).perplexity)
    with Engine(model, context_size=1024, **EXACT) as roomy:
        exact = roomy.perplexity(text)
    assert engine.perplexity(text, stride=64) == pytest.approx(exact, rel=0.05)
    assert engine.perplexity(text) == pytest.approx(exact, rel=0.1)
    for stride in (0, 256):
        with pytest.raises(InvalidOptionError, match=f"stride is {stride}"):
            engine.perplexity(text, stride=stride)


def test_embeddings_pool_the_hidden_states(engine: Engine) -> None:
    states = engine.embed(PROMPT, pooling="none", normalize=False)
    assert isinstance(states, np.ndarray)
    assert states.shape == (len(PROMPT), engine.model.embedding_length)
    assert states.dtype == np.float32
    assert engine.embed(PROMPT, normalize=False) == pytest.approx(states.mean(axis=0), abs=1e-4)
    assert engine.embed(PROMPT, pooling="last", normalize=False) == pytest.approx(states[-1], abs=1e-4)
    assert engine.embed(PROMPT, pooling="cls", normalize=False) == pytest.approx(states[0], abs=1e-4)
    unit = engine.embed(PROMPT)
    assert np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)
    assert unit == pytest.approx(states.mean(axis=0) / np.linalg.norm(states.mean(axis=0)), abs=1e-4)


def test_hidden_states_are_causal(engine: Engine) -> None:
    states = engine.embed(PROMPT, pooling="none", normalize=False)
    assert engine.embed(PROMPT[:40], pooling="none", normalize=False) == pytest.approx(states[:40], abs=1e-4)


def test_hidden_states_times_the_output_weights_are_the_logits(engine: Engine, model: Model) -> None:
    """The states are those behind the final norm."""
    (output,) = [tensor.data for tensor in gguf.GGUFReader(model.path).tensors if tensor.name == "output.weight"]
    assert output.shape == (model.vocab_size, model.embedding_length)
    states = engine.embed(PROMPT, pooling="none", normalize=False)
    with Context(model, context_size=256, **EXACT) as context:
        logits = context.decode(PROMPT, outputs="all")
    assert np.asarray(states) @ output.T == pytest.approx(logits, abs=1e-3)


def test_a_timeout_ends_what_is_scored_or_embedded(model: Model) -> None:
    long = [7] * 16000
    with Engine(model, context_size=16384, micro_batch_size=16, **EXACT) as engine:
        for call in (
            lambda: engine.score(long, timeout=0.1),
            lambda: engine.score([long, [4, 5]], timeout=0.1),
            lambda: engine.embed([long], timeout=0.1),
        ):
            with pytest.raises(RequestTimeoutError, match=r"within its timeout of 0\.1 s"):
                call()
            assert len(engine.score([4, 5, 6], timeout=200).logprobs) == 2
        assert engine.stats()["prompt_tokens"] < 3 * 15000
        for timeout in (0, -1):
            with pytest.raises(InvalidOptionError, match="timeout"):
                engine.score([4, 5], timeout=timeout)


def test_embeddings_of_several_texts_beside_generation(engine: Engine) -> None:
    greedy = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    alone = engine.generate("Hello", greedy).tokens
    stream = engine.stream("Hello", greedy)
    texts = ["one", "another text", "a third and longer one"] * 3
    together = engine.embed(texts)
    assert isinstance(together, np.ndarray)
    assert together.shape == (9, engine.model.embedding_length)
    for text, row in zip(texts, together, strict=True):
        assert engine.embed(text) == pytest.approx(row, abs=1e-4)
    assert [len(rows) for rows in engine.embed(["a", "bc"], pooling="none")] == [len(engine.model.tokenize(text)) for text in ("a", "bc")]
    no_texts: list[str] = []
    assert engine.embed(no_texts).shape == (0, engine.model.embedding_length)
    assert stream.read_all().tokens == alone


def test_what_cannot_be_scored_or_embedded_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidOptionError, match="two tokens"):
        engine.score([7])
    with pytest.raises(ContextFullError, match="300 tokens"):
        engine.score([7] * 300)
    with pytest.raises(InvalidOptionError, match="pooling is 'max'"):
        engine.embed("a", pooling="max")  # type: ignore[call-overload]
    with pytest.raises(InvalidOptionError, match="empty"):
        engine.embed([[1], []])
