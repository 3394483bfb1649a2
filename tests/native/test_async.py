"""Generation from asyncio: no thread for a request, and each is freed as soon as nobody wants it any more."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_moe import AsyncTokenStream, Completion, Engine, Model, SamplingParams, Token, _core, aio
from llama_moe.errors import ClosedError, ContextFullError, InvalidOptionError, LlamaMoeError, RequestTimeoutError
from tests.support.loops import Loops, Run, until
from tests.support.processes import run_python
from tests.support.waiting import eventually

GREEDY = SamplingParams(max_tokens=20, temperature=0)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPTS = ["Hello", "The experts of the router", "a", "One, two, three, four, five", "Zebra"]


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, context_size=256, max_sequences=4, threads=1) as engine:
        yield engine


@pytest.fixture
def one_place(model: Model) -> Iterator[Engine]:
    """An engine with room for one request, which may be a long one."""
    with Engine(model, context_size=16384, max_sequences=1, micro_batch_size=16, threads=1) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left_over(model: Model, engine: Engine) -> Iterator[None]:
    def left_over() -> int:
        gc.collect()
        live = _core.live_objects()
        return live["generations"] + live["notifiers"]

    yield
    # A thread that has just handed over a result may still be about to let go of it.
    assert eventually(lambda: left_over() == 0)


async def is_free(engine: Engine) -> None:
    """Waits until no request is left in the engine, which no request may have left by filling the context; the next one runs."""
    await until(lambda: engine.stats()["requests_running"] == engine.stats()["requests_waiting"] == 0)
    stats = engine.stats()
    assert stats["prompt_tokens"] + stats["generated_tokens"] < 0.9 * engine.context_size
    assert len((await engine.agenerate("b", SHORT)).tokens) == 4


async def text_of(stream: AsyncTokenStream) -> str:
    return "".join([str(token) async for token in stream])


# ---- the same results


def test_agenerate_gives_what_generate_gives(engine: Engine, run: Run) -> None:
    async def main() -> tuple[Completion, list[Completion]]:
        return await engine.agenerate("Hello", GREEDY), await engine.agenerate(PROMPTS, GREEDY)

    one, many = run(main())
    assert one.tokens == engine.generate("Hello", GREEDY).tokens
    assert [each.tokens for each in many] == [each.tokens for each in engine.generate(PROMPTS, GREEDY)]
    assert one.finish_reason == "length"
    assert one.timings.decode_seconds > 0
    no_prompts: list[str] = []
    assert run(engine.agenerate(no_prompts)) == []


def test_many_streams_at_once_give_what_each_gives_alone(engine: Engine, run: Run) -> None:
    expected = {prompt: engine.generate(prompt, GREEDY).text for prompt in PROMPTS}

    async def read(prompt: str) -> None:
        async with engine.astream(prompt, GREEDY) as stream:
            assert await text_of(stream) == expected[prompt] == stream.completion.text
        assert stream.completion.finish_reason == "length"

    async def main() -> None:
        await asyncio.gather(*(read(prompt) for prompt in PROMPTS * 10))
        assert [await text_of(stream) for stream in engine.astream(PROMPTS, GREEDY)] == list(expected.values())

    run(main())


def test_params_and_log_probabilities_come_through(engine: Engine, run: Run) -> None:
    params = SamplingParams(max_tokens=5, temperature=0, logprobs=2)

    async def main() -> list[Token]:
        return [token async for token in engine.astream("Hello", params)]

    tokens = run(main())
    expected = engine.generate("Hello", params).logprobs
    assert expected is not None
    for token, other in zip(tokens, expected, strict=True):
        assert token.id == other.id
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)  # the prompt was in the cache: another batch, another rounding
        assert [top.id for top in token.top_logprobs or ()] == [top.id for top in other.top_logprobs or ()]


def test_other_tasks_run_meanwhile(engine: Engine, run: Run) -> None:
    async def main() -> None:
        steps = 0

        async def count() -> None:
            nonlocal steps
            while True:
                steps += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await engine.agenerate(list(range(10, 60)), SamplingParams(temperature=0, ignore_eos=True))
        counting.cancel()
        assert steps > 10

    run(main())


def test_bad_requests_are_refused_at_once(engine: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(InvalidOptionError, match="empty"):
            engine.astream([[1], []])
        with pytest.raises(ContextFullError):
            await engine.agenerate([5] * 300)

    run(main())
    with pytest.raises(RuntimeError, match="no running event loop"):
        engine.astream("a")


# ---- leaving early


def test_a_timeout_of_the_loop_frees_the_place(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(one_place.agenerate("a", ENDLESS), 0.1)
        await is_free(one_place)
        stream = one_place.astream([5] * 16000, ENDLESS)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.1)
        assert [token async for token in stream] == []
        assert stream.completion.finish_reason == "cancelled"
        await is_free(one_place)

    run(main())


def test_cancelling_a_task_in_the_middle_of_a_long_prompt_stops_the_prompt(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        task = asyncio.create_task(one_place.agenerate([5] * 16000, ENDLESS))
        await until(lambda: one_place.stats()["requests_running"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await is_free(one_place)
        assert one_place.stats()["prompt_tokens"] < 16000

    run(main())


def test_one_failure_of_several_cancels_the_others(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(RequestTimeoutError):
            await one_place.agenerate(["a", "b", "c"], ENDLESS, timeout=0.05)
        await is_free(one_place)

    run(main())


@pytest.mark.parametrize("leave", ["aclose", "with", "break", "drop", "exception", "cancel", "cancel in a thread"])
def test_leaving_a_stream_frees_its_place(leave: str, one_place: Engine, run: Run) -> None:
    async def main() -> None:
        stream = one_place.astream("a", ENDLESS)
        first = await anext(stream)
        assert first.id >= 0
        if leave == "aclose":
            await stream.aclose()
            await stream.aclose()
            assert [token async for token in stream] == []
            assert stream.completion.tokens == (first.id,)
            assert stream.completion.finish_reason == "cancelled"
        elif leave == "with":
            async with stream:
                pass
        elif leave == "exception":
            with pytest.raises(ZeroDivisionError):  # noqa: PT012 the block is what is left
                async with stream:
                    async for _ in stream:
                        raise ZeroDivisionError
        elif leave == "break":
            del stream
            async for _ in one_place.astream("a", ENDLESS):
                break
        elif leave == "cancel":
            stream.cancel()
            assert [token async for token in stream] == []
        elif leave == "cancel in a thread":
            threading.Timer(0.05, stream.cancel).start()
            async for _ in stream:
                pass
            assert stream.completion.finish_reason == "cancelled"
        if leave != "break":
            del stream
        await is_free(one_place)

    run(main())


def test_closing_a_stream_wakes_the_task_that_waits_for_it(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        stream = one_place.astream([5] * 16000, ENDLESS)
        reader = asyncio.create_task(text_of(stream))
        await asyncio.sleep(0)  # it begins to wait
        await until(lambda: one_place.stats()["requests_running"] == 1)
        with pytest.raises(RuntimeError, match="another task already waits"):
            await anext(stream)
        await stream.aclose()
        assert await reader == ""
        assert stream.completion.finish_reason == "cancelled"

    run(main())


@pytest.mark.parametrize("closer", ["here", "in a thread"])
def test_closing_the_engine_ends_its_streams(closer: str, model: Model, run: Run) -> None:
    async def main() -> None:
        engine = Engine(model, context_size=16384, max_sequences=2, threads=1)
        tasks = [asyncio.create_task(engine.agenerate("a", ENDLESS)) for _ in range(4)]
        await until(lambda: engine.stats()["generated_tokens"] > 10)
        if closer == "here":
            engine.close()
        else:
            threading.Thread(target=engine.close).start()
        assert [completion.finish_reason for completion in await asyncio.gather(*tasks)] == ["cancelled"] * 4
        with pytest.raises(ClosedError):
            await engine.agenerate("a")

    run(main())


def test_a_stream_keeps_its_engine_alive(model: Model, run: Run) -> None:
    async def main() -> None:
        stream = Engine(model, context_size=256, threads=1).astream("a", SHORT)
        gc.collect()
        assert len([token async for token in stream]) == 4

    run(main())


# ---- timeouts


@pytest.mark.parametrize("prompt", ["a", [5] * 16000], ids=["decode", "prompt"])
def test_a_request_ends_at_its_timeout(prompt: str | list[int], one_place: Engine, run: Run) -> None:
    async def main() -> None:
        with pytest.raises(RequestTimeoutError, match=r"within its timeout of 0\.1 s"):
            await one_place.agenerate(prompt, ENDLESS, timeout=0.1)
        await is_free(one_place)
        stream = one_place.astream(prompt, ENDLESS, timeout=0.1)
        behind = one_place.astream("b", SHORT, timeout=200)
        assert len([token async for token in behind]) == 4  # nobody has read the first one, and it made room all the same
        with pytest.raises(TimeoutError):
            async for _ in stream:
                pass
        with pytest.raises(LlamaMoeError, match="RequestTimeoutError"):
            _ = stream.completion

    run(main())


def test_the_wait_for_a_place_counts(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        async with one_place.astream("a", ENDLESS) as first:
            await anext(first)
            with pytest.raises(RequestTimeoutError, match="it still waited for a free sequence"):
                await one_place.agenerate("b", SHORT, timeout=0.05)
            assert one_place.stats()["requests_waiting"] == 0

    run(main())


def test_timeouts_of_the_synchronous_calls(one_place: Engine) -> None:
    with pytest.raises(RequestTimeoutError, match=r"within its timeout of 0\.1 s"):
        one_place.generate([5] * 16000, ENDLESS, timeout=0.1)
    with pytest.raises(RequestTimeoutError):
        list(one_place.stream("a", ENDLESS, timeout=0.1))
    assert len(one_place.generate("b", SHORT, timeout=200).tokens) == 4


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "1", True, [1.0]])
def test_a_timeout_that_cannot_be_meant_is_refused(timeout: Any, engine: Engine) -> None:
    error = InvalidOptionError if isinstance(timeout, float | int) and timeout is not True else TypeError
    for call in (engine.generate, engine.stream):
        with pytest.raises(error, match="timeout"):
            call("a", SHORT, timeout=timeout)


# ---- loops


def test_two_loops_in_two_threads_share_an_engine(engine: Engine, new_loop: Loops) -> None:
    expected = [engine.generate(prompt, GREEDY).tokens for prompt in PROMPTS]
    results: list[list[tuple[int, ...]]] = []

    async def main() -> list[tuple[int, ...]]:
        completions = await asyncio.gather(*(engine.agenerate(prompt, GREEDY) for prompt in PROMPTS))
        return [completion.tokens for completion in completions]

    def work() -> None:
        loop = new_loop()
        results.extend(loop.run_until_complete(main()) for _ in range(5))
        loop.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 10


@pytest.mark.parametrize("state", ["unread", "read", "waited for", "kept"])
def test_a_loop_may_be_closed_with_an_open_stream(state: str, one_place: Engine, new_loop: Loops) -> None:
    files = psutil.Process().num_fds()
    loop = new_loop()

    async def begin() -> AsyncTokenStream:
        stream = one_place.astream([5] * 16000 if state == "waited for" else "a", ENDLESS)
        if state == "read":
            await anext(stream)
        return stream

    stream = loop.run_until_complete(begin())
    if state == "waited for":
        reader = loop.create_task(text_of(stream))
        loop.run_until_complete(asyncio.sleep(0))
        reader._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio would complain, and rightly
        del reader
    loop.close()
    if state == "kept":
        with pytest.raises(RuntimeError, match="another event loop"):
            asyncio.run(text_of(stream))
    del stream, loop
    gc.collect()
    assert len(one_place.generate("b", SHORT).tokens) == 4
    assert psutil.Process().num_fds() == files


def test_a_stream_may_be_dropped_in_another_thread(one_place: Engine, run: Run) -> None:
    async def main() -> None:
        streams = [one_place.astream("a", ENDLESS)]
        thread = threading.Thread(target=streams.clear)
        thread.start()
        thread.join()
        await until(lambda: _core.live_objects()["notifiers"] == 0)
        await is_free(one_place)

    run(main())


def test_many_streams_need_one_descriptor_and_no_thread(engine: Engine, run: Run) -> None:
    process = psutil.Process()

    async def main() -> None:
        await engine.agenerate("a", SHORT)
        before = (process.num_threads(), process.num_fds())
        tasks = [asyncio.create_task(text_of(engine.astream("a", GREEDY))) for _ in range(200)]
        seen = set()
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.001)
            seen.add((process.num_threads(), process.num_fds()))
        assert seen <= {before, (before[0], before[1] + 1)}
        assert (process.num_threads(), process.num_fds()) == before
        assert len({task.result() for task in tasks}) == 1

    run(main())


def test_a_stream_that_nobody_reads_holds_up_no_other(engine: Engine, run: Run) -> None:
    async def main() -> None:
        unread = engine.astream("Hello", SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        endless = engine.astream("Hello", ENDLESS)
        await asyncio.gather(*(engine.agenerate("a", GREEDY) for _ in range(20)))
        await until(lambda: engine.stats()["requests_running"] == 0)  # both have ended: by max_tokens, and by the context's end
        assert len([token async for token in unread]) == 60
        assert len((await endless.read_all()).tokens) <= engine.context_size

    run(main())


def test_the_interpreter_ends_cleanly_in_the_middle_of_a_stream(tiny_model: Callable[[str], Path]) -> None:
    ran = run_python(
        """
        import asyncio, sys, llama_moe
        from llama_moe import SamplingParams
        llm = llama_moe.load(sys.argv[1], devices=[], context_size=32768, max_sequences=2)
        async def main():
            global stream, other
            stream = llm.astream("a", SamplingParams(temperature=0, ignore_eos=True))
            other = llm.astream("b", SamplingParams(temperature=0, ignore_eos=True))
            async for _ in stream:
                break
            asyncio.get_running_loop().create_task(anext(other))
            await asyncio.sleep(0)
            print("leaving")
        asyncio.run(main())
        """,
        tiny_model("llama"),
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "leaving\n", "")


def test_a_worker_that_dies_fails_the_task_that_waits(tiny_model: Callable[[str], Path]) -> None:
    ran = run_python(
        """
        import asyncio, os, signal, sys, llama_moe
        from llama_moe import Engine, Model, SamplingParams
        from llama_moe.errors import DecodeError
        from llama_moe.worker import Worker
        worker = Worker(threads=1)
        (device,) = llama_moe.add_rpc_device(worker.endpoint)
        engine = Engine(Model(sys.argv[1], experts="gpu", devices=device), context_size=8192, threads=1)
        async def main():
            stream = engine.astream("Hello", SamplingParams(temperature=0, ignore_eos=True))
            await anext(stream)
            os.kill(worker.pid, signal.SIGKILL)
            try:
                async for _ in stream:
                    pass
            except DecodeError as error:
                assert "the engine is lost: device 'RPC0'" in str(error), error
                print("told")
        asyncio.run(main())
        """,
        tiny_model("qwen3moe"),
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "told\n", "")


# ---- submitted on another thread


BIG = SamplingParams(temperature=0, grammar="root ::= " + " | ".join(f'"v{number} " root' for number in range(8000)))


def test_a_stream_that_is_opened_on_a_thread_is_like_any_other(run: Run, engine: Engine) -> None:
    async def main() -> None:
        ids = engine.model.tokenize("Hello")
        stream = await aio.open_stream(engine, (ids, GREEDY._to_native()), None)
        assert await text_of(stream) == (await engine.agenerate("Hello", GREEDY)).text
        with pytest.raises(ContextFullError):
            await aio.open_stream(engine, (ids * 300, GREEDY._to_native()), None)

    run(main())


def test_who_is_cancelled_while_a_stream_is_opened_leaves_nothing_behind(run: Run, one_place: Engine) -> None:
    async def main() -> None:
        ids = one_place.model.tokenize("Hello")
        opening = asyncio.create_task(aio.open_stream(one_place, (ids, BIG._to_native()), None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert one_place.stats()["requests_submitted"] == 0  # its grammar is still compiled
        await until(lambda: one_place.stats()["requests_submitted"] == one_place.stats()["requests_finished"] == 1)
        await is_free(one_place)

    run(main())
