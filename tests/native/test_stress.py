"""Everything at once for a minute: many threads, random requests, cancels, timeouts and closed engines."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llama_moe import Engine, Model, SamplingParams, Speculative, _core
from llama_moe.errors import CancelledError, ClosedError, QueueFullError, RequestTimeoutError
from tests.support.chat_templates import CHATML
from tests.support.waiting import eventually

THREADS = 32
SECONDS = float(os.environ.get("LLAMA_MOE_STRESS_SECONDS", "60"))
SHARED = [list(range(20, 20 + size)) for size in (3, 40, 90)]


class Stress:
    """One model and a few engines over it, which are closed and made again while all threads use them."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = folder
        self.model = Model(path, experts="gpu", devices=[], repack=False)
        self.end = time.monotonic() + SECONDS
        self.lock = threading.Lock()
        self.engines = [self.make_engine(index) for index in range(3)]
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[BaseException] = []
        self.resident: list[int] = []

    def make_engine(self, index: int) -> Engine:
        pool = 512 if index == 1 else None
        speculative = Speculative.lookup(ngram_size=1, draft_tokens=3) if index == 2 else None
        return Engine(
            self.model,
            context_size=256,
            context_pool=pool,
            max_sequences=4,
            max_queue=16,
            threads=1,
            micro_batch_size=64,
            speculative=speculative,
        )

    def work(self, number: int) -> None:
        chance = random.Random(number)
        try:
            while time.monotonic() < self.end:
                with self.lock:
                    index = chance.randrange(len(self.engines))
                    engine = self.engines[index]
                try:
                    outcome = chance.choice(ACTIONS)(self, engine, chance)
                except (CancelledError, ClosedError, QueueFullError, RequestTimeoutError) as error:
                    outcome = type(error).__name__
                with self.lock:
                    self.outcomes[outcome] += 1
                if number == 0:
                    self.replace(chance)
        except BaseException as error:  # noqa: BLE001 told by the test
            self.unexpected.append(error)

    def replace(self, chance: random.Random) -> None:
        """Closes an engine that others use, now and then."""
        if chance.random() < 0.05:
            index = chance.randrange(len(self.engines))
            with self.lock:
                old, self.engines[index] = self.engines[index], self.make_engine(index)
            old.close()
            self.resident.append(psutil.Process().memory_info().rss)


def prompt_of(chance: random.Random) -> list[int]:
    return chance.choice(SHARED) + [chance.randrange(3, 250) for _ in range(chance.randrange(1, 60))]


def params_of(chance: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=chance.randrange(1, 60),
        temperature=chance.choice([0, 1.0]),
        seed=chance.randrange(100),
        logprobs=chance.choice([None, None, 2]),
        stop=chance.choice([(), ("e",)]),
        repeat_penalty=chance.choice([1.0, 1.3]),
    )


def generate(_: Stress, engine: Engine, chance: random.Random) -> str:
    return engine.generate(prompt_of(chance), params_of(chance)).finish_reason


def generate_several(_: Stress, engine: Engine, chance: random.Random) -> str:
    engine.generate([prompt_of(chance) for _ in range(5)], params_of(chance))
    return "several"


def leave_a_stream(_: Stress, engine: Engine, chance: random.Random) -> str:
    for index, _token in enumerate(engine.stream(prompt_of(chance), params_of(chance))):
        if index == chance.randrange(20):
            break
    return "left"


def close_a_stream(_: Stress, engine: Engine, chance: random.Random) -> str:
    with engine.stream(prompt_of(chance), params_of(chance)) as stream:
        if chance.random() < 0.5:
            next(stream, None)
    return stream.completion.finish_reason


def time_out(_: Stress, engine: Engine, chance: random.Random) -> str:
    engine.generate(prompt_of(chance), params_of(chance), timeout=chance.choice([0.001, 0.02, 5]))
    return "in time"


def cancel_a_task(_: Stress, engine: Engine, chance: random.Random) -> str:
    async def main() -> str:
        task = asyncio.ensure_future(engine.agenerate(prompt_of(chance), params_of(chance)))
        await asyncio.sleep(chance.choice([0, 0.005]))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return "task cancelled"
        return "task done"

    return asyncio.run(main())


def score_and_embed(_: Stress, engine: Engine, chance: random.Random) -> str:
    engine.score(prompt_of(chance))
    engine.embed(prompt_of(chance))
    return "scored"


def chat(_: Stress, engine: Engine, chance: random.Random) -> str:
    messages = [{"role": "user", "content": chance.choice(["Hello", "What is it?", "a b c " * 10])}]
    if chance.random() < 0.3:
        for _delta in engine.stream_chat(messages, params_of(chance), template=CHATML):
            break
        return "chat left"
    engine.chat(messages, params_of(chance), template=CHATML)
    return "chatted"


def stream_in_a_loop(_: Stress, engine: Engine, chance: random.Random) -> str:
    async def main() -> str:
        stream = engine.astream(prompt_of(chance), params_of(chance))
        async for _token in stream:
            if chance.random() < 0.05:
                await stream.aclose()
        return f"async {stream.completion.finish_reason}"

    return asyncio.run(main())


def save_and_load_a_prefix(stress: Stress, engine: Engine, chance: random.Random) -> str:
    path = stress.folder / str(threading.get_ident())
    engine.save_prefix(prompt_of(chance), path)
    engine.load_prefix(path)
    if chance.random() < 0.5:
        engine.clear_prefixes()
    return "prefix"


def look(stress: Stress, engine: Engine, chance: random.Random) -> str:
    engine.stats()
    engine.memory()
    return "looked"


ACTIONS: list[Callable[[Stress, Engine, random.Random], str]] = [
    generate,
    generate_several,
    leave_a_stream,
    close_a_stream,
    time_out,
    cancel_a_task,
    score_and_embed,
    chat,
    stream_in_a_loop,
    save_and_load_a_prefix,
    look,
]


EXPECTED = {
    "stop",
    "length",
    "several",
    "left",
    "task cancelled",
    "scored",
    "chatted",
    "chat left",
    "async length",
    "async cancelled",
    "prefix",
    "RequestTimeoutError",
}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 4 + 120)
def test_many_threads_for_a_minute(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    gc.collect()
    before = _core.live_objects()
    stress = Stress(tiny_model("llama"), tmp_path)
    threads = [threading.Thread(target=stress.work, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 60)
    assert not any(thread.is_alive() for thread in threads)
    assert stress.unexpected == [], stress.unexpected
    assert set(stress.outcomes) >= EXPECTED, stress.outcomes
    # Engines were closed under load: what ran in them was cancelled, and who came too late was told.
    assert stress.outcomes["ClosedError"] + stress.outcomes["CancelledError"] + stress.outcomes["cancelled"] > 0
    assert stress.resident
    for engine in stress.engines:
        stats = engine.stats()
        assert stats["requests_running"] == stats["requests_waiting"] == 0 or eventually(
            lambda engine=engine: engine.stats()["requests_running"] == 0  # type: ignore[misc]
        )
    # Memory grows while engines and threads are made for the first time and each thread's heap finds its size, and not after that.
    resident = stress.resident
    half = resident[len(resident) // 3 : 2 * len(resident) // 3]
    if half and SECONDS >= 30:
        assert max(resident[-len(half) :]) < max(half) + (32 << 20), [size >> 20 for size in resident]
    stress.model.close()
    with pytest.raises(ClosedError):
        stress.engines[0].generate([5])
    del stress, engine
    gc.collect()
    assert _core.live_objects() == before
