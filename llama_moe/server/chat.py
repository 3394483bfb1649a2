"""`/v1/chat/completions`: conversations."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from llama_moe import SamplingParams
from llama_moe.aio import open_chat

from .chat_types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatReply,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
    DeltaFunction,
    DeltaToolCall,
    FinishReason,
    FunctionCall,
    MessageToolCall,
    ToolChoiceObject,
)
from .errors import ERROR_RESPONSES, ApiError
from .results import Usage, new_id, now, token_logprobs, usage_of
from .sampling import check_choices, sampling_params, wants_usage, with_seed
from .state import ServerState, State
from .streaming import DONE, StreamResponse, json_event, merged, read_all, unless_gone
from .tokens import prompt_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from sse_starlette import ServerSentEvent

    from llama_moe import AsyncChatStream, ChatCompletion, ChatDelta, ChatPrompt, Engine, Token, ToolCallDelta, ToolChoice

    from .pool import ServedModel
    from .settings import ServerSettings

router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A conversation in the terms of `Engine.chat`, whatever API it came from.

    Attributes:
        messages: as OpenAI's API has them, and so `tools` and `response_format`.
        params: how to sample.
        tools: functions that the model may ask to call.
        tool_choice: as `Engine.chat` takes it.
        parallel_tool_calls: whether it may ask for several at once.
        response_format: what the answer must be.
        enable_thinking: whether the model thinks first, if its template asks.
        template_options: further variables for the template.
        continue_final_message: go on with the last message.
    """

    messages: Sequence[Mapping[str, object]]
    params: SamplingParams
    tools: Sequence[Mapping[str, object]] | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, object] | None = None
    enable_thinking: bool = True
    template_options: Mapping[str, object] = field(default_factory=dict)
    continue_final_message: bool = False

    async def start(self, served: ServedModel, settings: ServerSettings, *, choices: int = 1) -> tuple[int, list[AsyncChatStream]]:
        """Starts to answer, as often as there are choices. The event loop goes on while a long conversation becomes tokens.

        Returns:
            The tokens of the prompt, and the answers.

        Raises:
            ApiError: the prompt is longer than the server allows.
            LlamaMoeError: as `Engine.chat` does.
        """
        prompt, ids = await asyncio.to_thread(self._prompt, served.engine)
        check_prompt(len(ids), settings)
        streams: list[AsyncChatStream] = []
        try:
            for index in range(choices):
                params = with_seed(self.params, index)
                streams.append(await open_chat(served.engine, prompt, ids, params=params, timeout=settings.timeout))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        return len(ids), streams

    async def count(self, served: ServedModel) -> int:
        """The tokens of the prompt, without answering."""
        _, ids = await asyncio.to_thread(self._prompt, served.engine)
        return len(ids)

    def _prompt(self, engine: Engine) -> tuple[ChatPrompt, list[int]]:
        prompt = engine.model.chat_format().apply(
            self.messages,
            self.params,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format,
            enable_thinking=self.enable_thinking,
            template_options=self.template_options,
            continue_final_message=self.continue_final_message,
        )
        return prompt, prompt_tokens(engine, prompt.text)


def check_prompt(tokens: int, settings: ServerSettings) -> None:
    """Refuses a prompt that is longer than the server allows."""
    limit = settings.max_prompt_tokens
    if limit is not None and tokens > limit:
        raise ApiError(400, f"the prompt has {tokens} tokens; this server allows up to {limit}", code="context_length_exceeded")


