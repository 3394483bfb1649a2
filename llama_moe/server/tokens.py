"""`/tokenize` and `/detokenize`: texts as tokens and back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, TypeAlias
from weakref import WeakKeyDictionary

from fastapi import APIRouter, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from llama_moe.errors import ContextFullError

from .bodies import Items
from .errors import ERROR_RESPONSES, ApiError
from .state import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llama_moe import Engine, Model

router = APIRouter(tags=["tokens"], responses=ERROR_RESPONSES)

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[Items[TokenId], Field(min_length=1)]


def _kind_of_prompt(value: object) -> str:
    if isinstance(value, str):
        return "text"
    match value[0] if isinstance(value, list) and value else None:
        case str():
            return "texts"
        case list():
            return "lists"
    return "ids"


# By the first item alone: to try each of them with a million ids takes long.
PromptInput: TypeAlias = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Items[str], Field(min_length=1), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[Items[TokenIds], Field(min_length=1), Tag("lists")],
    Discriminator(_kind_of_prompt),
]
"""A text, token ids, or several of either."""


def each_prompt(prompt: PromptInput) -> list[str | list[int]]:
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
        least = sum(len(word) for piece in _pieces(text) for word in piece.split()) // _longest_token(engine.model)
        if least > engine.context_size:
            raise ContextFullError(f"the prompt has more than {least} tokens; the context holds {engine.context_size} for each sequence")
    return engine.model.tokenize(text, parse_special=True)


# Hardly any text has more characters for each token.
_USUAL_CHARACTERS = 16
_PIECE_CHARACTERS = 1 << 16
_longest: WeakKeyDictionary[Model, int] = WeakKeyDictionary()


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces, between which other threads may run."""
    for begin in range(0, len(text), _PIECE_CHARACTERS):
        yield text[begin : begin + _PIECE_CHARACTERS]


def _longest_token(model: Model) -> int:
    """Bytes of the longest token, control tokens by their names."""
    if model not in _longest:
        _longest[model] = max(len(model.detokenize([token], special=True).encode()) for token in range(model.vocab_size))
    return _longest[model]


async def prompt_ids(engine: Engine, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """The token ids of each of the prompts. The event loop goes on meanwhile.

    Raises:
        ApiError: a prompt is empty, and the model adds nothing around it.
        ContextFullError: a prompt is longer than the context.
    """

    def work() -> list[list[int]]:
        return [prompt_tokens(engine, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    found = await asyncio.to_thread(work)
    if not all(found):
        raise ApiError(400, "a prompt is empty; give at least one token")
    longest = max(map(len, found))
    if longest > engine.context_size:  # the engine would say so, when it has copied all of it
        raise ContextFullError(f"the prompt has {longest} tokens; the context holds {engine.context_size} for each sequence")
    return found


MAX_TEXT_BYTES = 4 << 20
"""Longest text for `/tokenize`: its tokens take many times as much."""


class TokenizeRequest(BaseModel):
    """A text."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    content: str = Field(description=f"The text, of up to {MAX_TEXT_BYTES} bytes.")
    add_special: bool = Field(default=False, description="Add the tokens that the model expects around a text.")
    parse_special: bool = Field(default=True, description='Read text such as "<|im_start|>" as the control token it names.')


class Tokens(BaseModel):
    """The tokens of a text."""

    tokens: list[int] = Field(description="Their ids.")


class DetokenizeRequest(BaseModel):
    """Tokens."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    tokens: Items[TokenId] = Field(description="Their ids.")
    special: bool = Field(default=False, description="Write control tokens as their names, which are otherwise left out.")


class Content(BaseModel):
    """The text of tokens."""

    content: str = Field(description="Bytes that are not UTF-8 are U+FFFD.")


@router.post("/tokenize", response_model=Tokens)
async def tokenize(body: TokenizeRequest, state: State) -> Response:
    """Gives the tokens of a text."""
    size = len(body.content.encode())  # there may be a token for each byte
    if size > MAX_TEXT_BYTES:
        raise ApiError(400, f"content has {size} bytes; there can be up to {MAX_TEXT_BYTES}", param="content")
    async with state.pool.use(body.model) as served:

        def work() -> bytes:
            ids = served.model.tokenize(body.content, add_special=body.add_special, parse_special=body.parse_special)
            return Tokens(tokens=ids).model_dump_json().encode()

        return Response(await asyncio.to_thread(work), media_type="application/json")


@router.post("/detokenize", response_model=Content)
async def detokenize(body: DetokenizeRequest, state: State) -> Response:
    """Gives the text of tokens."""
    async with state.pool.use(body.model) as served:
        size = served.model.vocab_size
        largest = max(body.tokens, default=0)
        if largest >= size:
            raise ApiError(400, f"the token id {largest} is outside of the vocabulary, which has {size} tokens", param="tokens")

        def work() -> bytes:
            return Content(content=served.model.detokenize(body.tokens, special=body.special)).model_dump_json().encode()

        return Response(await asyncio.to_thread(work), media_type="application/json")
