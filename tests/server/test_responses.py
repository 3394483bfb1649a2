"""The Responses API, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from tests.support.servers import ServerProcess

ADD: Any = {
    "type": "function",
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
# A beginning from which also random weights call a tool, and end.
BEGUN: Any = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "<tool_call>\n"}]
BEGUN_OPTIONS: Any = {"continue_final_message": True}
THOUGHT = {"grammar": r'root ::= "<think>\nI think.\n</think>\n\nSo it is."'}


class Verdict(BaseModel):
    ok: bool


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text_is_answered(client: OpenAI) -> None:
    response = client.responses.create(
        model="tools", input="Hello", instructions="Be brief.", max_output_tokens=8, temperature=0, metadata={"mine": "yes"}
    )
    assert response.output_text
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert (response.object, response.model, response.instructions, response.max_output_tokens) == ("response", "tools", "Be brief.", 8)
    assert (response.metadata, response.temperature) == ({"mine": "yes"}, 0)
    # Random weights never end by themselves.
    assert (response.status, message.status) == ("incomplete", "incomplete")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8
    again = client.responses.create(model="tools", input="Hello", instructions="Be brief.", max_output_tokens=8, temperature=0)
    assert again.output_text == response.output_text
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_a_stream_tells_of_the_same_response(client: OpenAI) -> None:
    whole = client.responses.create(model="tools", input="Hello", max_output_tokens=12, temperature=0)
    events = list(client.responses.create(model="tools", input="Hello", max_output_tokens=12, temperature=0, stream=True))
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3  # as it comes
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text


def test_reasoning_is_an_item_of_its_own(client: OpenAI) -> None:
    response = client.responses.create(model="tools", input="Why?", extra_body=THOUGHT)
    reasoning, message = response.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert reasoning.content is not None
    assert reasoning.content[0].text == "I think."
    assert isinstance(message, ResponseOutputMessage)
    assert (response.output_text, response.status) == ("So it is.", "completed")
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    with client.responses.stream(model="tools", input="Why?", extra_body=THOUGHT) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "I think."
    assert final.output_text == "So it is."
    # The conversation goes on with what was returned.
    follow_up: Any = [{"role": "user", "content": "Why?"}, *response.output, {"role": "user", "content": "Really?"}]
    assert client.responses.create(model="tools", input=follow_up, max_output_tokens=4).output_text


def test_thinking_can_be_switched_off(client: OpenAI) -> None:
    def prompt_tokens(**options: Any) -> int:
        usage = client.responses.create(model="tools", input="Why?", max_output_tokens=1, **options).usage
        assert usage is not None
        return int(usage.input_tokens)

    # The template then writes an empty thought into the prompt.
    assert prompt_tokens(reasoning={"effort": "none"}) > prompt_tokens(reasoning={"effort": "high"}) == prompt_tokens()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_answered(client: OpenAI, streamed: bool) -> None:
    options: Any = {"model": "tools", "input": BEGUN, "tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    options["max_output_tokens"] = 300
    finished: list[Response] = []
    for seed in range(6):  # some call of random weights ends in time
        options["extra_body"] = BEGUN_OPTIONS | {"seed": seed}
        if streamed:
            events: list[Any] = list(client.responses.create(**options, stream=True))
            done = [event for event in events if event.type == "response.function_call_arguments.done"]
            parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
            assert "".join(parts) == "".join(event.arguments for event in done)
            assert len(parts) > len(done)
            response = events[-1].response
        else:
            response = client.responses.create(**options)
        if response.status == "completed":
            finished.append(response)
    for response in finished:
        (call,) = response.output  # one, as was asked for
        assert isinstance(call, ResponseFunctionToolCall)
        arguments = json.loads(call.arguments)
        assert call.name == "add"
        assert arguments["a"] in range(10)
        assert arguments["b"] in ("x", "y")
    call = finished[0].output[0]
    assert isinstance(call, ResponseFunctionToolCall)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    conversation: Any = [{"role": "user", "content": "Add."}, call, result]
    answer = client.responses.create(model="tools", input=conversation, tools=[ADD], max_output_tokens=4)
    assert answer.output


def test_an_answer_can_be_parsed_as_a_model_of_the_client(client: OpenAI) -> None:
    response = client.responses.parse(
        model="tools", input="Is it?", text_format=Verdict, reasoning={"effort": "none"}, temperature=0, extra_body={"seed": 1}
    )
    assert isinstance(response.output_parsed, Verdict)
    with client.responses.stream(
        model="tools", input="Is it?", text_format=Verdict, reasoning={"effort": "none"}, temperature=0, extra_body={"seed": 1}
    ) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_a_text_has_log_probabilities_if_asked_for(client: OpenAI) -> None:
    response = client.responses.create(
        model="tools", input="Hello", max_output_tokens=5, include=["message.output_text.logprobs"], top_logprobs=2
    )
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    (text,) = message.content
    assert text.type == "output_text"
    assert text.logprobs is not None
    assert len(text.logprobs) == 5
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in text.logprobs)


def test_the_asynchronous_client_is_answered_too(server: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.responses.create(model="tools", input=f"Hello {index}", max_output_tokens=6) for index in range(8))
            )
            assert all(answer.output_text for answer in answers)
            async with client.responses.stream(model="tools", input="Why?", extra_body=THOUGHT) as stream:
                types = [event.type async for event in stream]
                assert (await stream.get_final_response()).output_text == "So it is."
            assert types[-1] == "response.completed"

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize(
    ("options", "error", "reason", "param"),
    [
        ({"model": "missing"}, openai.NotFoundError, "'missing' does not exist", "model"),
        ({"previous_response_id": "resp_1"}, openai.BadRequestError, "keeps no responses", "previous_response_id"),
        ({"background": True}, openai.BadRequestError, "background is not supported", "background"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "'function'", None),
        ({"input": []}, openai.BadRequestError, "at least 1 item", None),
        ({"tool_choice": {"type": "function", "name": "x"}}, openai.BadRequestError, "the tools are none", "tool_choice"),
        ({"tool_choice": "required"}, openai.BadRequestError, "there are no tools", None),
        ({"input": "word " * 3000}, openai.BadRequestError, "the context holds 1024", None),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
            openai.BadRequestError,
            "nonsense",
            None,
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_those_of_the_client(  # noqa: PLR0917
    client: OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], reason: str, param: str | None, stream: bool
) -> None:
    with pytest.raises(error, match=reason) as caught:
        client.responses.create(**{"model": "tools", "input": "Hello", "max_output_tokens": 2, "stream": stream, **options})
    assert caught.value.type == "invalid_request_error"
    assert param is None or caught.value.param == param


def test_nothing_is_kept_to_be_retrieved(client: OpenAI) -> None:
    response = client.responses.create(model="tools", input="Hello", max_output_tokens=2, store=True)
    assert response.model_extra == {"store": False}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_stream_has_named_events_and_no_end_mark(server: ServerProcess) -> None:
    body = {"model": "tools", "input": "Hello", "max_output_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
