"""What an `Engine` does with conversations."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from . import _logging
from .chat import ChatStream
from .stream import TokenStream, seconds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from . import _core
    from .aio import AsyncChatStream
    from .chat import ChatCompletion, ChatPrompt, ToolChoice
    from .engine import Engine
    from .model import Model
    from .sampling import SamplingParams


class ChatMethods:
    """The chat methods of `Engine`: a conversation becomes a prompt, and what is generated an answer."""

    _native: _core.Engine
    _model: Model

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> ChatCompletion:
        """Answers a conversation, in the format of the model's chat template.

        Args:
            messages: mappings of the OpenAI API's shape: `role` ("system", "developer", "user", "assistant" or "tool") and `content`, a
                text or a list of text parts; `tool_calls`, `tool_call_id`, `name` and `reasoning_content` where they belong.
            params: how to sample; None: the defaults.
            tools: functions that the model may ask to call, of the OpenAI API's shape.
            tool_choice: "auto": as the model likes; "none": not; "required": at least one, behind text if it likes;
                {"function": {"name": ...}}: that one.
            parallel_tool_calls: whether it may ask for several at once; if not, the answer ends where a second call begins.
            response_format: {"type": "text"}; {"type": "json_object"}: the answer is a JSON object, or JSON of a "schema" beside the type;
                {"type": "json_schema", "json_schema": {"schema": ...}}: it is JSON of that schema.
            enable_thinking: for templates that ask: whether the model thinks first.
            template: the text of a Jinja template to use in place of the model's own.
            template_options: further variables for the template.
            add_generation_prompt: end the prompt where the answer begins.
            continue_final_message: go on with the last message, which is the assistant's, in place of a new one.
            timeout: seconds from now in which the answer must end, the wait for its turn included; None: no limit.

        Returns:
            The answer; one with the `finish_reason` "cancelled", and what it had by then, when the engine is closed meanwhile.

        Raises:
            InvalidOptionError: the model has no template, a message or tool is not of the right shape, the template refuses the messages or
                has no place for tools, a grammar or schema cannot be used, or an option is outside its range.
            ContextFullError: the conversation is longer than the context.
            QueueFullError: too many requests wait already.
            RequestTimeoutError: `timeout` passed.
            DecodeError: the computation failed.
            ClosedError: the engine was closed before.
        """
        return self.stream_chat(
            messages,
            params,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            enable_thinking=enable_thinking,
            template=template,
            template_options=template_options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            timeout=timeout,
        ).read_all()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> ChatStream:
        """Starts to answer a conversation and returns at once. The arguments and errors are those of `chat`.

        Returns:
            An iterator over what the answer gains.
        """
        prompt = self._prompt(
            messages, params, tools, tool_choice, parallel_tool_calls, response_format, enable_thinking, template, template_options,
            add_generation_prompt, continue_final_message,
        )  # fmt: skip
        sampling = prompt._options()
        generation = self._native.submit(prompt.text, sampling, seconds(timeout))
        return ChatStream(TokenStream(generation, self, logprobs=sampling.logprobs is not None), prompt.parser())

    async def achat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> ChatCompletion:
        """What `chat()` does, for asyncio. Cancelling the task that awaits it cancels the generation."""
        return await self.astream_chat(
            messages,
            params,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            enable_thinking=enable_thinking,
            template=template,
            template_options=template_options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            timeout=timeout,
        ).read_all()

    def astream_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        timeout: float | None = None,
    ) -> AsyncChatStream:
        """What `stream_chat()` does, for asyncio: returns an asynchronous iterator at once, without being awaited.

        The arguments and errors are those of `chat`; besides, it is a RuntimeError when no event loop runs in this thread.
        """
        from . import aio  # late: importing asyncio takes longer than importing this package

        prompt = self._prompt(
            messages, params, tools, tool_choice, parallel_tool_calls, response_format, enable_thinking, template, template_options,
            add_generation_prompt, continue_final_message,
        )  # fmt: skip
        return aio.start_chat(cast("Engine", self), prompt, timeout=timeout)

    def _prompt(  # noqa: PLR0917 - as they are in `chat`
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None,
        tools: Sequence[Mapping[str, object]] | None,
        tool_choice: ToolChoice,
        parallel_tool_calls: bool,
        response_format: Mapping[str, object] | None,
        enable_thinking: bool,
        template: str | None,
        template_options: Mapping[str, object] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> ChatPrompt:
        """The conversation as a prompt; the arguments are those of `chat`, in that order."""
        _logging.sync_level()
        return self._model.chat_format(template).apply(
            messages,
            params,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            enable_thinking=enable_thinking,
            template_options=template_options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
