"""Chat templates, the answers' parsers, and both together on an engine."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llama_moe import ChatDelta, ChatPrompt, ChatTemplate, Engine, Model, SamplingParams, _core
from llama_moe.errors import ClosedError, ContextFullError, InvalidOptionError, LlamaMoeError, RequestTimeoutError
from tests.support import chat_templates as templates
from tests.support.conversations import ADD, BEGUN_CALL, QUESTION, WEATHER, joined

ALL = {name: getattr(templates, name) for name in ("CHATML", "LLAMA3", "HERMES", "DEEPSEEK_R1", "MISTRAL")}


@pytest.fixture(scope="module")
def chat_model(tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    """A tiny model with a chat template of its own."""
    with Model(tiny_model("qwen3moe"), experts="gpu", devices=[], repack=False) as model:
        yield model


@pytest.fixture(scope="module")
def engine(chat_model: Model) -> Iterator[Engine]:
    with Engine(chat_model, context_size=1024, max_sequences=2, threads=1) as engine:
        yield engine


def read(prompt: ChatPrompt, text: str, size: int) -> tuple[_core.ChatMessage, list[ChatDelta]]:
    """The message that `text` is, read in pieces of `size`, and all deltas."""
    parser = prompt.parser()
    deltas = [delta for at in range(0, len(text), size) for delta in parser.push(text[at : at + size])]
    deltas += parser.finish()
    return parser._native.message, deltas


# ---- prompts


def test_a_conversation_becomes_the_templates_prompt(chat_model: Model) -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ]
    text = chat_model.chat_format().apply(conversation).text
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHel\nlo<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_model.chat_format().apply(conversation, add_generation_prompt=False).text == text.removesuffix("<|im_start|>assistant\n")
    # Control tokens are tokens, and nothing is added.
    ids = chat_model.tokenize(text, parse_special=True)
    assert chat_model.detokenize(ids, special=True) == text


def test_a_text_begins_with_one_beginning_of_text(model: Model) -> None:
    """This model's vocabulary adds one by itself, and the template writes one."""
    text = ChatTemplate(model, templates.LLAMA3).apply(QUESTION).text
    ids = model.tokenize(text, parse_special=True)
    assert ids.count(model.bos_token or 0) == 1
    assert ids[0] == model.bos_token


def test_a_template_is_parsed_once(chat_model: Model) -> None:
    assert chat_model.chat_format() is chat_model.chat_format()
    assert chat_model.chat_format(templates.HERMES) is chat_model.chat_format(templates.HERMES)
    for number in range(20):
        chat_model.chat_format(templates.CHATML + f"{{# {number} #}}")
    assert len(chat_model._chat_formats) <= 8


def test_options_reach_the_template(chat_model: Model) -> None:
    chat = ChatTemplate(chat_model, "{{ messages[0]['content'] }} {{ mood }} {{ days | tojson }} {{ enable_thinking }}")
    text = chat.apply(QUESTION, template_options={"mood": "good", "days": [1, 2]}, enable_thinking=False).text
    assert text == "What is it? good [1, 2] False"
    with pytest.raises(InvalidOptionError, match="mood"):
        chat.apply(QUESTION, template_options={"mood": object()})


def test_thinking_can_be_switched_off(chat_model: Model) -> None:
    chat = chat_model.chat_format(templates.HERMES)
    assert chat.apply(QUESTION, enable_thinking=False).text.endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in chat.apply(QUESTION).text


def test_tools_and_their_results_are_in_the_prompt(chat_model: Model) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "The weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "sunny"},
    ]
    for template in (templates.HERMES, templates.MISTRAL):
        text = chat_model.chat_format(template).apply(conversation, tools=[WEATHER]).text
        assert '"get_weather", "arguments": {"city": "Rome"}' in text
        assert "Tells the weather." in text
        assert "sunny" in text


