"""Requests of the Responses API as conversations."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llama_moe.server.errors import ApiError
from llama_moe.server.responses_input import chat_messages, check_supported, offered_tools, response_format
from llama_moe.server.responses_models import ResponseRequest

ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
SUBTRACT = {"type": "function", "name": "subtract"}


def request(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"model": "m", "input": "Hello", **fields})


def test_a_text_is_a_message_of_the_user() -> None:
    assert chat_messages(request()) == [{"role": "user", "content": "Hello"}]


def test_instructions_come_first_and_take_system_messages_along() -> None:
    messages = chat_messages(
        request(
            instructions="Be brief.",
            input=[
                {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
                {"role": "system", "content": "Be true."},
                {"role": "user", "content": "Hello"},
            ],
        )
    )
    assert messages == [{"role": "system", "content": "Be brief.\n\nBe kind.\n\nBe true."}, {"role": "user", "content": "Hello"}]


def test_the_items_of_an_answer_become_one_message() -> None:
    messages = chat_messages(
        request(
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "I add.", "annotations": []}],
                },
                {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}", "id": "fc_1", "status": "completed"},
                {"type": "function_call", "call_id": "b", "name": "subtract", "arguments": '{"x": 1}'},
                {"type": "function_call_output", "call_id": "a", "output": "3"},
                {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "-1"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
                {"role": "assistant", "content": "Done."},
            ]
        )
    )
    assert messages == [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "I add.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}},
                {"id": "b", "type": "function", "function": {"name": "subtract", "arguments": '{"x": 1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "name": "add", "content": "3"},
        {"role": "tool", "tool_call_id": "b", "name": "subtract", "content": "-1"},
        {"role": "assistant", "reasoning_content": "So.", "content": "Done."},
    ]


def test_reasoning_behind_an_answer_begins_another_one() -> None:
    reasoning = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    messages = chat_messages(request(input=[{"role": "assistant", "content": "1"}, reasoning, {"role": "assistant", "content": "2"}]))
    assert [message.get("content") for message in messages] == ["1", "2"]
    # Without text it is nothing: a template could not say it.
    assert chat_messages(request(input=[{"type": "reasoning", "summary": []}, {"role": "user", "content": "x"}])) == [
        {"role": "user", "content": "x"}
    ]


def test_an_output_needs_its_call() -> None:
    with pytest.raises(ApiError, match=r"input\[0\].*'call_1'.*not in the input before it"):
        chat_messages(request(input=[{"type": "function_call_output", "call_id": "call_1", "output": "3"}]))


def test_tools_have_the_shape_of_the_chat_api() -> None:
    tools, choice = offered_tools(request(tools=[ADD, SUBTRACT], tool_choice={"type": "function", "name": "subtract"}))
    assert tools == [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}},
        {"type": "function", "function": {"name": "subtract"}},
    ]
    assert choice == {"type": "function", "function": {"name": "subtract"}}
    assert offered_tools(request()) == ([], "auto")


def test_some_tools_can_be_allowed() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "subtract"}]}
    tools, choice = offered_tools(request(tools=[ADD, SUBTRACT], tool_choice=allowed))
    assert [tool["function"]["name"] for tool in tools] == ["subtract"]
    assert choice == "required"


def test_a_tool_that_is_chosen_has_to_be_there() -> None:
    with pytest.raises(ApiError, match=r"tool_choice names the function 'divide'; the tools are 'add'"):
        offered_tools(request(tools=[ADD], tool_choice={"type": "function", "name": "divide"}))


def test_a_text_format_is_a_response_format() -> None:
    assert response_format(request()) is None
    assert response_format(request(text={"format": {"type": "text"}})) is None
    assert response_format(request(text={"format": {"type": "json_object"}})) == {"type": "json_object"}
    schema = {"type": "object"}
    assert response_format(request(text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})) == {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema},
    }


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
    ],
)
def test_what_needs_a_memory_is_refused_by_its_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ApiError, match=f"{name} is not supported") as caught:
        check_supported(request(**fields))
    assert (caught.value.status, caught.value.param) == (400, name)


def test_what_changes_nothing_is_ignored() -> None:
    check_supported(request(store=True, background=False, truncation="auto", user="me", something_newer=[1]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input": []}, "at least 1 item"),
        ({"input": 3}, "valid list"),
        ({"input": [{"role": "robot", "content": "x"}]}, "'user'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input_image"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"tools": [{"type": "web_search"}]}, "'function'"),
        ({"max_output_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_output_tokens": "10"}, "valid integer"),
    ],
)
def test_what_is_not_of_the_api_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        request(**fields)
