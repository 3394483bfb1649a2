"""Requests of the Messages API as conversations."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_moe.server.errors import ApiError
from llama_moe.server.messages_input import chat_messages, effort, offered_tools, response_format, thinks
from llama_moe.server.messages_models import MessageRequest

ADD = {"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": "é"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "3"}


def request(*messages: dict[str, Any], **fields: Any) -> MessageRequest:
    return MessageRequest.model_validate(
        {"model": "m", "max_tokens": 10, "messages": list(messages) or [{"role": "user", "content": "Hello"}], **fields}
    )


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_the_system_prompt_comes_first() -> None:
    assert chat_messages(request(system="Be brief.")) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    blocks = [{"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "Two."}]
    assert chat_messages(request(system=blocks))[0] == {"role": "system", "content": "One.\nTwo."}


def test_neighbours_of_one_role_are_one_message() -> None:
    messages = chat_messages(request(user("1"), user([{"type": "text", "text": "2"}, {"type": "text", "text": "3"}]), assistant("4")))
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}, {"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "4"},
    ]


def test_a_tool_round_trip_becomes_messages_of_the_chat_api() -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    messages = chat_messages(
        request(
            user("Add."),
            assistant([thinking, redacted, {"type": "text", "text": "I add."}, USE]),
            user([RESULT, {"type": "text", "text": "And now?"}]),
        )
    )
    assert messages == [
        {"role": "user", "content": "Add."},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "add", "content": "3"},
        {"role": "user", "content": "And now?"},
    ]


def test_a_failed_tool_says_so() -> None:
    failed = {**RESULT, "is_error": True, "content": [{"type": "text", "text": "no such number"}]}
    assert chat_messages(request(user("Add."), assistant([USE]), user([failed])))[-1]["content"] == "Error: no such number"
    silent = {"type": "tool_result", "tool_use_id": "t1"}
    assert chat_messages(request(user("Add."), assistant([USE]), user([silent])))[-1]["content"] == ""


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("Add."), user([RESULT])], r"messages\.1\.content\.0: there is no tool use 't1' in the message before it"),
        ([user("Add."), assistant([USE]), user("Well?")], r"messages\.2: the tool use 't1' before it has no tool_result in it"),
        ([user("Add."), assistant([USE])], r"'t1' has no tool_result"),
        ([user([USE])], r"messages\.0\.content\.0: a tool_use block belongs to the assistant, not to the user"),
        ([user("Add."), assistant([USE, RESULT])], r"messages\.1\.content\.1: a tool_result block belongs to the user"),
    ],
)
def test_tool_uses_and_results_go_together(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        chat_messages(request(*messages))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        (None, "auto", True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}, True),
    ],
)
def test_a_tool_choice_is_one_of_the_chat_api(choice: object, expected: object, parallel: bool) -> None:
    tools, chosen, several = offered_tools(request(tools=[ADD], tool_choice=choice))
    assert tools == [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
    assert (chosen, several) == (expected, parallel)


def test_a_tool_that_is_chosen_has_to_be_there() -> None:
    with pytest.raises(ApiError, match=r"the tool 'divide'; the tools are 'add'"):
        offered_tools(request(tools=[ADD], tool_choice={"type": "tool", "name": "divide"}))


def test_thinking_is_off_unless_it_is_asked_for() -> None:
    assert not thinks(request())
    assert not thinks(request(thinking={"type": "disabled"}))
    assert thinks(request(thinking={"type": "enabled", "budget_tokens": 1024}))
    assert thinks(request(thinking={"type": "adaptive"}))


def test_an_output_config_says_the_form() -> None:
    form = request(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"})
    assert response_format(form) == {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert effort(form) == "low"
    assert (response_format(request()), effort(request())) == (None, None)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [user([{"type": "image", "source": {}}])]}, "image"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'user'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'custom'"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": 1.5}, "less than or equal to 1"),
        ({"stop_sequences": [""]}, "at least 1 character"),
    ],
)
def test_what_is_not_of_the_api_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        request(**fields)