# ---- what is refused


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ([*QUESTION, {"content": "x"}], r"messages\[1\] has no role"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\] has the role 'robot'"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\] has the content 3"),
        ([*QUESTION, {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"messages\[1\].*image_url"),
        ([*QUESTION, "text"], r"messages\[1\] is 'text'"),
        ([{"role": "assistant", "tool_calls": [{"type": "function"}]}], "function"),
        ([{"role": "user", "content": "\ud800"}], "messages"),
    ],
)
def test_a_bad_message_is_refused_by_its_place(chat_model: Model, messages: list[Any], reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason):
        chat_model.chat_format().apply(messages)


def test_messages_are_a_sequence(chat_model: Model) -> None:
    for wrong in ("text", {"role": "user", "content": "x"}, 3):
        with pytest.raises(TypeError, match="messages"):
            chat_model.chat_format().apply(wrong)  # type: ignore[arg-type]


def test_a_model_without_a_template_says_so(model: Model) -> None:
    with pytest.raises(InvalidOptionError, match=r"no chat template.*template="):
        model.chat_format()
    assert model.chat_format(templates.CHATML).apply(QUESTION).text.startswith("<|im_start|>user")


@pytest.mark.parametrize(("template", "reason"), [("", "empty"), ("{% for x in %}", "cannot be used"), ("{{ unclosed", "cannot be used")])
def test_a_bad_template_is_refused(chat_model: Model, template: str, reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason):
        chat_model.chat_format(template)
    with pytest.raises(TypeError, match="template"):
        ChatTemplate(chat_model, 3)  # type: ignore[arg-type]


def test_a_template_may_refuse_a_conversation(chat_model: Model) -> None:
    chat = ChatTemplate(
        chat_model, "{% if messages | length > 1 %}{{ raise_exception('one question only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    with pytest.raises(InvalidOptionError, match="one question only"):
        chat.apply([*QUESTION, *QUESTION])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\]"),
        ({"tools": [{"type": "search", "function": {"name": "x"}}]}, r"tools\[0\]"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "'other'.*get_weather"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [WEATHER], "params": SamplingParams(grammar='root ::= "x"')}, "grammar"),
        ({"response_format": {"type": "xml"}}, "xml"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "word"}}}}, "word"),
        ({"response_format": {"type": "json_object"}, "params": SamplingParams(json_schema={})}, "one of them"),
        ({"continue_final_message": True}, "assistant"),
    ],
)
def test_options_that_cannot_be_are_refused(chat_model: Model, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason):
        chat_model.chat_format(templates.HERMES).apply(QUESTION, **options)


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "DEEPSEEK_R1"])
def test_tools_need_a_template_with_a_place_for_them(chat_model: Model, name: str) -> None:
    chat = chat_model.chat_format(ALL[name])
    assert not chat.capabilities()["supports_tools"]
    with pytest.raises(InvalidOptionError, match="no place for them"):
        chat.apply(QUESTION, tools=[WEATHER])
    assert chat.apply(QUESTION, tools=[WEATHER], tool_choice="none").text == chat.apply(QUESTION).text


# ---- answers

HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
HERMES_CALL_2 = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
MISTRAL_CALL = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "123456789"}]'
# Template, text; then content, reasoning and tool calls.
Answer = tuple[str, str, str, str, list[tuple[str, Mapping[str, object]]]]
ANSWERS: list[Answer] = [
    ("CHATML", "Good day.\nYes.", "Good day.\nYes.", "", []),
    ("LLAMA3", "", "", "", []),
    ("HERMES", "plain text", "plain text", "", []),
    ("HERMES", "<think>\nLet me see.\n</think>\n\nIt is 3.", "It is 3.", "Let me see.", []),
    ("HERMES", HERMES_CALL, "", "", [("get_weather", {"city": "Paris", "days": 2})]),
    ("HERMES", "I look.\n" + HERMES_CALL, "I look.\n", "", [("get_weather", {"city": "Paris", "days": 2})]),
    ("HERMES", "<think>\nhm\n</think>\n\n" + HERMES_CALL, "", "hm", [("get_weather", {"city": "Paris", "days": 2})]),
    (
        "HERMES",
        HERMES_CALL + "\n" + HERMES_CALL_2,
        "",
        "",
        [("get_weather", {"city": "Paris", "days": 2}), ("add", {"a": 1, "b": 2})],
    ),
    ("DEEPSEEK_R1", "I think.\n</think>\n\nSo it is.", "So it is.", "I think.", []),
    ("DEEPSEEK_R1", "I never stop thinking", "", "I never stop thinking", []),
    ("MISTRAL", "Hello.", "Hello.", "", []),
    ("MISTRAL", MISTRAL_CALL, "", "", [("add", {"a": 1, "b": 2})]),
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_read_alike_in_any_pieces(chat_model: Model, answer: Answer, size: int) -> None:
    name, text, content, reasoning, calls = answer
    chat = chat_model.chat_format(ALL[name])
    tools = [WEATHER, ADD] if chat.capabilities()["supports_tools"] else None
    message, deltas = read(chat.apply(QUESTION, tools=tools, parallel_tool_calls=True), text, size)
    assert (message.content, message.reasoning) == (content, reasoning)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
    assert all(len(call.id) == 9 for call in message.tool_calls)
    assert joined(deltas) == (content, reasoning, [(call.id, call.name, call.arguments) for call in message.tool_calls])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HERMES", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("HERMES", "<tool_call>garbage</tool_call> and more"),
        ("HERMES", "</tool_call></think>"),
        ("MISTRAL", "[TOOL_CALLS]garbage"),
        ("MISTRAL", '[TOOL_CALLS][{"name": 3}]'),
    ],
)
def test_what_is_no_tool_call_is_text(chat_model: Model, name: str, text: str) -> None:
    prompt = chat_model.chat_format(ALL[name]).apply(QUESTION, tools=[WEATHER])
    for size in (1, 1000):
        message, deltas = read(prompt, text, size)
        assert not message.tool_calls
        assert message.content == text
        assert joined(deltas)[0] == text


def test_every_beginning_of_an_answer_can_be_read(chat_model: Model) -> None:
    prompt = chat_model.chat_format(templates.HERMES).apply(QUESTION, tools=[WEATHER, ADD])
    whole = "<think>\nhm\n</think>\n\nSo: " + HERMES_CALL
    for end in range(len(whole)):
        message, deltas = read(prompt, whole[:end], 5)
        for call in message.tool_calls:
            assert call.name in ("get_weather", "add")
        content, reasoning, _ = joined(deltas)
        assert (content, reasoning) == (message.content, message.reasoning)


def test_a_long_answer_is_whole(chat_model: Model) -> None:
    text = "words and more words, " * 2000
    message, deltas = read(chat_model.chat_format(templates.HERMES).apply(QUESTION), text, 5)
    assert message.content == text
    assert joined(deltas)[0] == text