def chat_call(request: ChatRequest, settings: ServerSettings) -> ChatCall:
    """The request in the engine's terms.

    Raises:
        ApiError: fields contradict each other, or are above the server's limits.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    template_options = dict(request.chat_template_kwargs or {})
    enable_thinking = template_options.pop("enable_thinking", request.reasoning_effort != "none")
    if not isinstance(enable_thinking, bool):
        raise ApiError(400, f"enable_thinking is {enable_thinking!r}; it must be true or false", param="chat_template_kwargs")
    if request.reasoning_effort not in (None, "none"):
        template_options.setdefault("reasoning_effort", request.reasoning_effort)
    choice = request.tool_choice
    return ChatCall(
        messages=[message.model_dump(exclude_none=True) for message in request.messages],
        params=sampling_params(
            request,
            settings,
            max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        ),
        tools=None if request.tools is None else [tool.model_dump(exclude_none=True) for tool in request.tools],
        tool_choice=choice.model_dump() if isinstance(choice, ToolChoiceObject) else choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        response_format=None if request.response_format is None else request.response_format.model_dump(exclude_none=True, by_alias=True),
        enable_thinking=enable_thinking,
        template_options=template_options,
        continue_final_message=bool(request.continue_final_message),
    )


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, events with a `ChatChunk` each."}},
)
async def chat_completions(body: ChatRequest, request: Request, state: State) -> Response:
    """Answers a conversation, in the format of the model's chat template."""
    choices = body.n or 1
    check_choices(choices, state.settings)
    include_usage = wants_usage(body)
    call = await asyncio.to_thread(chat_call, body, state.settings)  # schemas are compiled in there
    async with AsyncExitStack() as held:
        served = await held.enter_async_context(state.pool.use(body.model))
        _, streams = await call.start(served, state.settings, choices=choices)
        for stream in streams:
            held.push_async_callback(stream.aclose)
        if body.stream:
            events = _events(state, served, streams, include_usage=include_usage)
            return StreamResponse(events, request=request, state=state, held=held.pop_all())
        answers = await unless_gone(request, read_all(streams))
        state.completed(served, *answers)
        reply = ChatReply(
            id=new_id("chatcmpl"),
            created=now(),
            model=served.name,
            choices=[_choice(served, index, answer) for index, answer in enumerate(answers)],
            usage=usage_of(answers[:1], answers),
        )
    return Response(reply.model_dump_json(), media_type="application/json")


def _choice(served: ServedModel, index: int, answer: ChatCompletion) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=answer_message(answer),
        logprobs=None if answer.logprobs is None else _logprobs(served, answer.logprobs),
        finish_reason=answer.finish_reason,  # type: ignore[arg-type]  # completed() has seen it
    )


def answer_message(answer: ChatCompletion) -> AnswerMessage:
    """The answer as a message."""
    return AnswerMessage(
        content=answer.text or (None if answer.tool_calls else ""),
        reasoning_content=answer.reasoning or None,
        tool_calls=[
            MessageToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments)) for call in answer.tool_calls
        ]
        or None,
    )


def _logprobs(served: ServedModel, tokens: Sequence[Token]) -> ChoiceLogprobs:
    return ChoiceLogprobs(content=token_logprobs(served.model, tokens), refusal=None)


async def _events(
    state: ServerState, served: ServedModel, streams: Sequence[AsyncChatStream], *, include_usage: bool
) -> AsyncIterator[ServerSentEvent]:
    reply, created = new_id("chatcmpl"), now()

    def chunk(choices: list[ChunkChoice], **usage: Usage | None) -> ServerSentEvent:
        return json_event(ChatChunk(id=reply, object="chat.completion.chunk", created=created, model=served.name, choices=choices, **usage))

    # Where the usage is asked for, OpenAI's other chunks have it as null.
    no_usage: dict[str, Usage | None] = {"usage": None} if include_usage else {}
    async for _, choice in merged([_choices(state, served, index, stream) for index, stream in enumerate(streams)]):
        yield chunk([choice], **no_usage)
    if include_usage:
        answers = [stream.completion for stream in streams]
        yield chunk([], usage=usage_of(answers[:1], answers))
    yield DONE


async def _choices(state: ServerState, served: ServedModel, index: int, stream: AsyncChatStream) -> AsyncIterator[ChunkChoice]:
    """What one answer gains, from its first chunk to the one that says how it ended."""
    told = 0  # of its tokens, with their log-probabilities

    def choice(delta: Delta, finish_reason: FinishReason | None = None) -> ChunkChoice:
        nonlocal told
        logprobs = None
        if stream.logprobs and told < len(stream.tokens):
            logprobs = _logprobs(served, stream.tokens[told:])
            told = len(stream.tokens)
        return ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)

    yield choice(Delta(role="assistant", content=""))
    async for delta in stream:
        yield choice(chunk_delta(delta))
    answer = stream.completion
    state.completed(served, answer)
    yield choice(Delta(), answer.finish_reason)  # type: ignore[arg-type]  # neither is it "cancelled"


def chunk_delta(delta: ChatDelta) -> Delta:
    """What an answer gained, as a chunk has it."""
    fields: dict[str, Any] = {}
    if delta.content:
        fields["content"] = delta.content
    if delta.reasoning:
        fields["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        fields["tool_calls"] = [_tool_call_delta(call) for call in delta.tool_calls]
    return Delta(**fields)


def _tool_call_delta(call: ToolCallDelta) -> DeltaToolCall:
    begins: dict[str, Any] = {"id": call.id, "type": "function"} if call.id is not None else {}
    name = {} if call.name is None else {"name": call.name}
    return DeltaToolCall(index=call.index, **begins, function=DeltaFunction(**name, arguments=call.arguments))
