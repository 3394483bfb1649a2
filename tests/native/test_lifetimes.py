"""Closing in any order, leaving in the middle, and forgetting to close."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import llama_moe
from llama_moe import Context, Engine, Model, SamplingParams, _core
from llama_moe.errors import ClosedError, LlamaMoeError
from tests.support.processes import run_python

ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0)
# Some seconds of tokens: what generates without end is far from the context's end when it is left.
LONG = 65536


@pytest.fixture
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def nothing_is_left_over() -> Iterator[None]:
    gc.collect()
    before = _core.live_objects()
    yield
    gc.collect()
    assert _core.live_objects() == before


def open_model(path: Path) -> Model:
    return Model(path, experts="gpu", devices=[])


def test_closing_the_model_closes_what_is_on_it(path: Path) -> None:
    model = open_model(path)
    engine, context = Engine(model, context_size=256), Context(model, context_size=256)
    model.close()
    assert model.closed
    assert engine.closed
    assert context.closed
    for use in (
        lambda: engine.generate("a", SHORT),
        engine.memory,
        lambda: context.decode([1]),
        lambda: context.sequence_length(0),
        lambda: model.tokenize("a"),
        model.memory,
        lambda: Engine(model),
        lambda: Context(model),
    ):
        with pytest.raises(ClosedError):
            use()


def test_closing_is_idempotent_in_any_order(path: Path) -> None:
    model = open_model(path)
    engine, context = Engine(model, context_size=256), Context(model, context_size=256)
    for thing in (engine, model, context, context, model, engine):
        thing.close()
        assert thing.closed


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "engine", "context", "stream"])), ids=" ".join)
def test_everything_closes_in_any_order_while_it_is_in_use(path: Path, order: tuple[str, ...]) -> None:
    model = open_model(path)
    engine, context = Engine(model, context_size=4096, threads=1), Context(model, context_size=256, threads=1)
    stream = engine.stream("a", ENDLESS)
    next(stream)
    context.decode([1, 2, 3])
    close = {"model": model.close, "engine": engine.close, "context": context.close, "stream": stream.close}
    for name in order:
        close[name]()
    assert model.closed
    assert engine.closed
    assert context.closed
    assert stream.completion.finish_reason == "cancelled"


def test_properties_stay_readable_after_closing(path: Path) -> None:
    with open_model(path) as model, Engine(model, context_size=256) as engine:
        pass
    assert model.architecture == "llama"
    assert model.layer_count > 0
    assert len(model.placement) > 0
    assert engine.context_size == 256
    assert "closed" in repr(model)


def test_load_owns_its_model(path: Path) -> None:
    with llama_moe.load(path, devices=[], context_size=256) as llm:
        model = llm.model
        assert not model.closed
    assert model.closed


def test_a_model_outlives_one_engine(path: Path) -> None:
    with open_model(path) as model:
        with Engine(model, context_size=256) as first:
            expected = first.generate("a", SHORT).tokens
        with Engine(model, context_size=256) as second:
            assert second.generate("a", SHORT).tokens == expected


def test_forgetting_to_close_frees_everything(path: Path) -> None:
    llm = llama_moe.load(path, devices=[], context_size=256)
    stream = llm.stream("a", ENDLESS)
    next(stream)
    del llm, stream  # the fixture looks


def test_a_stream_keeps_its_engine_alive(path: Path) -> None:
    stream = llama_moe.load(path, devices=[], context_size=256).stream("a", SamplingParams(max_tokens=8, temperature=0))
    gc.collect()
    assert len(list(stream)) == 8


def assert_freed(llm: Engine) -> None:
    """There is one sequence only: the next request runs when the one before it is gone, and that did not go by its own end."""
    assert len(llm.generate("b", SHORT).tokens) == 4
    assert llm.stats()["generated_tokens"] < LONG // 2


@pytest.mark.parametrize("leave", ["close", "with", "delete", "exception"])
def test_leaving_a_stream_frees_its_sequence(path: Path, leave: str) -> None:
    with llama_moe.load(path, devices=[], context_size=LONG, max_sequences=1, threads=1) as llm:
        stream = llm.stream("a", ENDLESS)
        assert next(stream).id >= 0
        if leave == "close":
            stream.close()
            assert stream.completion.finish_reason == "cancelled"
            assert list(stream) == []
        elif leave == "with":
            with stream:
                pass
        elif leave == "exception":
            with pytest.raises(ZeroDivisionError), stream:
                raise ZeroDivisionError
        del stream
        assert_freed(llm)


def test_breaking_out_of_a_loop_over_a_stream_cancels_it(path: Path) -> None:
    with llama_moe.load(path, devices=[], context_size=LONG, threads=1) as llm:
        for _ in llm.stream("a", ENDLESS):
            break
        assert_freed(llm)


@pytest.mark.parametrize("closer", ["engine", "model"])
def test_closing_ends_a_stream_that_another_thread_reads(path: Path, closer: str) -> None:
    llm = llama_moe.load(path, devices=[], context_size=32768)
    started = threading.Event()
    ended: list[str] = []

    def read() -> None:
        with llm.stream("a", ENDLESS) as stream:
            for _ in stream:
                started.set()
        ended.append(stream.completion.finish_reason)

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    (llm if closer == "engine" else llm.model).close()
    reader.join(60)
    llm.close()
    assert ended == ["cancelled"]


def test_closing_ends_a_decode_in_another_thread(demo_model: Model) -> None:
    context = Context(demo_model, context_size=8192, threads=1)
    failures: list[BaseException] = []
    begun = threading.Event()

    def decode() -> None:
        begun.set()
        try:
            for _ in range(100):
                context.decode(np.full(80, 7))
        except LlamaMoeError as error:
            failures.append(error)

    thread = threading.Thread(target=decode)
    thread.start()
    assert begun.wait(60)
    context.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(failures) == 1


def test_the_interpreter_ends_cleanly_in_the_middle_of_everything(path: Path) -> None:
    ran = run_python(
        """
        import sys, threading, llama_moe
        from llama_moe import SamplingParams
        llm = llama_moe.load(sys.argv[1], devices=[], context_size=32768, max_sequences=2)
        stream = llm.stream("a", SamplingParams(temperature=0, ignore_eos=True))
        other = llm.stream("b", SamplingParams(temperature=0, ignore_eos=True))
        next(stream)
        threading.Thread(target=lambda: list(other), daemon=True).start()
        print("leaving")
        """,
        path,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "leaving\n", "")


def test_the_interpreter_ends_cleanly_while_threads_come_and_go(path: Path) -> None:
    ran = run_python(
        """
        import sys, threading, llama_moe
        llm = llama_moe.load(sys.argv[1], devices=[], max_sequences=2)
        def ask():
            while True:
                llm.closed
        for _ in range(8):
            threading.Thread(target=ask, daemon=True).start()
        print("leaving")
        """,
        path,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "leaving\n", "")


def settled_threads() -> int:
    """How many threads the process has once none comes or goes."""
    process = psutil.Process()
    counts: list[int] = [process.num_threads()]
    while counts[-20:] != 20 * counts[-1:]:
        time.sleep(0.01)
        counts.append(process.num_threads())
    return counts[-1]


@pytest.mark.skipif("OPENMP" not in llama_moe.build_info()["cpu_features"], reason="ggml's own threads stay, asleep")
def test_what_waits_keeps_no_threads_of_its_last_computation(path: Path) -> None:
    def use() -> int:
        with (
            open_model(path) as model,
            Engine(model, context_size=256, threads=2) as engine,
            Context(model, context_size=256, threads=2) as context,
        ):
            engine.generate("a", SHORT)
            context.decode([1])
            return settled_threads()

    use()  # some threads are the process's, and stay
    before = settled_threads()
    assert use() == before + 2  # one of the engine's and one of the context's
