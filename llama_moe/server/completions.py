"""`/v1/completions`: texts to go on with."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from llama_moe.aio import open_stream

from .chat import check_prompt
from .errors import ERROR_RESPONSES, ApiError
from .results import Usage, finite, new_id, now, token_text, usage_of
from .sampling import MAX_TOP_LOGPROBS, SamplingFields, check_choices, sampling_params, wants_usage, with_seed
from .state import ServerState, State
from .streaming import DONE, StreamResponse, json_event, merged, read_all, unless_gone
from .tokens import PromptInput, each_prompt, prompt_ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sse_starlette import ServerSentEvent

    from llama_moe import AsyncTokenStream, Completion, Token

    from .pool import ServedModel

router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

DEFAULT_MAX_TOKENS = 16  # the OpenAI API's


class CompletionRequest(SamplingFields):
    """A text to go on with."""

    model: str | None = Field(default=None, description="Which model; may be left out where there is one only.")
    prompt: PromptInput = Field(description="A text, token ids, or a list of either.")
    max_tokens: int | None = Field(default=None, ge=1, description=f"Most tokens of a completion; {DEFAULT_MAX_TOKENS} if not given.")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Give the log-probability of each token, and of this many alternatives."
    )
    best_of: int | None = Field(default=None, ge=1, description="Must be `n`, if given.")
    echo: bool | None = Field(default=None, description="Not supported.")
    suffix: str | None = Field(default=None, description="Not supported.")


class CompletionLogprobs(BaseModel):
    """The log-probabilities of the tokens of a completion."""

    tokens: list[str] = Field(description="Their texts; U+FFFD for bytes that are no whole character.")
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(description="The most likely tokens in the place of each.")
    text_offset: list[int] = Field(description="Where the text of each begins, in characters.")


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """One of the completions asked for, or what it gained."""

    index: int = Field(description="The first prompt's are the first ones.")
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(description="Null until it has ended.")


class CompletionReply(BaseModel):
    """The completions of the prompts; also an event of those that are streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, description="Null in events but the last one, if it was asked for.")


@router.post(
    "/v1/completions",
    response_model=CompletionReply,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The completions; with `stream`, events of the same shape."}},
)
async def completions(body: CompletionRequest, request: Request, state: State) -> Response:
    """Goes on with texts, as they are: no chat template is used."""
    _check_supported(body)
    include_usage = wants_usage(body)
    choices = body.n or 1
    texts = each_prompt(body.prompt)
    check_choices(choices * len(texts), state.settings)
    params = await asyncio.to_thread(  # schemas are compiled in there
        sampling_params,
        body,
        state.settings,
        max_tokens=min(DEFAULT_MAX_TOKENS, state.settings.max_tokens or DEFAULT_MAX_TOKENS) if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
    )
    async with AsyncExitStack() as held:
        served = await held.enter_async_context(state.pool.use(body.model))
        prompts = await prompt_ids(served.engine, texts)
        for prompt in prompts:
            check_prompt(len(prompt), state.settings)
        streams: list[AsyncTokenStream] = []
        for prompt in prompts:
            for index in range(choices):
                stream = await open_stream(served.engine, (prompt, with_seed(params, index)._to_native()), state.settings.timeout)
                held.push_async_callback(stream.aclose)
                streams.append(stream)
        if body.stream:
            events = _events(state, served, streams, choices, include_usage=include_usage)
            return StreamResponse(events, request=request, state=state, held=held.pop_all())
        finished = await unless_gone(request, read_all(streams))
        state.completed(served, *finished)
        reply = CompletionReply(
            id=new_id("cmpl"),
            created=now(),
            model=served.name,
            choices=[_choice(served, index, completion) for index, completion in enumerate(finished)],
            usage=usage_of(finished[::choices], finished),
        )
    return Response(reply.model_dump_json(), media_type="application/json")


def _check_supported(body: CompletionRequest) -> None:
    if body.echo:
        raise ApiError(400, "echo is not supported; the prompt is not given back", param="echo")
    if body.suffix:
        raise ApiError(400, "suffix is not supported; a text can only be continued", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; only the value of n, which is {body.n or 1}, is supported", param="best_of")


def _choice(served: ServedModel, index: int, completion: Completion) -> CompletionChoice:
    return CompletionChoice(
        index=index,
        text=completion.text,
        logprobs=None if completion.logprobs is None else _logprobs(served, completion.logprobs, 0),
        finish_reason=completion.finish_reason,  # type: ignore[arg-type]  # completed() has seen it
    )


def _logprobs(served: ServedModel, tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
    """Those of tokens whose text begins at `offset`."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return CompletionLogprobs(
        tokens=[token_text(served.model, token) for token in tokens],
        token_logprobs=[finite(token.logprob) for token in tokens],
        top_logprobs=[{token_text(served.model, each): finite(each.logprob) for each in token.top_logprobs or ()} for token in tokens],
        text_offset=offsets,
    )


async def _events(
    state: ServerState, served: ServedModel, streams: Sequence[AsyncTokenStream], choices: int, *, include_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    reply, created = new_id("cmpl"), now()

    def event(parts: list[CompletionChoice], usage: Usage | None = None) -> ServerSentEvent:
        chunk = CompletionReply(id=reply, object="text_completion", created=created, model=served.name, choices=parts, usage=usage)
        return json_event(chunk)

    async for _, part in merged([_parts(state, served, index, stream) for index, stream in enumerate(streams)]):
        yield event([part])
    if include_usage:
        finished = [stream.completion for stream in streams]
        yield event([], usage_of(finished[::choices], finished))
    yield DONE


async def _parts(state: ServerState, served: ServedModel, index: int, stream: AsyncTokenStream) -> AsyncIterator[CompletionChoice]:
    """What one completion gains, up to the part that says how it ended."""
    offset = 0
    async for token in stream:
        if not token.text and not stream.logprobs:
            continue
        logprobs = _logprobs(served, [token], offset) if stream.logprobs else None
        offset += len(token.text)
        yield CompletionChoice(index=index, text=token.text, logprobs=logprobs, finish_reason=None)
    state.completed(served, stream.completion)
    reason: FinishReason = stream.completion.finish_reason  # type: ignore[assignment]  # not "cancelled"
    yield CompletionChoice(index=index, text="", logprobs=None, finish_reason=reason)