def test_templates_are_used_by_many_threads(chat_model: Model) -> None:
    chat = chat_model.chat_format(templates.HERMES)
    expected = chat.apply(QUESTION, tools=[WEATHER]).text
    results: list[str] = []

    def work() -> None:
        for _ in range(5):
            prompt = chat.apply(QUESTION, tools=[WEATHER])
            read(prompt, HERMES_CALL, 9)
            results.append(prompt.text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 20


# ---- with an engine


def test_an_answer_is_what_the_prompt_generates(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20)
    answer = engine.chat(QUESTION, params)
    plain = engine.generate(engine.model.chat_format().apply(QUESTION).text, params)
    assert answer.text == str(answer) == plain.text
    assert answer.tokens == plain.tokens
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", plain.prompt_tokens)
    assert (answer.tool_calls, answer.reasoning, answer.logprobs) == ((), "", None)
    assert answer.to_message() == {"role": "assistant", "content": answer.text}


def test_a_stream_gives_the_same_answer_in_parts(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=1)
    answer = engine.chat(QUESTION, params)
    with engine.stream_chat(QUESTION, params) as stream:
        with pytest.raises(LlamaMoeError, match="no completion yet"):
            _ = stream.completion
        parts = [str(delta) for delta in stream]
    assert "".join(parts) == answer.text
    assert stream.completion.tokens == answer.tokens
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 20
    assert list(stream) == []


def test_a_closed_stream_keeps_what_was_read(engine: Engine) -> None:
    stream = engine.stream_chat(QUESTION, SamplingParams(ignore_eos=True))
    first = next(stream)
    stream.close()
    stream.close()
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith(first.content)
    assert list(stream) == []


@pytest.mark.parametrize("name", ["HERMES", "MISTRAL", "CHATML"])
def test_a_response_format_gives_json(engine: Engine, name: str) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    for seed in range(5):
        answer = engine.chat(
            QUESTION,
            SamplingParams(seed=seed, max_tokens=400),
            template=ALL[name],
            enable_thinking=False,  # which random weights never end
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        assert answer.finish_reason == "stop"
        assert json.loads(answer.text) in ({"ok": True}, {"ok": False})


@pytest.mark.parametrize(
    "response_format",
    [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {}}}],
    ids=["json_object", "any"],
)
def test_any_json_is_a_response_format(engine: Engine, response_format: dict[str, Any]) -> None:
    finished = 0
    for seed in range(12):
        answer = engine.chat(QUESTION, SamplingParams(seed=seed, max_tokens=700), response_format=response_format)
        if answer.finish_reason == "stop":
            finished += 1
            value = json.loads(answer.text)
            assert response_format["type"] != "json_object" or isinstance(value, dict)
        else:
            assert answer.text[0] == "{" or response_format["type"] != "json_object"
    assert finished > 0
    assert engine.chat(QUESTION, SamplingParams(max_tokens=3), response_format={"type": "text"}).finish_reason == "length"


def forced(text: str) -> SamplingParams:
    """Lets any model say exactly this."""
    return SamplingParams(grammar=f"root ::= {json.dumps(text)}", max_tokens=200)


@pytest.mark.parametrize(
    ("name", "said"), [("DEEPSEEK_R1", "I think.\n</think>\n\nSo it is."), ("HERMES", "<think>\nI think.\n</think>\n\nSo it is.")]
)
def test_an_engines_answer_has_its_reasoning_apart(engine: Engine, name: str, said: str) -> None:
    answer = engine.chat(QUESTION, forced(said), template=ALL[name])
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("I think.", "So it is.", "stop")
    assert answer.to_message() == {"role": "assistant", "content": "So it is.", "reasoning_content": "I think."}
    deltas = list(engine.stream_chat(QUESTION, forced(said), template=ALL[name]))
    assert joined(deltas) == ("So it is.", "I think.", [])
    assert len(deltas) > 4  # as it comes
    # The conversation goes on.
    prompt = engine.model.chat_format(templates.HERMES).apply([*QUESTION, answer.to_message(), *QUESTION])
    assert "<think>\nI think.\n</think>\n\nSo it is." in prompt.text


def test_a_streamed_tool_call_is_the_one_that_chat_gives(engine: Engine) -> None:
    finished = 0
    for seed in range(6):
        stream = engine.stream_chat(
            BEGUN_CALL,
            SamplingParams(seed=seed, max_tokens=300),
            tools=[ADD],
            tool_choice="required",
            continue_final_message=True,
            template=templates.HERMES,
        )
        deltas = list(stream)
        answer = engine.chat(
            BEGUN_CALL,
            SamplingParams(seed=seed, max_tokens=300),
            tools=[ADD],
            tool_choice="required",
            continue_final_message=True,
            template=templates.HERMES,
        )
        content, reasoning, calls = joined(deltas)
        assert (content, reasoning) == (answer.text, answer.reasoning)
        assert [call[1:] for call in calls] == [(call.name, call.arguments) for call in answer.tool_calls]  # ids are made anew
        assert calls == [(call.id, call.name, call.arguments) for call in stream.completion.tool_calls]
        assert stream.completion.finish_reason == answer.finish_reason
        if answer.finish_reason == "tool_calls":
            finished += 1
            assert sum(len(delta.tool_calls) for delta in deltas) > len(calls)  # in parts
    assert finished > 0


