"""A question, tools to answer it with, and answers put together from their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_moe import ChatDelta

__all__ = ["ADD", "BEGUN_CALL", "QUESTION", "WEATHER", "joined"]

QUESTION = [{"role": "user", "content": "What is it?"}]
# To be continued: then also a model of random weights calls a tool.
BEGUN_CALL: list[dict[str, Any]] = [*QUESTION, {"role": "assistant", "content": "<tool_call>\n"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    },
}


def joined(deltas: Sequence[ChatDelta]) -> tuple[str, str, list[tuple[str | None, str | None, str]]]:
    """Text, reasoning, and each tool call's id, name and arguments."""
    calls: list[tuple[str | None, str | None, str]] = []
    for delta in deltas:
        for call in delta.tool_calls:
            if call.index == len(calls):
                calls.append((call.id, call.name, call.arguments))
            else:
                assert (call.id, call.name) == (None, None)
                known = calls[call.index]
                calls[call.index] = (known[0], known[1], known[2] + call.arguments)
    return "".join(delta.content for delta in deltas), "".join(delta.reasoning for delta in deltas), calls
