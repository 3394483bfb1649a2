"""A request of the Responses API as a conversation, in the shapes that `Engine.chat` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ApiError
from .responses_models import (
    AllowedTools,
    ChosenFunction,
    FunctionTool,
    InputFunctionCall,
    InputFunctionCallOutput,
    InputItem,
    InputMessage,
    InputReasoning,
    JsonObjectFormat,
    JsonSchemaFormat,
    Refusal,
)

if TYPE_CHECKING:
    from llama_moe.chat import ToolChoice

    from .responses_models import InputContent, ResponseRequest

_STATELESS = "this server keeps no responses; send the whole conversation as the input"


def check_supported(request: ResponseRequest) -> None:
    """Refuses what cannot be ignored.

    Raises:
        ApiError: the request asks for something that this server does not do.
    """
    unsupported = {
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "prompt": "there are no prompt templates; send the text as instructions and input",
        "background": "responses are not stored; stream the response in place of asking for it later",
    }
    for name, reason in unsupported.items():
        if getattr(request, name):
            raise ApiError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")


def chat_messages(request: ResponseRequest) -> list[dict[str, Any]]:
    """The messages of the conversation: the instructions, then the input.

    An answer's reasoning, text and function calls, which are items of their own, become one message.

    Raises:
        ApiError: the output of a function has no call.
    """
    items: Sequence[InputItem] = [InputMessage(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    messages: list[dict[str, Any]] = []
    functions: dict[str, str] = {}
    for index, item in enumerate(items):
        match item:
            case InputMessage(role="assistant"):
                _add_content(_answer(messages, after_text=False), _content(item.content))
            case InputMessage():
                messages.append({"role": item.role, "content": _content(item.content)})
            case InputReasoning():
                reasoning = "\n".join(part.text for part in item.content or item.summary)
                if reasoning:  # a message of nothing else would be an empty one
                    _answer(messages, after_text=True)["reasoning_content"] = reasoning
            case InputFunctionCall():
                functions[item.call_id] = item.name
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
                _answer(messages, after_text=False).setdefault("tool_calls", []).append(call)
            case InputFunctionCallOutput():
                name = functions.get(item.call_id)
                if name is None:
                    raise ApiError(
                        400,
                        f"input[{index}] is the output of the function call {item.call_id!r}, which is not in the input before it",
                        param=f"input[{index}].call_id",
                    )
                messages.append({"role": "tool", "tool_call_id": item.call_id, "name": name, "content": _content(item.output)})
    return _with_instructions(request.instructions, messages)


def _answer(messages: list[dict[str, Any]], *, after_text: bool) -> dict[str, Any]:
    """The answer that an item belongs to: the one that comes last, or a new one; reasoning behind other parts begins a new one."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (after_text and ("content" in last or "tool_calls" in last)):
        last = {"role": "assistant"}
        messages.append(last)
    return last


def _add_content(message: dict[str, Any], content: list[dict[str, str]] | str) -> None:
    before = message.get("content")
    message["content"] = content if before is None else [*_as_parts(before), *_as_parts(content)]


def _as_parts(content: list[dict[str, str]] | str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _content(content: InputContent) -> list[dict[str, str]] | str:
    if isinstance(content, str):
        return content
    texts = [part.refusal if isinstance(part, Refusal) else part.text for part in content]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _with_instructions(instructions: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation behind its instructions, in one message with system messages at its beginning: most templates know only one."""
    if not instructions:
        return messages
    parts = [{"type": "text", "text": instructions}]
    while messages and messages[0]["role"] in ("system", "developer"):
        parts += _as_parts(messages[0]["content"])
        messages = messages[1:]
    return [{"role": "system", "content": "\n\n".join(part["text"] for part in parts)}, *messages]


def chat_tools(tools: Iterable[FunctionTool] | None) -> list[dict[str, Any]]:
    """The tools in the shape of the chat API."""
    return [{"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)} for tool in tools or ()]


def offered_tools(request: ResponseRequest) -> tuple[list[dict[str, Any]], ToolChoice]:
    """The tools that the model may use, and how it may choose.

    Raises:
        ApiError: a tool is chosen that is not there.
    """
    tools = list(request.tools or ())
    choice = request.tool_choice or "auto"
    names = [tool.name for tool in tools]
    wanted = [choice] if isinstance(choice, ChosenFunction) else choice.tools if isinstance(choice, AllowedTools) else []
    for function in wanted:
        if function.name not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise ApiError(400, f"tool_choice names the function {function.name!r}; the tools are {there}", param="tool_choice")
    if isinstance(choice, AllowedTools):
        allowed = {function.name for function in choice.tools}
        return chat_tools(tool for tool in tools if tool.name in allowed), choice.mode
    if isinstance(choice, ChosenFunction):
        return chat_tools(tools), {"type": "function", "function": {"name": choice.name}}
    return chat_tools(tools), choice


def response_format(request: ResponseRequest) -> Mapping[str, Any] | None:
    """The form of the answer in the shape of the chat API."""
    match request.text and request.text.format:
        case JsonObjectFormat():
            return {"type": "json_object"}
        case JsonSchemaFormat() as form:
            return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.json_schema}}
    return None
