"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

if TYPE_CHECKING:
    from . import _core

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One generated token; `str()` of it is its text.

    Attributes:
        id: the token's number in the vocabulary.
        text: what it adds to the text. May be empty: a character of several tokens comes with the last of them, and text that may be the
            start of a stop string is held back until that is known.
        logprob: natural logarithm of its probability before sampling; None unless `SamplingParams.logprobs` asked for it.
        top_logprobs: the most likely tokens in its place, best first; None unless asked for.
    """

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[Token, ...] | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds.

    Attributes:
        queue_seconds: waiting for room in a batch.
        prompt_seconds: computing the prompt, up to the first token.
        decode_seconds: from the first token to the end.
        time_to_first_token: from submission to the first token.
        prompt_tokens_per_second: prompt tokens that were computed, by `prompt_seconds`; 0 when there is nothing to tell.
        decode_tokens_per_second: tokens after the first by `decode_seconds`; 0 when there is nothing to tell.
    """

    queue_seconds: float
    prompt_seconds: float
    decode_seconds: float
    time_to_first_token: float
    prompt_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation; `str()` of it is its text.

    Attributes:
        text: the generated text, without the prompt and without a stop string.
        tokens: ids of the generated tokens.
        finish_reason: "stop": the model ended or a stop string appeared; "length": `max_tokens` or the context's end was reached;
            "cancelled": its stream or its engine was closed first.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of those were not computed again.
        logprobs: the generated tokens with their log-probabilities; None unless `SamplingParams.logprobs` asked for them.
        timings: where its time went.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[Token, ...] | None
    timings: Timings

    def __str__(self) -> str:
        return self.text


def rate(count: int, seconds: float) -> float:
    """Things per second; 0 when there is nothing to tell."""
    return count / seconds if count > 0 and seconds > 0 else 0.0


def make_completion(tokens: list[Token], result: _core.GenerationResult, *, cancelled: bool, logprobs: bool) -> Completion:
    """The completion of the tokens that were taken from a generation, with their log-probabilities if it was asked for those."""
    return Completion(
        text="".join(token.text for token in tokens),
        tokens=tuple(token.id for token in tokens),
        finish_reason="cancelled" if cancelled else cast("FinishReason", result.finish_reason),
        prompt_tokens=result.prompt_tokens,
        cached_tokens=result.cached_tokens,
        logprobs=tuple(tokens) if logprobs else None,
        timings=Timings(
            queue_seconds=result.queue_seconds,
            prompt_seconds=result.prompt_seconds,
            decode_seconds=result.decode_seconds,
            time_to_first_token=result.time_to_first_token,
            prompt_tokens_per_second=rate(result.prompt_tokens - result.cached_tokens, result.prompt_seconds),
            decode_tokens_per_second=rate(result.completion_tokens - 1, result.decode_seconds),
        ),
    )
