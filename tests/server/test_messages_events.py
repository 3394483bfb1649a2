"""Messages put together from what an answer gains, read by Anthropic's own types."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from llama_moe import ChatCompletion, ChatDelta
from llama_moe.chat import ToolCallDelta
from llama_moe.server.messages_events import MessageBuilder
from tests.server.test_responses_events import completion

EVENTS: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def read(built: MessageBuilder, deltas: Iterable[ChatDelta], end: ChatCompletion, *, max_tokens: int = 100) -> list[dict[str, Any]]:
    """The events but the pings, each with its type first."""
    events = [*built.begin(), *(event for delta in deltas for event in built.add(delta)), *built.finish(end, max_tokens=max_tokens)]
    events = [event for event in events if event["type"] != "ping"]
    for event in events:  # they can be sent, and Anthropic's client knows each
        EVENTS.validate_python(json.loads(json.dumps(event)), strict=True)
    Message.model_validate(built.message.model_dump(), strict=True)
    return events


def test_a_text_is_a_block() -> None:
    built = MessageBuilder("m", prompt_tokens=5)
    events = read(built, [ChatDelta("Hel"), ChatDelta("lo")], completion(text="Hello"))
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == 5
    assert events[1:] == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"input_tokens": 3, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0, "output_tokens": 3},
        },
        {"type": "message_stop"},
    ]
    assert [block.model_dump() for block in built.message.content] == [{"type": "text", "text": "Hello", "citations": None}]


def test_thinking_text_and_tool_uses_are_blocks_in_their_order() -> None:
    built = MessageBuilder("m", prompt_tokens=5)
    deltas = [
        ChatDelta(reasoning="Hm"),
        ChatDelta("So"),
        ChatDelta(tool_calls=(ToolCallDelta(0, "a", "add", ""),)),
        ChatDelta(tool_calls=(ToolCallDelta(0, None, None, '{"x"'),)),
        ChatDelta(tool_calls=(ToolCallDelta(0, None, None, ': "é"}'),)),
        ChatDelta(tool_calls=(ToolCallDelta(1, "b", "now", ""),)),
    ]
    events = read(built, deltas, completion(finish_reason="tool_calls"))
    assert [event.get("index") for event in events if event["type"] == "content_block_start"] == [0, 1, 2, 3]
    thinking, text, add, now = built.message.content
    assert thinking.model_dump() == {"type": "thinking", "thinking": "Hm", "signature": "unsigned"}
    assert text.type == "text"
    assert add.model_dump() == {"type": "tool_use", "id": "a", "name": "add", "input": {"x": "é"}}
    assert now.model_dump() == {"type": "tool_use", "id": "b", "name": "now", "input": {}}
    parts = [event["delta"]["partial_json"] for event in events if event.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(parts) == '{"x": "é"}'
    assert built.message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("finish_reason", "max_tokens", "expected"),
    [("stop", 100, "end_turn"), ("length", 3, "max_tokens"), ("length", 100, "model_context_window_exceeded")],
)
def test_a_message_tells_why_it_ended(finish_reason: str, max_tokens: int, expected: str) -> None:
    built = MessageBuilder("m", prompt_tokens=5)
    read(built, [ChatDelta("x")], completion(finish_reason=finish_reason), max_tokens=max_tokens)
    assert (built.message.stop_reason, built.message.stop_sequence) == (expected, None)


def test_a_stop_sequence_ends_the_text_and_is_told() -> None:
    built = MessageBuilder("m", prompt_tokens=5, stops=["END", "zzz"])
    deltas = [
        ChatDelta(reasoning="END"),  # that is no text
        ChatDelta("So E"),
        ChatDelta("N"),
        ChatDelta("D and on", tool_calls=(ToolCallDelta(0, "a", "add", "{}"),)),
        ChatDelta(reasoning="more"),
    ]
    read(built, deltas, completion(finish_reason="cancelled"))
    assert built.stopped
    assert [block.type for block in built.message.content] == ["thinking", "text"]
    assert built.message.content[1].model_dump()["text"] == "So "
    assert (built.message.stop_reason, built.message.stop_sequence) == ("stop_sequence", "END")


def test_what_was_only_the_beginning_of_a_stop_sequence_is_text() -> None:
    built = MessageBuilder("m", prompt_tokens=5, stops=["END"])
    events = read(built, [ChatDelta("So EN"), ChatDelta(tool_calls=(ToolCallDelta(0, "a", "add", "{}"),))], completion())
    assert [block.type for block in built.message.content] == ["text", "tool_use"]
    assert built.message.content[0].model_dump()["text"] == "So EN"
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]


def test_a_tool_use_that_was_cut_off_has_what_is_there_of_it() -> None:
    for arguments, expected in [('{"a": 1, "b": "x', {"a": 1, "b": "x"}), ("", {}), ("nonsense", {}), ("[1]", {})]:
        built = MessageBuilder("m", prompt_tokens=5)
        read(built, [ChatDelta(tool_calls=(ToolCallDelta(0, "a", "add", arguments),))], completion(finish_reason="length"), max_tokens=3)
        assert built.message.content[0].model_dump()["input"] == expected
        assert built.message.stop_reason == "max_tokens"
