"""Ctrl-C, and an exception of a callback, stop what runs, and leave everything usable."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_moe import Context, Device, Engine, Model, SamplingParams, TokenStream, _core
from llama_moe.errors import LlamaMoeError
from tests.support.interrupts import press_ctrl_c, stops_at_ctrl_c
from tests.support.waiting import eventually

SHORT = SamplingParams(max_tokens=3, temperature=0)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def nothing_is_left_over(model: Model, demo_model: Model, accelerator: Device) -> Iterator[None]:
    gc.collect()
    before = _core.live_objects()
    yield
    gc.collect()
    # The thread of a load that was stopped notices at its next step.
    assert eventually(lambda: _core.live_objects() == before)


class Stop(Exception):  # noqa: N818 not an error
    """Raised by a callback of the tests."""


# ---- load


def test_ctrl_c_stops_a_load(demo_path: Path, accelerator: Device) -> None:
    shares: list[float] = []

    def on_progress(share: float) -> None:
        shares.append(share)
        if len(shares) == 3:
            press_ctrl_c()  # Python handles it as soon as the callback is done, or within it

    with pytest.raises(KeyboardInterrupt):
        Model(demo_path, experts="gpu", devices=accelerator, on_progress=on_progress)
    assert 0 < shares[-1] < 1


def test_ctrl_c_stops_a_load_without_a_callback(demo_path: Path) -> None:
    def work() -> None:
        while True:  # a load may be over before the key is pressed
            Model(demo_path, experts="gpu", devices=[], check_tensors=True).close()

    stops_at_ctrl_c(work, after=0.2)


@pytest.mark.parametrize("call", [1, 2, 5])
def test_an_exception_of_the_progress_callback_stops_the_load_and_propagates(call: int, demo_path: Path, accelerator: Device) -> None:
    shares: list[float] = []

    def on_progress(share: float) -> None:
        shares.append(share)
        if len(shares) == call:
            raise Stop(share)

    with pytest.raises(Stop) as caught:
        Model(demo_path, experts="gpu", devices=accelerator, on_progress=on_progress)
    assert caught.value.args == (shares[-1],)
    assert len(shares) == call


def test_progress_goes_from_nothing_to_all(demo_path: Path, accelerator: Device) -> None:
    shares: list[float] = []
    threads: set[int] = set()

    def on_progress(share: float) -> None:
        shares.append(share)
        threads.add(threading.get_ident())

    Model(demo_path, experts="gpu", devices=accelerator, on_progress=on_progress).close()
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)
    assert len(shares) > 2
    assert threads == {threading.get_ident()}


def test_a_model_loads_after_one_that_was_stopped(tiny_model: Callable[[str], Path], demo_path: Path, accelerator: Device) -> None:
    def stop(_: float) -> None:
        raise Stop

    for _ in range(3):
        with pytest.raises(Stop):
            Model(demo_path, experts="gpu", devices=accelerator, on_progress=stop)
    with Model(tiny_model("llama"), experts="gpu", devices=accelerator) as model, Engine(model, context_size=256, threads=1) as engine:
        assert len(engine.generate("Hello", SHORT).tokens) == 3


# ---- prompt and decode: a prompt that would take a minute, and a generation that would never end


def long_prompt(tokens: int = 4000) -> list[int]:
    return [500 + number % 1000 for number in range(tokens)]


def test_ctrl_c_stops_the_prompt_of_a_context(demo_model: Model) -> None:
    with Context(demo_model, context_size=8192, threads=1) as context:
        context.decode([500, 501, 502])
        stops_at_ctrl_c(lambda: context.decode(np.array(long_prompt())))
        # As before the call: what it had computed was taken back.
        assert context.sequence_length(0) == 3
        assert context.decode([503]).shape == (1, demo_model.vocab_size)


def test_a_context_computes_the_same_after_ctrl_c(demo_model: Model) -> None:
    with Context(demo_model, context_size=8192, threads=1) as context:
        expected = context.decode([500, 501, 502])
        context.clear()
        stops_at_ctrl_c(lambda: context.decode(np.array(long_prompt())))
        np.testing.assert_array_equal(context.decode([500, 501, 502]), expected)


@pytest.mark.parametrize("phase", ["prompt", "decode"])
def test_ctrl_c_stops_generate_and_leaves_the_engine_usable(phase: str, demo_model: Model) -> None:
    with Engine(demo_model, context_size=8192, max_sequences=2, threads=1) as engine:
        expected = engine.generate("Hello", SHORT).tokens
        prompts = [long_prompt()] * 3 if phase == "prompt" else ["Once upon a time"] * 3
        stops_at_ctrl_c(lambda: engine.generate(prompts, ENDLESS))
        assert engine.generate("Hello", SHORT).tokens == expected
        stats = engine.stats()
        assert stats["requests_running"] == stats["requests_waiting"] == 0


def test_ctrl_c_stops_the_wait_for_a_token(demo_model: Model) -> None:
    with Engine(demo_model, context_size=8192, threads=1) as engine:
        expected = engine.generate("Hello", SHORT).tokens
        streams: list[TokenStream] = []

        def work() -> None:
            streams.append(engine.stream(long_prompt(), ENDLESS))
            next(streams[-1])

        stops_at_ctrl_c(work)
        stream = streams[-1]
        assert list(stream) == []
        assert stream.completion.finish_reason == "cancelled"
        assert engine.generate("Hello", SHORT).tokens == expected


def test_ctrl_c_between_two_tokens_leaves_the_stream_to_its_owner(model: Model) -> None:
    with Engine(model, context_size=256, threads=1) as engine:
        stream = engine.stream("Hello", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
        next(stream)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 the interpreter looks for signals between its instructions
            press_ctrl_c()
            for _ in range(1000):
                pass
        assert len(list(stream)) == 29
        assert stream.completion.finish_reason == "length"


@pytest.mark.parametrize("kind", ["score", "embed", "chat", "stream_chat", "agenerate", "astream", "achat"])
def test_ctrl_c_stops_every_other_call(kind: str, demo_model: Model) -> None:
    messages = [{"role": "user", "content": "Tell me a story. " * 300}]
    with Engine(demo_model, context_size=8192, threads=1) as engine:

        async def read() -> None:
            async for _ in engine.astream(long_prompt(), ENDLESS):
                pass

        work: dict[str, Callable[[], object]] = {
            "score": lambda: engine.score(long_prompt()),
            "embed": lambda: engine.embed([long_prompt()] * 2),
            "chat": lambda: engine.chat(messages, ENDLESS),
            "stream_chat": lambda: list(engine.stream_chat(messages, ENDLESS)),
            "agenerate": lambda: asyncio.run(engine.agenerate([long_prompt()] * 2, ENDLESS)),
            "astream": lambda: asyncio.run(read()),
            "achat": lambda: asyncio.run(engine.achat(messages, ENDLESS)),
        }
        stops_at_ctrl_c(work[kind])
        assert len(engine.generate("Hello", SHORT).tokens) == 3
        stats = engine.stats()
        assert stats["requests_running"] == stats["requests_waiting"] == 0


def test_ctrl_c_stops_a_wait_behind_other_requests(demo_model: Model) -> None:
    with Engine(demo_model, context_size=8192, max_sequences=1, threads=1) as engine:
        first = engine.stream("Once upon a time", ENDLESS)
        next(first)
        stops_at_ctrl_c(lambda: engine.generate("Hello", SHORT), after=0.2)
        # Only the call that was waiting was stopped.
        assert next(first).id >= 0
        assert engine.stats()["requests_waiting"] == 0


def test_ctrl_c_stops_the_work_of_a_worker(demo_path: Path, accelerator: Device) -> None:
    with (
        Model(demo_path, experts="gpu", devices=accelerator) as model,
        # What a worker has begun it ends: the engine is free again after one batch.
        Engine(model, context_size=2048, batch_size=16, threads=1) as engine,
    ):
        stops_at_ctrl_c(lambda: engine.generate(long_prompt(1500), ENDLESS))
        assert engine.stats()["prompt_tokens"] < 1500
        assert len(engine.generate("Hello", SHORT).tokens) == 3


def test_another_signals_handler_runs_during_a_wait(demo_model: Model) -> None:
    def on_signal(*_: object) -> None:
        raise Stop

    previous = signal.signal(signal.SIGUSR1, on_signal)
    try:
        with Engine(demo_model, context_size=8192, threads=1) as engine:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(Stop):
                engine.generate(long_prompt(), ENDLESS)
            assert len(engine.generate("Hello", SHORT).tokens) == 3
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_cancelling_from_another_thread_ends_the_wait_for_a_token(demo_model: Model) -> None:
    with Engine(demo_model, context_size=8192, threads=1) as engine:
        stream: TokenStream = engine.stream(long_prompt(), ENDLESS)
        timer = threading.Timer(0.2, stream.cancel)
        timer.start()
        assert list(stream) == []
        timer.join()
        assert stream.completion.finish_reason == "cancelled"
        with pytest.raises(LlamaMoeError, match="no completion yet"):
            _ = engine.stream("a", SHORT).completion
        assert len(engine.generate("Hello", SHORT).tokens) == 3
