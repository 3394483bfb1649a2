"""`/v1/embeddings`: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Literal

import numpy as np  # by the first request for embeddings it would be imported while all others wait
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from .chat import check_prompt
from .errors import ERROR_RESPONSES, ApiError
from .state import State
from .streaming import unless_gone
from .tokens import PromptInput, each_prompt, prompt_ids

if TYPE_CHECKING:
    import numpy.typing as npt

router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

MAX_INPUTS = 2048


class EmbeddingsRequest(BaseModel):
    """Texts to embed."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    input: PromptInput = Field(description=f"A text, token ids, or a list of either, up to {MAX_INPUTS}.")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description='"base64": of little-endian float32; "float", if not given: a list of numbers.'
    )
    dimensions: int | None = Field(default=None, ge=1, description="Only the model's own number is possible.")
    pooling: Literal["mean", "last", "cls"] | None = Field(
        default=None, description='What becomes of a text\'s tokens; "mean" if not given.'
    )


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Of length 1.")


class EmbeddingsUsage(BaseModel):
    """How many tokens the texts had."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


@router.post("/v1/embeddings", response_model=EmbeddingsReply)
async def embeddings(body: EmbeddingsRequest, request: Request, state: State) -> Response:
    """Computes the embeddings of texts: the model's last hidden states, pooled and scaled to length 1."""
    inputs = each_prompt(body.input)
    if len(inputs) > MAX_INPUTS:
        raise ApiError(400, f"input has {len(inputs)} texts; there can be up to {MAX_INPUTS}", param="input")
    async with state.pool.use(body.model) as served:
        width = served.model.embedding_length
        if body.dimensions not in (None, width):
            raise ApiError(400, f"dimensions is {body.dimensions}; the embeddings of {served.name!r} have {width}", param="dimensions")
        texts = await prompt_ids(served.engine, inputs)
        for text in texts:
            check_prompt(len(text), state.settings)
        work = served.engine.aembed(texts, pooling=body.pooling or "mean", timeout=state.settings.timeout)
        vectors = await unless_gone(request, work)
    as_text = body.encoding_format == "base64"
    reply = await asyncio.to_thread(_reply, served.name, vectors, sum(map(len, texts)), as_text=as_text)
    return Response(reply, media_type="application/json")


def _reply(model: str, vectors: npt.NDArray[np.float32], tokens: int, *, as_text: bool) -> bytes:
    """An `EmbeddingsReply` as JSON. Each vector becomes text by itself: nothing else could run while all of them do."""
    rows = (
        Embedding(index=index, embedding=base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist())
        for index, row in enumerate(vectors)
    )
    empty = EmbeddingsReply(data=[], model=model, usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens))
    data = ",".join(row.model_dump_json() for row in rows)
    return empty.model_dump_json().replace('"data":[]', f'"data":[{data}]', 1).encode()
