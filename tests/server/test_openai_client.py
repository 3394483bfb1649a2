"""The endpoints of OpenAI's API, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from llama_moe import Engine, SamplingParams
from tests.support.conversations import ADD, BEGUN_CALL
from tests.support.servers import ServerProcess

Engines = Callable[[str], Engine]

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
SAME = SamplingParams(temperature=0, max_tokens=12)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

# Random weights end a number or a text only by chance.
PAINT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=240) as client:
        yield client


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# ---- models


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"chat", "thinks", "tools"}
    assert client.models.retrieve("tools").id == "tools"
    assert models["chat"].owned_by == "llama-moe"
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
        client.models.retrieve("other")


# ---- chats


def test_an_answer_is_the_engines(client: openai.OpenAI, open_engine: Engines) -> None:
    expected = open_engine("chat").chat(HELLO, SAME)
    answer = client.chat.completions.create(model="chat", messages=HELLO, **GREEDY)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == expected.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == expected.prompt_tokens + 12


def test_a_streamed_answer_comes_in_pieces_and_says_how_it_ended(client: openai.OpenAI, open_engine: Engines) -> None:
    chunks = list(
        client.chat.completions.create(model="chat", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert text_of(chunks) == open_engine("chat").chat(HELLO, SAME).text
    *pieces, last, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert len(pieces) > 3
    assert {choice.finish_reason for piece in pieces for choice in piece.choices} == {None}
    assert last.choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in [*pieces, last])
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_only_when_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="chat", messages=HELLO, stream=True, **GREEDY))
    assert all("usage" not in chunk.model_fields_set and chunk.choices for chunk in chunks)


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "chat", "messages": HELLO, "n": 3, "seed": -7, "temperature": 1.5, "max_tokens": 12}
    first = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in client.chat.completions.create(**options).choices] == texts
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert [text_of(chunks, index) for index in range(3)] == texts
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    assert first.usage.prompt_tokens < 60  # once, however many answers it has


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="chat", messages=HELLO, **GREEDY).choices[0].message.content
    assert whole
    stop = whole[len(whole) // 2 :][:3]
    for given in (stop, [stop, "never seen"]):
        choice = client.chat.completions.create(model="chat", messages=HELLO, stop=given, **GREEDY).choices[0]
        assert choice.message.content == whole.partition(stop)[0]
        assert choice.finish_reason == "stop"


def test_log_probabilities_are_those_of_the_engine(client: openai.OpenAI, open_engine: Engines) -> None:
    engine = open_engine("chat")
    expected = engine.chat(HELLO, SamplingParams(temperature=0, max_tokens=12, logprobs=3)).logprobs
    assert expected is not None
    options: dict[str, Any] = {"model": "chat", "messages": HELLO, "logprobs": True, "top_logprobs": 3, **GREEDY}
    whole = client.chat.completions.create(**options).choices[0].logprobs
    assert whole is not None
    assert whole.content is not None
    chunks = list(client.chat.completions.create(stream=True, **options))
    streamed = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs is not None for entry in choice.logprobs.content or []
    ]
    for entries in (whole.content, streamed):
        assert [bytes(entry.bytes or []) for entry in entries] == [engine.model.token_bytes(token.id) for token in expected]
        assert [entry.logprob for entry in entries] == pytest.approx([token.logprob for token in expected], abs=1e-3)
        assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in entries)


def test_a_bias_makes_a_token_certain(client: openai.OpenAI, open_engine: Engines) -> None:
    (token,) = open_engine("chat").model.tokenize("z", add_special=False)[-1:]
    answer = client.chat.completions.create(
        model="chat", messages=HELLO, logit_bias={str(token): 100}, max_tokens=3, logprobs=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [bytes(entry.bytes or []) for entry in logprobs.content or []] == [open_engine("chat").model.token_bytes(token)] * 3


def test_an_answer_is_json_of_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="chat",
        messages=HELLO,
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert set(person) == {"name", "age"}
    assert answer.choices[0].finish_reason == "stop"


def test_reasoning_has_a_place_of_its_own(server: ServerProcess) -> None:
    body = {"model": "thinks", "messages": HELLO, **GREEDY}
    message = server.client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] == ""
    with server.client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in chunks) == message["reasoning_content"]


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    """Even by a model of random weights, in the few answers in which it ends what it began."""
    options: dict[str, Any] = {
        "model": "tools",
        "messages": BEGUN_CALL,
        "max_tokens": 300,
        "tools": [PAINT, ADD],
        "tool_choice": {"type": "function", "function": {"name": "paint"}},
        "parallel_tool_calls": False,
        "extra_body": {"continue_final_message": True},
    }
    answers = (client.chat.completions.create(seed=seed, **options).choices[0] for seed in range(20))
    seed, choice = next((seed, choice) for seed, choice in enumerate(answers) if choice.finish_reason == "tool_calls")
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")

    chunks = list(client.chat.completions.create(seed=seed, stream=True, **options))
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or [] if delta.index == 0]
    functions = [delta.function for delta in deltas if delta.function is not None]
    assert deltas[0].id
    assert [function.name for function in functions] == ["paint"] + [None] * (len(functions) - 1)
    assert "".join(function.arguments or "" for function in functions) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_conversation_goes_on_after_a_tool_call(client: openai.OpenAI) -> None:
    """With the message as the client has it, fields that are null included."""
    call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": [{"type": "text", "text": "3"}]},
    ]
    options: dict[str, Any] = {"model": "tools", "messages": messages, "tools": [ADD], "tool_choice": "none"}
    answer = client.chat.completions.create(**options, **GREEDY)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.tool_calls is None


# ---- completions


def test_completions_of_all_kinds_of_prompts(client: openai.OpenAI, open_engine: Engines) -> None:
    engine = open_engine("chat")
    prompts = ["Hello", "One, two,"]
    ids = [engine.model.tokenize(prompt) for prompt in prompts]
    expected = [completion.text for completion in engine.generate(prompts, SAME)]
    for prompt, texts in ((prompts[0], expected[:1]), (ids[0], expected[:1]), (prompts, expected), (ids, expected)):
        reply = client.completions.create(model="chat", prompt=prompt, **GREEDY)
        assert [choice.text for choice in reply.choices] == texts
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(map(len, ids[: len(texts)]))
        streamed = [""] * len(texts)
        for chunk in client.completions.create(model="chat", prompt=prompt, stream=True, **GREEDY):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        assert streamed == texts


def test_completions_have_log_probabilities_with_offsets(client: openai.OpenAI, open_engine: Engines) -> None:
    completion = open_engine("chat").generate("Hello", SamplingParams(temperature=0, max_tokens=12, logprobs=2))
    assert completion.logprobs is not None
    whole = client.completions.create(model="chat", prompt="Hello", logprobs=2, **GREEDY).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.token_logprobs == pytest.approx([token.logprob for token in completion.logprobs], abs=1e-3)
    assert whole.logprobs.text_offset is not None
    for offset, token in zip(whole.logprobs.text_offset, completion.logprobs, strict=True):
        assert whole.text[offset:].startswith(token.text)
    chunks = list(client.completions.create(model="chat", prompt="Hello", logprobs=2, stream=True, **GREEDY))
    parts = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs is not None]
    assert [offset for part in parts for offset in part.text_offset or []] == whole.logprobs.text_offset
    assert [logprob for part in parts for logprob in part.token_logprobs or []] == pytest.approx(whole.logprobs.token_logprobs, abs=1e-3)


def test_a_completion_has_sixteen_tokens_unless_asked_otherwise(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="chat", prompt="Hello", temperature=0, extra_body={"ignore_eos": True})
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16


def test_sampling_fields_of_llama_cpp_are_heeded(client: openai.OpenAI) -> None:
    greedy = client.completions.create(model="chat", prompt="Hello", **GREEDY).choices[0].text
    top = client.completions.create(model="chat", prompt="Hello", max_tokens=12, temperature=5, extra_body={"top_k": 1}).choices[0].text
    assert top == greedy
    digits = client.completions.create(model="chat", prompt="Hello", extra_body={"grammar": "root ::= [0-9]{4}"}, **GREEDY).choices[0].text
    assert len(digits) == 4
    assert digits.isdigit()


# ---- embeddings and tokens


def test_embeddings_are_the_engines(client: openai.OpenAI, open_engine: Engines) -> None:
    engine = open_engine("chat")
    texts = ["Hello", "One, two,"]
    expected = engine.embed(texts)
    ids = [engine.model.tokenize(text) for text in texts]
    encodings: list[dict[str, Any]] = [{"encoding_format": "float"}, {}]  # by itself the client asks for base64
    for given in (texts, ids):
        for encoding in encodings:
            reply = client.embeddings.create(model="chat", input=given, **encoding)
            assert np.array([entry.embedding for entry in reply.data]) == pytest.approx(expected, abs=1e-3)
            assert reply.usage.prompt_tokens == sum(map(len, ids))
    single = client.embeddings.create(model="chat", input="Hello")
    assert np.array(single.data[0].embedding) == pytest.approx(expected[0], abs=1e-3)
    with pytest.raises(openai.BadRequestError, match="dimensions is 3; the embeddings of 'chat' have 64"):
        client.embeddings.create(model="chat", input="Hello", dimensions=3)


def test_text_becomes_tokens_and_text_again(server: ServerProcess, open_engine: Engines) -> None:
    model = open_engine("chat").model
    reply = server.client.post("/tokenize", json={"model": "chat", "content": "Hello, world"}).json()
    assert reply["tokens"] == model.tokenize("Hello, world", add_special=False)
    with_special = server.client.post("/tokenize", json={"model": "chat", "content": "Hello, world", "add_special": True}).json()
    assert with_special["tokens"] == model.tokenize("Hello, world")
    text = server.client.post("/detokenize", json={"model": "chat", "tokens": with_special["tokens"]}).json()
    assert text == {"content": model.detokenize(with_special["tokens"])}


# ---- asyncio


def test_sixty_four_streams_at_once_have_the_engines_texts(server: ServerProcess, open_engine: Engines) -> None:
    """Over four sequences: most of them wait for their turn."""
    prompts = [f"{number} times {number % 7} is" for number in range(64)]
    expected = [completion.text for completion in open_engine("chat").generate(prompts, SAME)]
    assert len(set(expected)) > 30

    async def text(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="chat", prompt=prompt, stream=True, **GREEDY)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def texts() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=240) as client:
            return await asyncio.gather(*(text(client, prompt) for prompt in prompts))

    assert asyncio.run(texts()) == expected


def test_chats_from_asyncio(server: ServerProcess, open_engine: Engines) -> None:
    async def answer() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=240) as client:
            whole = await client.chat.completions.create(model="chat", messages=HELLO, **GREEDY)
            return whole.choices[0].message.content

    assert asyncio.run(answer()) == open_engine("chat").chat(HELLO, SAME).text
