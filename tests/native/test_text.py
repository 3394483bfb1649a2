"""Text as it comes out of an engine, whatever tokens it is made of: any Unicode, cut at the right place by any stop strings.

A grammar that is one literal makes the model say it; its vocabulary has a token for every byte and some for words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama_moe import Engine, Model, SamplingParams, Token

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# A grammar's text has no NUL: it would end it.
characters = st.characters(codec="utf-8", exclude_characters="\0")
few = st.sampled_from("abé🦙 \n")  # so that stop strings are found, and overlap
texts = st.one_of(st.text(characters, min_size=1, max_size=24), st.text(few, min_size=1, max_size=24))


@st.composite
def texts_with_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(texts)
    begin = st.integers(0, len(text) - 1)
    parts = begin.flatmap(lambda at: st.integers(at + 1, len(text)).map(lambda end: text[at:end]))
    # What the text only begins with, or nearly has.
    nearly = st.tuples(parts, few).map("".join)
    return text, draw(st.lists(st.one_of(parts, nearly, st.text(few, min_size=1, max_size=4)), max_size=4))


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, context_size=512, max_sequences=2, threads=1) as engine:
        yield engine


def grammar_of(text: str) -> str:
    escaped = "".join(f"\\U{ord(character):08X}" for character in text)
    return f'root ::= "{escaped}"'


def say(engine: Engine, text: str, *, seed: int, stop: Sequence[str] = (), **options: Any) -> tuple[list[Token], str]:
    """The tokens that come when a model says exactly `text`, and why it ended."""
    params = SamplingParams(grammar=grammar_of(text), seed=seed, temperature=2.0, top_k=0, top_p=1, min_p=0, stop=stop, **options)
    with engine.stream([1, 30], params) as stream:
        tokens = list(stream)
    completion = stream.completion
    assert "".join(map(str, tokens)) == completion.text
    assert tuple(token.id for token in tokens) == completion.tokens
    return tokens, completion.finish_reason


def cut(text: str, stops: Sequence[str]) -> str:
    """What is before the stop string that is complete first; of those complete at once, before the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@PROPERTY
@given(text=texts, seed=st.integers(0, 9))
@example(text="\U0010ffff\ud7ff\ue000é🦙", seed=0)
def test_any_text_comes_whole(engine: Engine, text: str, seed: int) -> None:
    tokens, reason = say(engine, text, seed=seed)
    assert ("".join(map(str, tokens)), reason) == (text, "stop")
    shown = ""
    for token in tokens:
        assert "\ufffd" not in token.text or "\ufffd" in text  # no half of a character
        shown += token.text
        assert text.startswith(shown)


@PROPERTY
@given(text_and_stops=texts_with_stops(), seed=st.integers(0, 9), with_logprobs=st.booleans())
@example(text_and_stops=("xabc", ["abc", "b"]), seed=0, with_logprobs=False)
@example(text_and_stops=("xabc", ["bc", "abc"]), seed=0, with_logprobs=True)
@example(text_and_stops=("aaab", ["aab"]), seed=1, with_logprobs=False)
@example(text_and_stops=("🦙é", ["é"]), seed=1, with_logprobs=False)
def test_the_stop_string_that_is_complete_first_ends_the_text(
    engine: Engine, text_and_stops: tuple[str, list[str]], seed: int, with_logprobs: bool
) -> None:
    text, stops = text_and_stops
    tokens, reason = say(engine, text, seed=seed, stop=stops, **({"logprobs": 1} if with_logprobs else {}))
    expected = cut(text, stops)
    shown = ""
    for token in tokens:
        shown += token.text
        assert expected.startswith(shown), "part of a stop string was shown"
    assert (shown, reason) == (expected, "stop")


@PROPERTY
@given(text=texts, limit=st.integers(1, 12))
def test_a_text_that_is_cut_off_ends_with_a_whole_character(engine: Engine, text: str, limit: int) -> None:
    """Bytes of a character that does not end are shown as one replacement character."""
    tokens, reason = say(engine, text, seed=limit, max_tokens=limit)
    shown = "".join(map(str, tokens))
    if reason == "stop":
        assert shown == text
    else:
        assert len(tokens) == limit
        assert text.startswith(shown) or (shown.endswith("\ufffd") and text.startswith(shown[:-1].rstrip("\ufffd")))
