"""Conversations from asyncio: the same answers, and as easily left as any stream."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_moe import AsyncChatStream, ChatCompletion, ChatDelta, Engine, Model, SamplingParams, _core
from llama_moe.errors import ClosedError, ContextFullError, InvalidOptionError, LlamaMoeError, RequestTimeoutError
from tests.support import chat_templates as templates
from tests.support.conversations import ADD, BEGUN_CALL, QUESTION, joined
from tests.support.loops import Run, until

GREEDY = SamplingParams(max_tokens=20, temperature=0, logprobs=1)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LONG_QUESTION = [{"role": "user", "content": "z" * 16000}]


@pytest.fixture(scope="module")
def chat_model(tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    with Model(tiny_model("qwen3moe"), experts="gpu", devices=[], repack=False) as model:
        yield model


@pytest.fixture(scope="module")
def engine(chat_model: Model) -> Iterator[Engine]:
    with Engine(chat_model, context_size=1024, max_sequences=3, threads=1) as engine:
        yield engine


@pytest.fixture
def one_place(chat_model: Model) -> Iterator[Engine]:
    """An engine with room for one request, which may be a long one."""
    with Engine(chat_model, context_size=32768, max_sequences=1, micro_batch_size=16, threads=1) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Iterator[None]:
    gc.collect()
    before = _core.live_objects()
    yield
    gc.collect()
    after = _core.live_objects()
    assert {name: after[name] for name in ("generations", "notifiers")} == {name: before[name] for name in ("generations", "notifiers")}


async def is_free(engine: Engine) -> None:
    """Waits until no answer is left in the engine, which none may have left by filling the context; the next one comes."""
    await until(lambda: engine.stats()["requests_running"] == engine.stats()["requests_waiting"] == 0)
    stats = engine.stats()
    assert stats["prompt_tokens"] < 15000
    assert stats["generated_tokens"] < 15000
    assert len((await engine.achat(QUESTION, SHORT)).tokens) == 4


async def deltas_of(stream: AsyncChatStream) -> list[ChatDelta]:
    return [delta async for delta in stream]


def same(one: ChatCompletion, other: ChatCompletion) -> bool:
    """But for the time they took and what the cache had of their prompts."""
    return (one.text, one.reasoning, one.tokens, one.finish_reason, one.prompt_tokens) == (
        other.text,
        other.reasoning,
        other.tokens,
        other.finish_reason,
        other.prompt_tokens,
    ) and [(call.name, call.arguments) for call in one.tool_calls] == [(call.name, call.arguments) for call in other.tool_calls]


# ---- the same answers


def test_achat_gives_what_chat_gives(engine: Engine, run: Run) -> None:
    answer = run(engine.achat(QUESTION, GREEDY))
    assert same(answer, engine.chat(QUESTION, GREEDY))
    assert [token.id for token in answer.logprobs] == list(answer.tokens)


def test_astream_chat_gives_what_stream_chat_gives(engine: Engine, run: Run) -> None:
    expected = list(engine.stream_chat(QUESTION, GREEDY))

    async def main() -> None:
        async with engine.astream_chat(QUESTION, GREEDY) as stream:
            with pytest.raises(LlamaMoeError, match="no completion"):
                _ = stream.completion
            assert "running" in repr(stream)
            deltas = await deltas_of(stream)
        assert joined(deltas) == joined(expected)
        assert stream.completion.text == joined(expected)[0]
        assert (await engine.astream_chat(QUESTION, GREEDY).read_all()).tokens == stream.completion.tokens
        assert "length" in repr(stream)
        assert await deltas_of(stream) == []

    run(main())


def test_many_conversations_at_once(model: Model, run: Run) -> None:
    conversations = [[{"role": "user", "content": f"Is it {number}?"}] for number in range(6)]
    # What computes the same whatever the batch.
    with Engine(model, context_size=256, max_sequences=3, threads=1, kv_type="f32", flash_attention="off") as engine:
        expected = [engine.chat(conversation, GREEDY, template=templates.CHATML) for conversation in conversations]

        async def main() -> list[ChatCompletion]:
            return await asyncio.gather(*(engine.achat(each, GREEDY, template=templates.CHATML) for each in conversations))

        assert all(same(one, other) for one, other in zip(run(main()), expected, strict=True))


def test_every_option_of_a_chat_reaches_its_template(engine: Engine, run: Run) -> None:
    options: dict[str, Any] = {
        "template": "{{ messages[0]['content'] }} {{ mood }} {{ enable_thinking }} {% if add_generation_prompt %}>{% endif %}",
        "template_options": {"mood": "good"},
        "enable_thinking": False,
        "add_generation_prompt": False,
    }

    async def main() -> None:
        answers = [await engine.achat(QUESTION, GREEDY, **options), await engine.astream_chat(QUESTION, GREEDY, **options).read_all()]
        assert all(same(answer, engine.chat(QUESTION, GREEDY, **options)) for answer in answers)
        answer = await engine.achat(
            QUESTION,
            SamplingParams(seed=1, max_tokens=400),
            response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["yes"]}}},
        )
        assert answer.text.strip() == '"yes"'

    run(main())


def test_streamed_tool_calls_are_those_of_the_whole_answer(engine: Engine, run: Run) -> None:
    options: dict[str, Any] = {"tools": [ADD], "tool_choice": "required", "continue_final_message": True, "template": templates.HERMES}

    async def main() -> None:
        finished = 0
        for seed in range(6):
            params = SamplingParams(seed=seed, max_tokens=300)
            stream = engine.astream_chat(BEGUN_CALL, params, **options)
            content, reasoning, calls = joined(await deltas_of(stream))
            answer = stream.completion
            assert (content, reasoning) == (answer.text, answer.reasoning)
            assert calls == [(call.id, call.name, call.arguments) for call in answer.tool_calls]
            assert same(answer, await engine.achat(BEGUN_CALL, params, **options))
            assert same(answer, engine.chat(BEGUN_CALL, params, **options))
            finished += answer.finish_reason == "tool_calls"
        assert finished > 0

    run(main())


def test_bad_conversations_are_refused_at_once(engine: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(InvalidOptionError, match="messages is empty"):
            engine.astream_chat([])
        with pytest.raises(InvalidOptionError, match="robot"):
            await engine.achat([{"role": "robot", "content": "x"}])
        with pytest.raises(ContextFullError):
            await engine.achat(LONG_QUESTION)
        with pytest.raises(InvalidOptionError, match="timeout"):
            await engine.achat(QUESTION, timeout=0)

    run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        engine.astream_chat(QUESTION)


# ---- leaving early


@pytest.mark.parametrize("leave", ["aclose", "with", "break", "drop", "exception", "cancel", "cancel in a thread"])
def test_leaving_an_answer_frees_its_place(leave: str, one_place: Engine, run: Run) -> None:
    async def main() -> None:
        stream = one_place.astream_chat(QUESTION, ENDLESS)
        first = await anext(stream)
        assert first.content
        if leave == "aclose":
            await stream.aclose()
            await stream.aclose()
            assert await deltas_of(stream) == []
            assert stream.completion.finish_reason == "cancelled"
            assert stream.completion.text.startswith(first.content)
        elif leave == "with":
            async with stream:
                pass
            assert stream.completion.finish_reason == "cancelled"
        elif leave == "exception":
            with pytest.raises(ZeroDivisionError):  # noqa: PT012 the block is what is left
                async with stream:
                    async for _ in stream:
                        raise ZeroDivisionError
        elif leave == "break":
            del stream
            async for _ in one_place.astream_chat(QUESTION, ENDLESS):
                break
        elif leave == "cancel":
            stream.cancel()
            await deltas_of(stream)
            assert stream.completion.finish_reason == "cancelled"
        elif leave == "cancel in a thread":
            threading.Thread(target=stream.cancel).start()
            await deltas_of(stream)
            assert stream.completion.finish_reason == "cancelled"
        if leave != "break":
            del stream
        await is_free(one_place)

    run(main())


@pytest.mark.parametrize("call", ["achat", "astream_chat"])
@pytest.mark.parametrize("phase", ["prompt", "decode"])
def test_cancelling_the_task_frees_the_place(call: str, phase: str, one_place: Engine, run: Run) -> None:
    messages = LONG_QUESTION if phase == "prompt" else QUESTION

    async def main() -> None:
        answer = one_place.achat(messages, ENDLESS) if call == "achat" else one_place.astream_chat(messages, ENDLESS).read_all()
        task = asyncio.ensure_future(answer)
        await until(lambda: one_place.stats()["requests_running"] == 1)
        if phase == "decode":
            await until(lambda: one_place.stats()["generated_tokens"] > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await is_free(one_place)

    run(main())


def test_closing_an_answer_wakes_the_task_that_waits_for_it(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        stream = one_place.astream_chat(LONG_QUESTION, ENDLESS)
        reader = asyncio.create_task(deltas_of(stream))
        await asyncio.sleep(0)  # it begins to wait
        await until(lambda: one_place.stats()["requests_running"] == 1)
        await stream.aclose()
        assert "".join(map(str, await reader)) == ""
        assert stream.completion.finish_reason == "cancelled"
        await is_free(one_place)

    run(main())


@pytest.mark.parametrize("messages", [QUESTION, LONG_QUESTION], ids=["decode", "prompt"])
def test_an_answer_ends_at_its_timeout(messages: list[dict[str, str]], one_place: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(RequestTimeoutError, match=r"within its timeout of 0\.1 s"):
            await one_place.achat(messages, ENDLESS, timeout=0.1)
        await is_free(one_place)
        stream = one_place.astream_chat(messages, ENDLESS, timeout=0.1)
        with pytest.raises(TimeoutError):
            await deltas_of(stream)
        assert await deltas_of(stream) == []
        with pytest.raises(LlamaMoeError, match=r"no completion.*failed"):
            _ = stream.completion
        assert "failed" in repr(stream)
        await is_free(one_place)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(one_place.achat(messages, ENDLESS), 0.1)
        await is_free(one_place)
        assert len((await one_place.achat(QUESTION, SHORT, timeout=200)).tokens) == 4

    run(main())


def test_closing_the_engine_ends_its_answers(chat_model: Model, run: Run) -> None:
    async def main() -> None:
        engine = Engine(chat_model, context_size=32768, max_sequences=2, threads=1)
        tasks = [asyncio.create_task(engine.achat(QUESTION, ENDLESS)) for _ in range(4)]
        await until(lambda: engine.stats()["generated_tokens"] > 10)
        threading.Thread(target=engine.close).start()
        assert [answer.finish_reason for answer in await asyncio.gather(*tasks)] == ["cancelled"] * 4
        with pytest.raises(ClosedError):
            await engine.achat(QUESTION)

    run(main())
