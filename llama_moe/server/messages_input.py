"""A request of the Messages API as a conversation, in the shapes that `Engine.chat` takes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .errors import ApiError
from .messages_models import (
    AnyChoice,
    AutoChoice,
    NoChoice,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from llama_moe.chat import ToolChoice as ChatToolChoice

    from .messages_models import Block, CountRequest, InputMessage, TextContent

_ROLES_OF_BLOCKS = {
    "thinking": "assistant",
    "redacted_thinking": "assistant",
    "tool_use": "assistant",
    "tool_result": "user",
}


def chat_messages(request: CountRequest) -> list[dict[str, Any]]:
    """The messages of the conversation: the system prompt, then the others.

    Results of tools are messages of their own, and neighbours of one role become one message, as that API has it.

    Raises:
        ApiError: a block is in a message of the wrong role, or a result has no call before it, or a call no result behind it.
    """
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system)})
    open_calls: dict[str, str] = {}
    for index, message in enumerate(request.messages):
        for new in _converted(message, index, open_calls):
            before = messages[-1] if messages else {}
            if new["role"] == before.get("role") and new["role"] != "tool":
                _merge(before, new)
            else:
                messages.append(new)
    if open_calls:
        missing = next(iter(open_calls))
        raise ApiError(400, f"messages: the tool use {missing!r} has no tool_result in the message behind it", param="messages")
    return messages


def _converted(message: InputMessage, index: int, open_calls: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What a message is in the chat API; `open_calls` are the names of tools by the ids of their uses that have no result yet."""
    blocks = [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    for number, block in enumerate(blocks):
        _check_role(block, message.role, f"messages.{index}.content.{number}")
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in open_calls:
                raise ApiError(
                    400,
                    f"messages.{index}.content.{number}: there is no tool use {block.tool_use_id!r} in the message before it",
                    param=f"messages.{index}.content.{number}",
                )
            yield _result(block, open_calls.pop(block.tool_use_id))
    if open_calls:
        missing = next(iter(open_calls))
        raise ApiError(400, f"messages.{index}: the tool use {missing!r} before it has no tool_result in it", param=f"messages.{index}")
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    if message.role != "assistant":
        if texts or not any(isinstance(block, ToolResultBlock) for block in blocks):
            yield {"role": message.role, "content": _parts(texts)}
        return
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    open_calls.update((call["id"], call["function"]["name"]) for call in calls)
    answer: dict[str, Any] = {"role": "assistant"}
    if texts or not calls:
        answer["content"] = _parts(texts)
    if thinking := "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        answer["reasoning_content"] = thinking
    if calls:
        answer["tool_calls"] = calls
    yield answer


def _check_role(block: Block, role: str, place: str) -> None:
    wanted = _ROLES_OF_BLOCKS.get(block.type, role)
    if wanted != role:
        raise ApiError(400, f"{place}: a {block.type} block belongs to the {wanted}, not to the {role}", param=place)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultBlock, name: str) -> dict[str, Any]:
    text = _text(block.content or "")
    return {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": f"Error: {text}" if block.is_error else text}


def _parts(texts: list[str]) -> str | list[dict[str, str]]:
    if len(texts) <= 1:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _text(content: TextContent) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _merge(message: dict[str, Any], new: dict[str, Any]) -> None:
    """Appends a message of the same role."""
    if "content" in message and "content" in new:
        message["content"] = [*_as_parts(message["content"]), *_as_parts(new["content"])]
    elif "content" in new:
        message["content"] = new["content"]
    if "reasoning_content" in new:
        before = message.get("reasoning_content")
        message["reasoning_content"] = f"{before}\n{new['reasoning_content']}" if before else new["reasoning_content"]
    if "tool_calls" in new:
        message["tool_calls"] = [*message.get("tool_calls", ()), *new["tool_calls"]]


def _as_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def offered_tools(request: CountRequest) -> tuple[list[dict[str, Any]], ChatToolChoice, bool]:
    """The tools that the model may use, how it may choose, and whether several at once.

    Raises:
        ApiError: a tool is chosen that is not there.
    """
    tools = [
        {"type": "function", "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}}
        for tool in request.tools or ()
    ]
    match request.tool_choice:
        case NoChoice():
            return tools, "none", True
        case AnyChoice(disable_parallel_tool_use=alone):
            return tools, "required", not alone
        case ToolChoice(name=name, disable_parallel_tool_use=alone):
            names = [tool.name for tool in request.tools or ()]
            if name not in names:
                there = ", ".join(map(repr, names)) or "none"
                raise ApiError(400, f"tool_choice names the tool {name!r}; the tools are {there}", param="tool_choice")
            return tools, {"type": "function", "function": {"name": name}}, not alone
        case AutoChoice(disable_parallel_tool_use=alone):
            return tools, "auto", not alone
    return tools, "auto", True


def response_format(request: CountRequest) -> Mapping[str, Any] | None:
    """The form of the answer in the shape of the chat API."""
    form = request.output_config and request.output_config.format
    return {"type": "json_schema", "json_schema": {"schema": form.json_schema}} if form else None


def thinks(request: CountRequest) -> bool:
    """Whether the model shall think first, where its template asks."""
    return request.thinking is not None and not isinstance(request.thinking, ThinkingDisabled)


def effort(request: CountRequest) -> str | None:
    """How much the model shall think."""
    return request.output_config.effort if request.output_config else None
