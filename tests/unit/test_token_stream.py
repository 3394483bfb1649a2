from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import cast

import pytest

from llama_moe import Token, TokenStream, _core
from llama_moe.errors import DecodeError, LlamaMoeError

Entry = tuple[int, str, float | None, list[tuple[int, str, float]] | None]


class Generation:
    """Gives what a native generation would: some tokens at a time, then the end, alone or with the last of them."""

    def __init__(self, *steps: Entry | BaseException, finish_reason: str = "stop", at_once: int = 1, end_comes_alone: bool = True) -> None:
        self.steps: list[Entry | BaseException] = list(steps)
        self.finish_reason = finish_reason
        self.at_once = at_once
        self.end_comes_alone = end_comes_alone
        self.cancelled = False

    def take(self, wait: bool) -> tuple[list[Entry], bool]:
        assert wait
        if self.cancelled or not self.steps:
            return [], True
        entries: list[Entry] = []
        while self.steps and len(entries) < self.at_once:
            if isinstance(self.steps[0], BaseException):
                break
            entries.append(cast("Entry", self.steps.pop(0)))
        if not entries:
            raise cast("BaseException", self.steps.pop(0))
        return entries, not (self.steps or self.end_comes_alone)

    def cancel(self) -> None:
        self.cancelled = True

    def result(self) -> SimpleNamespace:
        return SimpleNamespace(
            finish_reason=self.finish_reason,
            prompt_tokens=5,
            cached_tokens=1,
            completion_tokens=3,
            queue_seconds=0.5,
            prompt_seconds=2.0,
            decode_seconds=0.25,
            time_to_first_token=2.5,
        )


def stream_of(generation: Generation, *, logprobs: bool = False) -> TokenStream:
    return TokenStream(cast("_core.Generation", generation), logprobs=logprobs)


def entries(*texts: str) -> Iterable[Entry]:
    return [(number, text, None, None) for number, text in enumerate(texts)]


@pytest.mark.parametrize("end_comes_alone", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 3, 10])
def test_the_completion_is_what_was_streamed(at_once: int, end_comes_alone: bool) -> None:
    stream = stream_of(Generation(*entries("Hel", "", "lo"), finish_reason="length", at_once=at_once, end_comes_alone=end_comes_alone))
    assert "".join(map(str, stream)) == "Hello"
    completion = stream.completion
    assert str(completion) == completion.text == "Hello"
    assert completion.tokens == (0, 1, 2)
    assert completion.finish_reason == "length"
    assert (completion.prompt_tokens, completion.cached_tokens) == (5, 1)
    assert completion.logprobs is None
    assert completion.timings.prompt_tokens_per_second == 4 / 2.0
    assert completion.timings.decode_tokens_per_second == 2 / 0.25
    assert list(stream) == []


def test_log_probabilities_come_with_their_tokens() -> None:
    stream = stream_of(Generation((7, "a", -0.5, [(7, "a", -0.5), (8, "b", -1.5)])), logprobs=True)
    token = next(stream)
    assert token == Token(7, "a", -0.5, (Token(7, "a", -0.5), Token(8, "b", -1.5)))
    assert stream.read_all().logprobs == (token,)


def test_there_is_no_completion_before_the_end() -> None:
    stream = stream_of(Generation(*entries("a", "b")))
    next(stream)
    with pytest.raises(LlamaMoeError, match="no completion yet"):
        _ = stream.completion


def test_closing_cancels_and_keeps_what_was_read() -> None:
    generation = Generation(*entries("a", "b", "c"))
    with stream_of(generation) as stream:
        next(stream)
    assert generation.cancelled
    assert stream.completion.text == "a"
    assert stream.completion.finish_reason == "cancelled"
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("end_comes_alone", [True, False])
def test_tokens_that_came_but_were_not_read_are_not_read_after_a_cancel(end_comes_alone: bool) -> None:
    stream = stream_of(Generation(*entries("a", "b", "c"), at_once=3, end_comes_alone=end_comes_alone))
    next(stream)
    stream.cancel()
    assert list(stream) == []
    assert (stream.completion.text, stream.completion.finish_reason) == ("a", "cancelled")


def test_a_failure_comes_after_the_tokens_before_it() -> None:
    stream = stream_of(Generation(*entries("a", "b"), DecodeError("no memory"), at_once=5))
    assert [str(next(stream)), str(next(stream))] == ["a", "b"]
    with pytest.raises(DecodeError, match="no memory"):
        next(stream)


def test_closing_after_the_end_changes_nothing() -> None:
    generation = Generation(*entries("a"))
    stream = stream_of(generation)
    completion = stream.read_all()
    stream.close()
    assert not generation.cancelled
    assert stream.completion is completion
    assert completion.finish_reason == "stop"


def test_an_interrupted_wait_cancels() -> None:
    generation = Generation(*entries("a"), KeyboardInterrupt(), *entries("b"))
    stream = stream_of(generation)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert generation.cancelled
    assert list(stream) == []
    assert stream.completion.text == "a"
    assert stream.completion.finish_reason == "cancelled"


def test_a_failure_ends_the_stream_without_a_completion() -> None:
    stream = stream_of(Generation(*entries("a"), DecodeError("no memory")))
    next(stream)
    with pytest.raises(DecodeError, match="no memory"):
        next(stream)
    assert list(stream) == []
    stream.close()
    with pytest.raises(LlamaMoeError, match="the generation failed: DecodeError: no memory"):
        _ = stream.completion


def test_a_token_prints_as_its_text() -> None:
    token = Token(3, " word")
    assert f"{token}" == str(token) == " word"


def test_repr_says_how_far_it_is() -> None:
    stream = stream_of(Generation(*entries("a", "b")))
    next(stream)
    assert repr(stream) == "<TokenStream running, 1 tokens read>"
    stream.close()
    assert repr(stream) == "<TokenStream cancelled, 1 tokens read>"
