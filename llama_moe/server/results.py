"""What all of OpenAI's endpoints tell of generations: their usage and their log-probabilities."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llama_moe import ChatCompletion, Completion, Model, Token


class PromptDetails(BaseModel):
    """Of the tokens of prompts."""

    cached_tokens: int = Field(description="How many were not computed again.")


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(BaseModel):
    """A token that was likely in a place."""

    token: str = Field(description="Its text; U+FFFD for bytes that are no whole character.")
    logprob: float = Field(description="Natural logarithm of its probability before sampling.")
    bytes: list[int] = Field(description="Its bytes.")


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob] = Field(description="The most likely tokens in its place, best first.")


def usage_of(prompts: Iterable[Completion | ChatCompletion], completions: Sequence[Completion | ChatCompletion]) -> Usage:
    """The tokens of a request.

    Args:
        prompts: one completion of each prompt, which is counted once however many completions it has.
        completions: all of them.
    """
    prompt, cached = 0, 0
    for each in prompts:
        prompt += each.prompt_tokens
        cached += each.cached_tokens
    generated = sum(len(each.tokens) for each in completions)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
    )


def token_logprobs(model: Model, tokens: Iterable[Token]) -> list[TokenLogprob]:
    """The log-probabilities of tokens, as chats have them."""
    return [
        TokenLogprob(**_fields(model, token), top_logprobs=[TopLogprob(**_fields(model, each)) for each in token.top_logprobs or ()])
        for token in tokens
    ]


def _fields(model: Model, token: Token) -> dict[str, Any]:
    data = model.token_bytes(token.id)
    return {"token": data.decode(errors="replace"), "logprob": finite(token.logprob), "bytes": list(data)}


def token_text(model: Model, token: Token) -> str:
    """The text of a token by itself; U+FFFD for bytes that are no whole character."""
    return model.token_bytes(token.id).decode(errors="replace")


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can have; of a token without any probability the lowest that OpenAI gives."""
    return _LOWEST if logprob is None else max(logprob, _LOWEST)


_LOWEST = -9999.0


def new_id(kind: str) -> str:
    """The id of a new answer of a kind such as "chatcmpl"."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
