"""The Messages API, asked by Anthropic's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock

from llama_moe import Model, SamplingParams
from llama_moe.server import ServerSettings
from tests.support.servers import ServerProcess, local_server

ADD: Any = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
HELLO: Any = [{"role": "user", "content": "Hello"}]
# A beginning from which also random weights call a tool, and end.
BEGUN: Any = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "<tool_call>\n"}]
THOUGHT = {"grammar": r'root ::= "<think>\nI think.\n</think>\n\nSo it is."'}
GREEDY = {"temperature": 0}  # which newer clients do not name
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}


def forced(text: str) -> dict[str, str]:
    return {"grammar": f'root ::= "{text}"'}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_text_is_answered(client: Anthropic) -> None:
    message = client.messages.create(model="tools", max_tokens=8, system="Be brief.", messages=HELLO, extra_body=GREEDY)
    (block,) = message.content
    assert isinstance(block, TextBlock)
    assert block.text
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == ("assistant", "tools", "max_tokens", None)
    assert message.usage.output_tokens == 8
    again = client.messages.create(model="tools", max_tokens=8, system="Be brief.", messages=HELLO, extra_body=GREEDY)
    assert again.content == message.content
    assert again.usage.cache_read_input_tokens
    # The prompt's tokens are those computed and those read from the cache, together.
    assert message.usage.cache_read_input_tokens is not None
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == (
        message.usage.input_tokens + message.usage.cache_read_input_tokens
    )


def test_a_top_p_of_zero_is_the_most_likely_token(client: Anthropic) -> None:
    texts = set()
    for sampling in ({"temperature": 0}, {"temperature": 1, "top_p": 0}, {"temperature": 1, "top_k": 1}):
        (block,) = client.messages.create(model="tools", max_tokens=4, messages=HELLO, extra_body=sampling).content
        assert isinstance(block, TextBlock)
        texts.add(block.text)
    assert len(texts) == 1


def test_a_stream_tells_of_the_same_message(client: Anthropic) -> None:
    whole = client.messages.create(model="tools", max_tokens=12, messages=HELLO, extra_body=GREEDY)
    with client.messages.stream(model="tools", max_tokens=12, messages=HELLO, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert isinstance(whole.content[0], TextBlock)
    assert isinstance(final.content[0], TextBlock)
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 12
    events = list(client.messages.create(model="tools", max_tokens=12, messages=HELLO, stream=True, extra_body=GREEDY))
    assert [event.type for event in events if event.type != "content_block_delta"] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    begin = events[0]
    assert begin.type == "message_start"
    count = client.messages.count_tokens(model="tools", messages=HELLO)
    assert begin.message.usage.input_tokens == count.input_tokens
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == count.input_tokens


def test_thinking_is_a_block_of_its_own(client: Anthropic) -> None:
    message = client.messages.create(model="tools", max_tokens=100, messages=HELLO, thinking=THINKING, extra_body=THOUGHT)
    thinking, text = message.content
    assert isinstance(thinking, ThinkingBlock)
    assert (thinking.thinking, bool(thinking.signature)) == ("I think.", True)
    assert isinstance(text, TextBlock)
    assert (text.text, message.stop_reason) == ("So it is.", "end_turn")
    with client.messages.stream(model="tools", max_tokens=100, messages=HELLO, thinking=THINKING, extra_body=THOUGHT) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert [block.model_dump(exclude={"parsed_output"}) for block in final.content] == [block.model_dump() for block in message.content]
    assert "".join(event.thinking for event in events if event.type == "thinking") == "I think."
    # The conversation goes on with what was returned.
    follow_up: Any = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": "Really?"}]
    assert client.messages.create(model="tools", max_tokens=4, messages=follow_up).content
    # The thought is in its prompt: without, it is shorter.
    without: Any = [*HELLO, {"role": "assistant", "content": [text]}, {"role": "user", "content": "Really?"}]
    counts = [client.messages.count_tokens(model="tools", messages=messages).input_tokens for messages in (follow_up, without)]
    assert counts[0] > counts[1]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_used_and_its_result_answered(client: Anthropic, streamed: bool) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    options: Any = {"model": "tools", "max_tokens": 300, "messages": BEGUN, "tools": [ADD], "tool_choice": choice}
    finished: list[Any] = []
    for seed in range(6):  # some call of random weights ends in time
        options["extra_body"] = {"seed": seed}
        if streamed:
            with client.messages.stream(**options) as stream:
                assert sum(event.type == "input_json" for event in stream) > 1
                message: Message = stream.get_final_message()
        else:
            message = client.messages.create(**options)
        if message.stop_reason == "tool_use":
            finished.append(message)
    for message in finished:
        (use,) = message.content  # one, as was asked for
        assert isinstance(use, ToolUseBlock)
        assert use.name == "add"
        assert set(use.input) == {"a", "b"}
        assert use.input["a"] in range(10)
    conversation: Any = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": finished[0].content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": finished[0].content[0].id, "content": "3"}]},
    ]
    assert client.messages.create(model="tools", max_tokens=4, messages=conversation, tools=[ADD]).content


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_sequence_is_told(client: Anthropic, streamed: bool) -> None:
    options: Any = {"model": "tools", "max_tokens": 100, "messages": HELLO, "stop_sequences": ["zzz", "four"]}
    options["extra_body"] = forced("one two three four five six")
    if streamed:
        with client.messages.stream(**options) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**options)
    (block,) = message.content
    assert isinstance(block, TextBlock)
    assert block.text == "one two three "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "four")


def test_an_answer_goes_on_with_the_assistants_message(client: Anthropic) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "one two"}]
    message = client.messages.create(model="tools", max_tokens=100, messages=messages, extra_body=forced(" three"))
    assert isinstance(message.content[0], TextBlock)
    assert message.content[0].text == " three"


def test_an_answer_has_the_form_that_is_asked_for(client: Anthropic) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    message = client.messages.create(
        model="tools", max_tokens=400, messages=HELLO, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert isinstance(message.content[0], TextBlock)
    assert "".join(message.content[0].text.split()) in ('{"ok":true}', '{"ok":false}')


def test_an_answer_at_the_end_of_the_context_says_so(client: Anthropic) -> None:
    message = client.messages.create(model="tools", max_tokens=2000, messages=[{"role": "user", "content": "word " * 300}])
    assert message.stop_reason == "model_context_window_exceeded"


def test_the_asynchronous_client_is_answered_too(server: ServerProcess) -> None:
    async def main() -> None:
        async with AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            messages = await asyncio.gather(*(client.messages.create(model="tools", max_tokens=6, messages=HELLO) for _ in range(8)))
            assert all(message.content for message in messages)
            async with client.messages.stream(model="tools", max_tokens=100, messages=HELLO, extra_body=forced("So it is.")) as stream:
                assert "".join([text async for text in stream.text_stream]) == "So it is."

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize(
    ("options", "error", "kind", "reason"),
    [
        ({"model": "missing"}, anthropic.NotFoundError, "not_found_error", "'missing' does not exist"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, anthropic.BadRequestError, "invalid_request_error", "role"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error", "max_tokens"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, anthropic.BadRequestError, "invalid_request_error", "the tools are none"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, anthropic.BadRequestError, "invalid_request_error", "holds 1024"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            anthropic.BadRequestError,
            "invalid_request_error",
            "image",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_those_of_the_client(  # noqa: PLR0917
    client: Anthropic, options: dict[str, Any], error: type[anthropic.APIStatusError], kind: str, reason: str, stream: bool
) -> None:
    with pytest.raises(error, match=reason) as caught:
        client.messages.create(**{"model": "tools", "messages": HELLO, "max_tokens": 2, "stream": stream, **options})
    assert caught.value.type == kind
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "error"


def test_what_is_not_there_is_an_error_of_that_api(server: ServerProcess) -> None:
    response = httpx.get(f"{server.url}/v1/messages")
    assert response.status_code == 405
    assert response.json()["error"]["type"] == "invalid_request_error"
    response = httpx.post(f"{server.url}/v1/messages/batches", json={})
    assert response.status_code == 404
    assert response.json() == {"type": "error", "error": {"type": "not_found_error", "message": "there is no POST /v1/messages/batches"}}


def test_a_prompt_becomes_tokens_once(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize, texts = Model.tokenize, []

    def noted(model: Model, text: str, **options: bool) -> list[int]:
        texts.append(text)
        return tokenize(model, text, **options)

    settings = ServerSettings(models=[models_dir / "tools.gguf"], experts="cpu", devices=[], context_size=256, threads=1)
    with local_server(settings) as local, Anthropic(base_url=local.url, api_key="none", max_retries=0) as client:
        count = client.messages.count_tokens(model="tools", messages=HELLO).input_tokens
        monkeypatch.setattr(Model, "tokenize", noted)
        begin = next(iter(client.messages.create(model="tools", max_tokens=1, messages=HELLO, stream=True)))
        assert begin.type == "message_start"
        assert begin.message.usage.input_tokens == count
        assert len(texts) == 1


def test_the_key_is_that_of_the_client(models_dir: Path) -> None:
    settings = ServerSettings(model_dirs=[models_dir], experts="cpu", devices=[], context_size=256, threads=1, api_key="the-key")
    with local_server(settings) as local:
        with Anthropic(base_url=local.url, api_key="another", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                client.messages.create(model="tools", max_tokens=1, messages=HELLO)
            assert caught.value.type == "authentication_error"
        with Anthropic(base_url=local.url, api_key="the-key", max_retries=0) as client:
            assert client.messages.create(model="tools", max_tokens=1, messages=HELLO).usage.output_tokens == 1


def test_a_full_queue_is_an_overload(models_dir: Path) -> None:
    settings = ServerSettings(
        models=[models_dir / "tools.gguf"], experts="cpu", devices=[], context_size=1024, parallel=1, max_queue=1, threads=1
    )
    with local_server(settings) as local, Anthropic(base_url=local.url, api_key="none", max_retries=0) as client:
        (served,) = local.state.pool.loaded()
        endless = served.engine.stream(["Hello", "Hello"], SamplingParams(ignore_eos=True))  # one runs, one waits
        try:
            with pytest.raises(anthropic.InternalServerError) as caught:
                client.messages.create(model="tools", max_tokens=1, messages=HELLO)
        finally:
            for stream in endless:
                stream.close()
        assert caught.value.type == "overloaded_error"
        assert caught.value.response.headers["retry-after"] == "1"
