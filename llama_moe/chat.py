"""Conversations: messages in, an answer with tool calls and reasoning out.

`ChatTemplate` and `ChatParser` wait for no token, so they serve those who generate otherwise, too: apply a template, generate from
`ChatPrompt.text`, and push each token's text into `ChatPrompt.parser()`. What the template says of the tokens themselves, such as the
grammar of tool calls, only `Engine.chat` and its like enforce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeAlias, TypedDict, TypeVar, cast

from . import _core, _logging
from ._options import fill, native_model
from .errors import InvalidOptionError, LlamaMoeError
from .sampling import SamplingParams, schema_text, to_json
from .stream import AnyStream, GenerationReader, SyncStream, TokenStream, failure_text

if TYPE_CHECKING:
    from .model import Model
    from .results import Completion, Timings, Token

    ChatFinishReason: TypeAlias = Literal["stop", "length", "cancelled", "tool_calls"]

TokensT = TypeVar("TokensT", bound=GenerationReader)

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatMessage(TypedDict, total=False):
    """A message of a conversation, as the OpenAI API has it; any mapping of this shape will do."""

    role: str
    content: str | Sequence[Mapping[str, object]] | None
    name: str
    reasoning_content: str
    tool_calls: Sequence[Mapping[str, object]]
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The model asks to call a function.

    Attributes:
        id: names this call; the message with its result has it as `tool_call_id`.
        name: of the function.
        arguments: JSON; its beginning when the answer was cut off.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a tool call gained.

    Attributes:
        index: which of the answer's tool calls.
        id: set in the first one of a call.
        name: set in the first one of a call.
        arguments: what to append to its arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What an answer gained; `str()` of it is the text.

    Attributes:
        content: what to append to the text.
        reasoning: what to append to the reasoning.
        tool_calls: what tool calls gained.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __str__(self) -> str:
        return self.content


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """A finished answer; `str()` of it is its text.

    Attributes:
        text: what the model says, without reasoning and tool calls.
        tool_calls: the functions it asks to call.
        reasoning: what it thought first, if its template has a place for that.
        finish_reason: "tool_calls": it waits for results of its tool calls; "stop": it ended or a stop string appeared; "length":
            `max_tokens` or the context's end was reached; "cancelled": its stream or its engine was closed first.
        tokens: ids of all generated tokens.
        prompt_tokens: length of the prompt.
        cached_tokens: how many of those were not computed again.
        logprobs: the generated tokens with their log-probabilities; None unless `SamplingParams.logprobs` asked for them.
        timings: where its time went.
    """

    text: str
    tool_calls: tuple[ToolCall, ...]
    reasoning: str
    finish_reason: ChatFinishReason
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[Token, ...] | None
    timings: Timings

    def __str__(self) -> str:
        return self.text

    def to_message(self) -> ChatMessage:
        """The answer as a message, to go on with the conversation."""
        message: ChatMessage = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


class ChatParser:
    """Reads one answer as it comes. Output that is not of the template's format is text."""

    def __init__(self, native: _core.ChatParser, *, one_call: bool = False) -> None:
        self._native = native
        self._one_call = one_call
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the answer is over: it may have one tool call, has it, and began another one. What is pushed then is ignored."""
        return self._ended

    def push(self, text: str) -> list[ChatDelta]:
        """Takes the text of the next token and returns what became certain by it."""
        return self._allowed(_deltas(self._native.push(text)))

    def finish(self) -> list[ChatDelta]:
        """Takes the end of the answer and returns what was held back until then."""
        return self._allowed(_deltas(self._native.finish()))

    def _allowed(self, deltas: list[ChatDelta]) -> list[ChatDelta]:
        """Those before a tool call too many, which llama.cpp's grammar does not prevent in formats that mark each call."""
        if not self._one_call:
            return deltas
        allowed = []
        for delta in deltas:
            self._ended = self._ended or any(call.index > 0 for call in delta.tool_calls)
            if self._ended:
                break
            allowed.append(delta)
        return allowed

    def complete(self, completion: Completion) -> ChatCompletion:
        """The answer, when `finish()` was called; `completion` is the generation that the text came from."""
        message = self._native.message
        calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
        if self._ended:
            calls = calls[:1]
        return ChatCompletion(
            text=message.content,
            tool_calls=calls,
            reasoning=message.reasoning,
            finish_reason="tool_calls" if calls and (self._ended or completion.finish_reason == "stop") else completion.finish_reason,
            tokens=completion.tokens,
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            logprobs=completion.logprobs,
            timings=completion.timings,
        )


