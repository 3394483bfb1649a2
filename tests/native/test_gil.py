"""Other Python threads run while the native core works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama_moe import Context, Device, Engine, Model, SamplingParams


class Witness:
    """What another thread saw of the time that a call took."""

    def __init__(self) -> None:
        self.steps = 0
        self.longest_gap = 0.0
        self.duration = 0.0


def watch(work: Callable[[], object]) -> Witness:
    """Counts in a Python thread while `work` runs, and notes the longest time in which it could not."""
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
        work()
        witness.duration = time.perf_counter() - begin
    finally:
        ended.set()
        thread.join()
    return witness


def assert_others_run(work: Callable[[], object]) -> None:
    """A call that holds the GIL is one gap as long as itself each time; a busy machine makes long ones too, but not each of several."""
    tries: list[Witness] = []
    while len(tries) < 5:
        tries.append(watch(work))
        if tries[-1].longest_gap < 0.5 * tries[-1].duration and tries[-1].steps > 1000:
            return
    raise AssertionError([vars(witness) for witness in tries])


def test_loading_lets_other_threads_run(demo_path: Path) -> None:
    assert_others_run(lambda: Model(demo_path, experts="gpu", devices=[], check_tensors=True, host_memory="pageable").close())


def test_loading_onto_a_worker_lets_other_threads_run(demo_path: Path, accelerator: Device) -> None:
    assert_others_run(lambda: Model(demo_path, experts="gpu", devices=accelerator).close())


def test_computing_a_prompt_lets_other_threads_run(demo_model: Model) -> None:
    with Context(demo_model, context_size=512, threads=1) as context:
        assert_others_run(lambda: context.decode(np.full(96, 500)))


def test_generating_lets_other_threads_run(demo_model: Model) -> None:
    with Engine(demo_model, context_size=512, threads=1) as engine:
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        assert_others_run(lambda: engine.generate(list(range(500, 564)), params))


def test_streaming_lets_other_threads_run(demo_model: Model) -> None:
    with Engine(demo_model, context_size=512, threads=1) as engine:
        params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
        assert_others_run(lambda: list(engine.stream("Once upon a time", params)))


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
