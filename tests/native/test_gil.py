"""Other Python threads run while the native core works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llama_moe import Context, Device, Engine, Model, SamplingParams


class Witness:
    """What another thread saw of the time that a call took."""

    def __init__(self) -> None:
        self.steps = 0
        self.longest_gap = 0.0
        self.duration = 0.0


@contextmanager
def another_thread_counting() -> Iterator[Witness]:
    """Counts in a Python thread meanwhile, and notes the longest time in which it could not."""
    witness, started, ended = Witness(), threading.Event(), threading.Event()

    def count() -> None:
        last = time.perf_counter()
        started.set()
        while not ended.is_set():
            now = time.perf_counter()
            witness.longest_gap = max(witness.longest_gap, now - last)
            last = now
            witness.steps += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert started.wait(60)
        begin = time.perf_counter()
        yield witness
        witness.duration = time.perf_counter() - begin
    finally:
        ended.set()
        thread.join()


def assert_progress(witness: Witness) -> None:
    # A call that holds the GIL is one gap as long as itself; a busy machine makes some, each a small part of a call of this length.
    assert witness.longest_gap < 0.5 * witness.duration, vars(witness)
    assert witness.steps > 1000


def test_loading_lets_other_threads_run(demo_path: Path) -> None:
    with another_thread_counting() as witness:
        Model(demo_path, experts="gpu", devices=[], check_tensors=True, host_memory="pageable").close()
    assert_progress(witness)


def test_loading_onto_a_worker_lets_other_threads_run(demo_path: Path, accelerator: Device) -> None:
    with another_thread_counting() as witness:
        Model(demo_path, experts="gpu", devices=accelerator).close()
    assert_progress(witness)


def test_computing_a_prompt_lets_other_threads_run(demo_model: Model) -> None:
    with Context(demo_model, context_size=512, threads=1) as context, another_thread_counting() as witness:
        context.decode(np.full(96, 500))
    assert_progress(witness)


def test_generating_lets_other_threads_run(demo_model: Model) -> None:
    with Engine(demo_model, context_size=512, threads=1) as engine, another_thread_counting() as witness:
        engine.generate(list(range(500, 564)), SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    assert_progress(witness)


def test_streaming_lets_other_threads_run(demo_model: Model) -> None:
    with Engine(demo_model, context_size=512, threads=1) as engine, another_thread_counting() as witness:
        for _ in engine.stream("Once upon a time", SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)):
            pass
    assert_progress(witness)


def test_closing_what_another_thread_uses_takes_no_lock_with_the_gil(tiny_model: Callable[[str], Path]) -> None:
    """Threads that load, generate and close against each other end; one that waited for a lock with the GIL would stop all."""
    path = tiny_model("llama")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(4):
                with Model(path, experts="gpu", devices=[]) as model, Engine(model, context_size=256, threads=1) as engine:
                    stream = engine.stream("a", SamplingParams(temperature=0, ignore_eos=True, seed=number))
                    next(stream)
        except BaseException as error:  # noqa: BLE001 told below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
