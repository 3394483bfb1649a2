"""`/tokenize` and `/detokenize`: texts as tokens and back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, TypeAlias
from weakref import WeakKeyDictionary

from fastapi import APIRouter
from pydantic import BaseModel, Field

from llama_moe.errors import ContextFullError

from .errors import ERROR_RESPONSES, ApiError
from .state import State

if TYPE_CHECKING:
    from llama_moe import Engine, Model

router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES)

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
PromptInput: TypeAlias = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)
"""A text, token ids, or several of either."""


def _each(prompt: PromptInput) -> list[str | list[int]]:
    """Each of the prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]  # then all are
    return list(prompt)


def prompt_tokens(engine: Engine, text: str) -> list[int]:
    """The tokens of a prompt. Of one that no context could hold that is said at once: finding all of them may take a minute.

    Raises:
        ContextFullError: it is such a text.
    """
    if len(text) > _USUAL_CHARACTERS * engine.context_size:
        # Vocabularies may make one of many spaces.
        least = sum(map(len, text.split())) // _longest_token(engine.model)
        if least > engine.context_size:
            raise ContextFullError(f"the prompt has more than {least} tokens; the context holds {engine.context_size} for each sequence")
    return engine.model.tokenize(text, parse_special=True)


# Hardly any text has more characters for each token.
_USUAL_CHARACTERS = 16
_longest: WeakKeyDictionary[Model, int] = WeakKeyDictionary()


def _longest_token(model: Model) -> int:
    """Bytes of the longest token, control tokens by their names."""
    if model not in _longest:
        _longest[model] = max(len(model.detokenize([token], special=True).encode()) for token in range(model.vocab_size))
    return _longest[model]


async def prompt_ids(engine: Engine, prompts: PromptInput) -> list[list[int]]:
    """The token ids of each of the prompts. The event loop goes on meanwhile.

    Raises:
        ApiError: a prompt is empty, and the model adds nothing around it.
        ContextFullError: a prompt is far too long.
    """

    def work() -> list[list[int]]:
        return [prompt_tokens(engine, prompt) if isinstance(prompt, str) else prompt for prompt in _each(prompts)]

    found = await asyncio.to_thread(work)
    if not all(found):
        raise ApiError(400, "a prompt is empty; give at least one token")
    return found


class TokenizeRequest(BaseModel):
    """A text."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    content: str = Field(description="The text.")
    add_special: bool = Field(default=False, description="Add the tokens that the model expects around a text.")
    parse_special: bool = Field(default=True, description='Read text such as "<|im_start|>" as the control token it names.')


class Tokens(BaseModel):
    """The tokens of a text."""

    tokens: list[int] = Field(description="Their ids.")


class DetokenizeRequest(BaseModel):
    """Tokens."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    tokens: list[TokenId] = Field(description="Their ids.")
    special: bool = Field(default=False, description="Write control tokens as their names, which are otherwise left out.")


class Content(BaseModel):
    """The text of tokens."""

    content: str = Field(description="Bytes that are not UTF-8 are U+FFFD.")


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> Tokens:
    """Gives the tokens of a text."""
    async with state.pool.use(body.model) as served:
        work = served.model.tokenize
        return Tokens(tokens=await asyncio.to_thread(work, body.content, add_special=body.add_special, parse_special=body.parse_special))


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> Content:
    """Gives the text of tokens."""
    async with state.pool.use(body.model) as served:
        size = served.model.vocab_size
        for token in body.tokens:
            if token >= size:
                raise ApiError(400, f"the token id {token} is outside of the vocabulary, which has {size} tokens", param="tokens")
        return Content(content=await asyncio.to_thread(served.model.detokenize, body.tokens, special=body.special))
