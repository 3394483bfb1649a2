"""`/v1/responses`: OpenAI's Responses API, without a memory: every request has the whole conversation."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi import Response as HttpResponse

from .chat import ChatCall
from .errors import ERROR_RESPONSES, as_api_error
from .responses_events import ResponseBuilder, new_id
from .responses_input import chat_messages, check_supported, offered_tools, response_format
from .responses_models import Reasoning, Response, ResponseRequest, TextConfig, TextFormat
from .results import now
from .sampling import sampling_params
from .state import ServerState, State
from .streaming import StreamResponse, json_event, read_to_end, unless_gone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sse_starlette import ServerSentEvent

    from llama_moe import AsyncChatStream

    from .pool import ServedModel
    from .responses_events import Event
    from .settings import ServerSettings

router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

_WITH_LOGPROBS = "message.output_text.logprobs"


def chat_call(request: ResponseRequest, settings: ServerSettings) -> ChatCall:
    """The request in the engine's terms.

    Raises:
        ApiError: it asks for what this server does not do, or is above its limits.
    """
    check_supported(request)
    tools, tool_choice = offered_tools(request)
    effort = request.reasoning.effort if request.reasoning else None
    thinks = effort not in ("none", "minimal")
    logprobs = request.top_logprobs
    if logprobs is None and _WITH_LOGPROBS in (request.include or ()):
        logprobs = 0
    return ChatCall(
        messages=chat_messages(request),
        params=sampling_params(request, settings, max_tokens=request.max_output_tokens, logprobs=logprobs),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=response_format(request),
        enable_thinking=thinks,
        template_options={"reasoning_effort": effort} if effort and thinks else {},
        continue_final_message=bool(request.continue_final_message),
    )


@router.post(
    "/v1/responses",
    response_model=Response,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The response; with `stream`, the events of its making."}},
)
async def create_response(body: ResponseRequest, request: Request, state: State) -> HttpResponse:
    """Answers a conversation. Nothing is stored: the next request has to send all of it again."""
    call = await asyncio.to_thread(chat_call, body, state.settings)  # schemas are compiled in there
    async with AsyncExitStack() as held:
        served = await held.enter_async_context(state.pool.use(body.model))
        _, (stream,) = await call.start(served, state.settings)
        held.push_async_callback(stream.aclose)
        builder = ResponseBuilder(_begun(body, call, served), served.model)
        events = _events(state, served, stream, builder)
        if body.stream:
            return StreamResponse(_sent(events, builder), request=request, state=state, held=held.pop_all())
        await unless_gone(request, read_to_end(events))
    return HttpResponse(builder.response.model_dump_json(by_alias=True), media_type="application/json")


async def _events(state: ServerState, served: ServedModel, stream: AsyncChatStream, builder: ResponseBuilder) -> AsyncIterator[Event]:
    for event in builder.begin():
        yield event
    told = 0
    async for delta in stream:
        tokens = stream.tokens[told:]
        told += len(tokens)
        for event in builder.add(delta, tokens):
            yield event
    state.completed(served, stream.completion)
    for event in builder.finish(stream.completion):
        yield event


async def _sent(events: AsyncIterator[Event], builder: ResponseBuilder) -> AsyncIterator[ServerSentEvent]:
    try:
        async for event in events:
            yield json_event(event, event=event["type"])
    except Exception as error:  # noqa: BLE001 - the stream has begun: it tells of its failure itself
        event = builder.fail(as_api_error(error))
        yield json_event(event, event=event["type"])


def _begun(request: ResponseRequest, call: ChatCall, served: ServedModel) -> Response:
    """The response before its answer."""
    text = request.text or TextConfig()
    return Response(
        id=new_id("resp"),
        created_at=now(),
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        model=served.name,
        output=[],
        parallel_tool_calls=call.parallel_tool_calls,
        reasoning=request.reasoning or Reasoning(),
        temperature=call.params.temperature,
        text=text if text.format else text.model_copy(update={"format": TextFormat(type="text")}),
        tool_choice=request.tool_choice or "auto",
        tools=request.tools or [],
        top_logprobs=request.top_logprobs or 0,
        top_p=call.params.top_p,
    )