def test_a_tool_call_that_has_begun_is_finished_well(engine: Engine) -> None:
    """The grammar of the tool calls goes on where the prompt stops, whatever the model's random weights would like."""
    finished = 0
    for seed in range(6):
        answer = engine.chat(
            BEGUN_CALL,
            SamplingParams(seed=seed, max_tokens=300),
            tools=[ADD],
            tool_choice="required",
            continue_final_message=True,
            template=templates.HERMES,
        )
        if answer.finish_reason == "tool_calls":
            finished += 1
            for call in answer.tool_calls:
                arguments = json.loads(call.arguments)
                assert call.name == "add"
                assert set(arguments) == {"a", "b"}
                assert all(isinstance(value, int) for value in arguments.values())
            assert json.loads(json.dumps(answer.to_message()))["tool_calls"][0]["function"]["name"] == "add"
    assert finished > 0


def test_an_answer_ends_before_a_second_tool_call_unless_several_are_allowed(engine: Engine) -> None:
    finished = []
    most = 0
    for seed in range(6):
        for several in (False, True):
            stream = engine.stream_chat(
                BEGUN_CALL,
                SamplingParams(seed=seed, max_tokens=300),
                tools=[ADD],
                tool_choice="required",
                parallel_tool_calls=several,
                continue_final_message=True,
                template=templates.HERMES,
            )
            _, _, calls = joined(list(stream))
            answer = stream.completion
            assert calls == [(call.id, call.name, call.arguments) for call in answer.tool_calls]
            if several:
                most = max(most, len(calls))
            elif answer.finish_reason == "tool_calls":
                finished.append(answer)
    assert finished
    for answer in finished:
        (call,) = answer.tool_calls
        json.loads(call.arguments)
    assert most > 1


def test_chat_errors_are_those_of_generate(engine: Engine) -> None:
    with pytest.raises(ContextFullError):
        engine.chat([{"role": "user", "content": "word " * 3000}])
    assert engine.chat(QUESTION, SamplingParams(max_tokens=2)).finish_reason == "length"


def test_an_answer_ends_at_its_timeout(chat_model: Model) -> None:
    endless = SamplingParams(temperature=0, ignore_eos=True)
    long = [{"role": "user", "content": "z" * 30000}]
    with Engine(chat_model, context_size=65536, micro_batch_size=16, threads=1) as engine:
        for messages in (QUESTION, long):
            with pytest.raises(RequestTimeoutError, match=r"within its timeout of 0\.1 s"):
                engine.chat(messages, endless, timeout=0.1)
            stream = engine.stream_chat(messages, endless, timeout=0.1)
            with pytest.raises(TimeoutError):
                list(stream)
            with pytest.raises(LlamaMoeError, match=r"no completion.*failed"):
                _ = stream.completion
        assert len(engine.chat(QUESTION, SamplingParams(max_tokens=2), timeout=200).tokens) == 2


def test_after_close_a_chat_is_refused(tiny_model: Callable[[str], Path]) -> None:
    model = Model(tiny_model("qwen3moe"), experts="gpu", devices=[])
    engine = Engine(model, context_size=64, threads=1)
    chat = model.chat_format()
    engine.close()
    with pytest.raises(ClosedError):
        engine.chat(QUESTION)
    model.close()
    with pytest.raises(ClosedError):
        model.chat_format(templates.HERMES)
    with pytest.raises(ClosedError):
        chat.apply(QUESTION, response_format={"type": "json_object"})


def test_a_chat_format_does_not_keep_its_model_alive(tiny_model: Callable[[str], Path]) -> None:
    gc.collect()
    before = _core.live_objects()["models"]
    model = Model(tiny_model("qwen3moe"), experts="gpu", devices=[])
    model.chat_format().apply(QUESTION)
    del model
    gc.collect()
    assert _core.live_objects()["models"] == before


def test_the_demo_model_answers_sensibly(demo_model: Model) -> None:
    with Engine(demo_model, context_size=256) as engine:
        answer = engine.chat(
            [{"role": "system", "content": "You answer with one word."}, {"role": "user", "content": "Name the capital of Italy."}],
            SamplingParams(temperature=0, max_tokens=16),
        )
    assert "Rome" in answer.text
    assert answer.finish_reason == "stop"
