"""`/v1/messages`: Anthropic's Messages API."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from .chat import ChatCall
from .errors import register_shape
from .messages_events import MessageBuilder
from .messages_input import chat_messages, effort, offered_tools, response_format, thinks
from .messages_models import CountRequest, Message, MessageRequest, MessagesErrorBody, TokenCount
from .sampling import sampling_params
from .state import ServerState, State
from .streaming import StreamResponse, json_event, read_to_end, unless_gone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sse_starlette import ServerSentEvent

    from llama_moe import AsyncChatStream

    from .errors import ApiError
    from .messages_events import Event
    from .pool import ServedModel
    from .settings import ServerSettings

PATH = "/v1/messages"

router = APIRouter(
    tags=["Anthropic"],
    responses={
        "4XX": {"model": MessagesErrorBody, "description": "The request is wrong, or not allowed."},
        "5XX": {"model": MessagesErrorBody, "description": "The request could not be answered; with `Retry-After` it may be later."},
    },
)

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_shape(error: ApiError) -> dict[str, Any]:
    """The body of an error, as Anthropic's API has it."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


register_shape(PATH, error_shape)


def chat_call(request: CountRequest, settings: ServerSettings) -> ChatCall:
    """The request in the engine's terms, all but its stop sequences, which are looked for in the text of the answer only.

    Raises:
        ApiError: it is no conversation, or above the server's limits.
    """
    tools, tool_choice, parallel = offered_tools(request)
    messages = chat_messages(request)
    max_tokens = request.max_tokens if isinstance(request, MessageRequest) else None
    thinking, how_much = thinks(request), effort(request)
    return ChatCall(
        messages=messages,
        params=sampling_params(request, settings, max_tokens=max_tokens, logprobs=None),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel,
        response_format=response_format(request),
        enable_thinking=thinking,
        template_options={"reasoning_effort": how_much} if how_much else {},
        continue_final_message=messages[-1]["role"] == "assistant",
    )


@router.post(
    PATH,
    response_model=Message,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, the events of its making."}},
)
async def create_message(body: MessageRequest, request: Request, state: State) -> Response:
    """Answers a conversation. If the assistant has the last message, the answer goes on with it."""
    call = await asyncio.to_thread(chat_call, body, state.settings)  # schemas are compiled in there
    async with AsyncExitStack() as held:
        served = await held.enter_async_context(state.pool.use(body.model))
        prompt_tokens, (stream,) = await call.start(served, state.settings)
        held.push_async_callback(stream.aclose)
        builder = MessageBuilder(served.name, prompt_tokens=prompt_tokens, stops=body.stop_sequences or ())
        events = _events(state, served, stream, builder, body.max_tokens)
        if body.stream:
            return StreamResponse(_sent(events), request=request, state=state, held=held.pop_all())
        await unless_gone(request, read_to_end(events))
    return Response(builder.message.model_dump_json(), media_type="application/json")


@router.post(f"{PATH}/count_tokens")
async def count_tokens(body: CountRequest, state: State) -> TokenCount:
    """Counts the tokens of the prompt that a request for a message would have. Nothing is generated."""
    call = await asyncio.to_thread(chat_call, body, state.settings)  # schemas are compiled in there
    async with AsyncExitStack() as held:
        served = await held.enter_async_context(state.pool.use(body.model))
        return TokenCount(input_tokens=await call.count(served))


async def _events(
    state: ServerState, served: ServedModel, stream: AsyncChatStream, builder: MessageBuilder, max_tokens: int
) -> AsyncIterator[Event]:
    for event in builder.begin():
        yield event
    async for delta in stream:
        for event in builder.add(delta):
            yield event
        if builder.stopped:
            await stream.aclose()
            break
    completion = stream.completion
    if builder.stopped:
        completion = replace(completion, finish_reason="stop")
    state.completed(served, completion)
    for event in builder.finish(completion, max_tokens=max_tokens):
        yield event


async def _sent(events: AsyncIterator[Event]) -> AsyncIterator[ServerSentEvent]:
    async for event in events:
        yield json_event(event, event=event["type"])