class ChatPrompt:
    """A conversation as a prompt, with what its template says of the answer."""

    def __init__(self, native: _core.ChatPrompt, params: SamplingParams, *, one_call: bool = False) -> None:
        self._native = native
        self._params = params
        self._one_call = one_call

    @property
    def text(self) -> str:
        """The prompt. Control tokens are in it by name; a beginning-of-text token that the model's vocabulary adds is not."""
        return self._native.text

    def _options(self, params: SamplingParams | None = None) -> _core.SamplingOptions:
        """The native sampling options: the caller's, with the template's grammar, stop strings and preserved tokens.

        Those that shaped the prompt may be replaced by `params` that differ in nothing but chance.
        """
        return self._native.constrain((params or self._params)._to_native())

    def parser(self) -> ChatParser:
        """A parser for one answer."""
        return ChatParser(_core.ChatParser(self._native), one_call=self._one_call)


class ChatTemplate:
    """A model's chat format.

    Args:
        model: an open model.
        text: a Jinja template to use in place of the model's own.

    Raises:
        InvalidOptionError: the model has no template, or the text is not a template.
        ClosedError: the model was closed.
    """

    def __init__(self, model: Model, text: str | None = None) -> None:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"template must be the text of a Jinja template, or None for the model's own, not {text!r}")
        _logging.sync_level()
        self._native = _core.ChatTemplate(native_model("model", model), text)

    def capabilities(self) -> dict[str, bool]:
        """What the template has a place for, such as "supports_tools"."""
        return self._native.capabilities()

    def apply(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatPrompt:
        """The prompt of a conversation. The arguments and errors are those of `Engine.chat`."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be a SamplingParams, not {params!r}")
        request: dict[str, object] = {
            "messages": to_json("messages", _checked_messages(messages)),
            "parallel_tool_calls": parallel_tool_calls,
            "enable_thinking": enable_thinking,
            "template_options": _template_options(template_options),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        offered = _offered_tools(tools, tool_choice)
        if offered:
            request["tools"] = to_json("tools", offered)
            request["tool_choice"] = "required" if isinstance(tool_choice, Mapping) else tool_choice
        if continue_final_message and messages[-1].get("role") != "assistant":
            raise InvalidOptionError(f"continue_final_message needs a last message of the assistant, not of {messages[-1].get('role')!r}")
        if params.grammar is not None and offered and tool_choice != "none":
            raise InvalidOptionError("params.grammar cannot be combined with tools, whose calls have a grammar of their own")
        request["json_schema"] = _answer_schema(response_format, params) or ""
        return ChatPrompt(self._native.apply(fill(_core.ChatRequest(), request)), params, one_call=not parallel_tool_calls)


class ChatReader(AnyStream[ChatCompletion], Generic[TokensT]):
    """What chat streams are made of: the stream of their tokens, and the deltas that were not read yet."""

    __slots__ = ("_parser", "_ready", "_tokens")

    def __init__(self, tokens: TokensT, parser: ChatParser) -> None:
        super().__init__()
        self._tokens = tokens
        self._parser = parser
        self._ready: deque[ChatDelta] = deque()

    @property
    def tokens(self) -> Sequence[Token]:
        """The tokens that were read so far, those of deltas that were not yet included; it grows while the stream is read."""
        return self._tokens.tokens

    @property
    def logprobs(self) -> bool:
        """Whether the tokens have log-probabilities."""
        return self._tokens.logprobs

    def cancel(self) -> None:
        """Ends the generation without waiting for it; the stream then ends too. Any thread may call this; nothing happens after the end."""
        self._tokens.cancel()

    def _push(self, token: Token) -> None:
        self._ready.extend(self._parser.push(token.text))
        if self._parser.ended:
            self._tokens.cancel()

    def _finish(self, completion: Completion) -> None:
        self._ready.extend(self._parser.finish())
        self._completion = self._parser.complete(completion)


class ChatStream(ChatReader[TokenStream], SyncStream[ChatDelta, ChatCompletion]):
    """Iterates over what an answer gains; made by `Engine.stream_chat()`.

    As a `TokenStream`, it runs whether or not anybody reads, and is cancelled by `close()`, by leaving a `with` block, and when nobody
    refers to it any more.
    """

    __slots__ = ()

    def __next__(self) -> ChatDelta:
        """What the answer gained next; waits for it.

        Raises:
            LlamaMoeError: what `TokenStream` raises.
        """
        while not self._ready:
            if self._ended:
                raise StopIteration
            try:
                self._push(next(self._tokens))
            except StopIteration:
                self._finish(self._tokens.completion)
            except LlamaMoeError as error:
                self._failure = failure_text(error)
                raise
        return self._ready.popleft()


def response_schema(response_format: Mapping[str, object] | None) -> str | None:
    """The JSON schema that a response_format of the OpenAI API asks for, as JSON; None for text.

    Raises:
        InvalidOptionError: it is of no known type, or has no schema.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise TypeError(f"response_format must be a mapping, not {response_format!r}")
    match response_format.get("type"):
        case "text":
            return None
        case "json_object":
            schema = response_format.get("schema", {"type": "object"})
        case "json_schema":
            wrapper = response_format.get("json_schema")
            schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
        case other:
            raise InvalidOptionError(f"response_format has the type {other!r}; expected 'text', 'json_object' or 'json_schema'")
    if schema is None:
        raise InvalidOptionError(
            f"response_format has no schema: {dict(response_format)!r}; a json_schema has it as {{'json_schema': {{'schema': ...}}}}"
        )
    return schema_text("response_format", schema)


def _answer_schema(response_format: Mapping[str, object] | None, params: SamplingParams) -> str | None:
    schema = response_schema(response_format)
    if schema is None:
        return cast("str | None", params.json_schema)  # which SamplingParams made text
    if params.json_schema is not None or params.grammar is not None:
        raise InvalidOptionError("response_format and the grammar or json_schema of params are both given; give one of them")
    SamplingParams(json_schema=schema)  # says what is wrong with it
    return schema


def _template_options(options: Mapping[str, object] | None) -> dict[str, str]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"template_options must be a mapping, not {options!r}")
    return {name: to_json(f"template_options[{name!r}]", value) for name, value in options.items()}


