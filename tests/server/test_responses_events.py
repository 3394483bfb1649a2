"""Responses put together from what an answer gains, read by OpenAI's own types."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from openai.types.responses import Response as OpenAiResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from llama_moe import ChatCompletion, ChatDelta, Model, Token, ToolCall
from llama_moe.chat import ToolCallDelta
from llama_moe.results import Timings
from llama_moe.server.errors import ApiError
from llama_moe.server.responses_events import ResponseBuilder
from llama_moe.server.responses_models import Reasoning, Response, TextConfig

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def completion(**fields: Any) -> ChatCompletion:
    values: dict[str, Any] = {
        "text": "",
        "tool_calls": (),
        "reasoning": "",
        "finish_reason": "stop",
        "tokens": (1, 2, 3),
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "logprobs": None,
        "timings": Timings(0, 0, 0, 0, 0, 0),
    }
    return ChatCompletion(**{**values, **fields})


def builder(model: Model) -> ResponseBuilder:
    response = Response(
        id="resp_1",
        created_at=1,
        status="in_progress",
        instructions=None,
        max_output_tokens=None,
        metadata={},
        model="m",
        output=[],
        parallel_tool_calls=True,
        reasoning=Reasoning(),
        temperature=1,
        text=TextConfig(),
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1,
    )
    return ResponseBuilder(response, model)


def read(built: ResponseBuilder, deltas: Iterable[ChatDelta], end: ChatCompletion) -> list[dict[str, Any]]:
    events = [*built.begin(), *(event for delta in deltas for event in built.add(delta)), *built.finish(end)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:  # they can be sent, and OpenAI's client knows each
        EVENTS.validate_python(json.loads(json.dumps(event)), strict=True)
    whole = OpenAiResponse.model_validate(events[-1]["response"])
    assert whole.model_dump(include={"output"}, exclude_none=True) == OpenAiResponse.model_validate(
        built.response.model_dump(by_alias=True)
    ).model_dump(include={"output"}, exclude_none=True)
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_text_has_the_events_of_a_message(model: Model) -> None:
    built = builder(model)
    events = read(built, [ChatDelta("Hel"), ChatDelta("lo")], completion(text="Hello"))
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in events if event["type"].endswith(".delta")] == ["Hel", "lo"]
    assert events[2]["item"]["content"] == []
    assert events[-1]["response"]["status"] == events[-2]["item"]["status"] == "completed"
    assert events[-1]["response"]["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }


def test_reasoning_text_and_calls_are_items_in_their_order(model: Model) -> None:
    built = builder(model)
    calls = [
        ChatDelta(tool_calls=(ToolCallDelta(0, "a", "add", ""),)),
        ChatDelta(tool_calls=(ToolCallDelta(0, None, None, '{"x"'),)),
        ChatDelta(tool_calls=(ToolCallDelta(0, None, None, ": 1}"),)),
        ChatDelta(tool_calls=(ToolCallDelta(1, "b", "add", "{}"),)),
    ]
    ended = completion(
        text="So.",
        reasoning="Hm",
        tool_calls=(ToolCall("a", "add", '{"x": 1}'), ToolCall("b", "add", "{}")),
        finish_reason="tool_calls",
        tokens=tuple(range(20)),
    )
    events = read(built, [ChatDelta(reasoning="H"), ChatDelta(reasoning="m"), ChatDelta("So."), *calls], ended)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert output[1]["content"][0]["text"] == "So."
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[2:]] == [("a", "add", '{"x": 1}'), ("b", "add", "{}")]
    assert {item["status"] for item in output} == {"completed"}
    assert types(events)[2:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
    ]
    assert types(events)[-8:] == [
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2, 3]


def test_an_answer_that_is_cut_off_is_incomplete(model: Model) -> None:
    events = read(builder(model), [ChatDelta("Hel")], completion(text="Hel", finish_reason="length"))
    assert types(events)[-2:] == ["output_item.done", "incomplete"]
    response = events[-1]["response"]
    assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None


def test_an_empty_answer_is_an_empty_text(model: Model) -> None:
    events = read(builder(model), [], completion())
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_failure_is_an_event(model: Model) -> None:
    built = builder(model)
    list(built.begin())
    list(built.add(ChatDelta("Hel")))
    event = built.fail(ApiError(503, "it ended"))
    EVENTS.validate_python(event, strict=True)
    assert (event["type"], event["response"]["status"]) == ("response.failed", "failed")
    assert event["response"]["error"] == {"code": "server_error", "message": "it ended"}


def test_a_text_has_the_log_probabilities_of_its_own_tokens(model: Model) -> None:
    def token(text: str) -> Token:
        token_id = model.tokenize(text, add_special=False)[-1]
        return Token(token_id, text, -0.5, (Token(token_id, text, -0.5), Token(model.bos_token or 0, "", float("-inf"))))

    built = builder(model)
    events = [
        *built.add(ChatDelta(reasoning="Hm"), [token("<"), token("Hm")]),
        *built.add(ChatDelta("S"), [token(">"), token("S")]),
        *built.add(ChatDelta("o."), [token("o"), token(".")]),
        *built.add(ChatDelta(tool_calls=(ToolCallDelta(0, "a", "add", "{}"),)), [token("{}")]),
        *built.finish(completion(text="So.", reasoning="Hm")),
    ]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [[each["token"] for each in event["logprobs"]] for event in deltas] == [["S"], [" o", "."]]
    _, text, _ = events[-1]["response"]["output"]
    logprobs = text["content"][0]["logprobs"]
    assert [each["token"] for each in logprobs] == ["S", " o", "."]
    assert logprobs[0]["bytes"] == [83]
    assert [each["logprob"] for each in logprobs[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