def _checked_messages(messages: Sequence[Mapping[str, object]]) -> Sequence[Mapping[str, object]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a sequence of mappings with a role and content, not {messages!r}")
    if not messages:
        raise InvalidOptionError("messages is empty; give at least one message")
    for index, message in enumerate(cast("Sequence[object]", messages)):
        if not isinstance(message, Mapping):
            raise InvalidOptionError(f"messages[{index}] is {message!r}; it must be a mapping with a role and content")
        role = message.get("role")
        if role not in ROLES:
            missing = "no role" if role is None else f"the role {role!r}"
            raise InvalidOptionError(f"messages[{index}] has {missing}; it must be one of {', '.join(ROLES)}")
        _check_content(index, message)
    return messages


def _check_content(index: int, message: Mapping[str, object]) -> None:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
            return
        raise InvalidOptionError(
            f"messages[{index}] has no content; only an assistant's message with tool calls or reasoning may be without"
        )
    if isinstance(content, str):
        return
    if not isinstance(content, Sequence):
        raise InvalidOptionError(f"messages[{index}] has the content {content!r}; it must be text or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidOptionError(f"messages[{index}] has the content part {part!r}; only {{'type': 'text', 'text': ...}} is supported")


def _offered_tools(tools: Sequence[Mapping[str, object]] | None, tool_choice: ToolChoice) -> list[Mapping[str, object]]:
    if tools is not None and (isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence)):
        raise TypeError(f"tools must be a sequence of mappings, not {tools!r}")
    names = [_tool_name(index, tool) for index, tool in enumerate(tools or ())]
    offered = list(tools or ())
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        wanted = function.get("name") if isinstance(function, Mapping) else None
        if wanted not in names:
            raise InvalidOptionError(f"tool_choice names the function {wanted!r}; the tools are {', '.join(map(repr, names)) or 'none'}")
        return [tool for tool, name in zip(offered, names, strict=True) if name == wanted]
    if tool_choice not in ("auto", "none", "required"):
        raise InvalidOptionError(f"tool_choice is {tool_choice!r}; expected 'auto', 'none', 'required' or {{'function': {{'name': ...}}}}")
    if tool_choice == "required" and not offered:
        raise InvalidOptionError("tool_choice is 'required', but there are no tools")
    return offered


def _tool_name(index: int, tool: object) -> str:
    fields = tool if isinstance(tool, Mapping) else {}
    function = fields.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or fields.get("type") != "function":
        raise InvalidOptionError(
            f"tools[{index}] is {tool!r}; expected {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}"
        )
    return name


def _deltas(native: list[_core.ChatDelta]) -> list[ChatDelta]:
    deltas = []
    for delta in native:
        calls: tuple[ToolCallDelta, ...] = ()
        if delta.tool_call is not None:
            calls = (ToolCallDelta(delta.tool_call, delta.call.id or None, delta.call.name or None, delta.call.arguments),)
        deltas.append(ChatDelta(delta.content, delta.reasoning, calls))
    return deltas
