"""Several models and engines of one process on one worker: none disturbs another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_moe import Device, Engine, Model, SamplingParams
from llama_moe.bandwidth import bandwidths

GREEDY = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


def load(path: Path, device: Device) -> Model:
    return Model(path, experts="gpu", devices=device, repack=False)


def engine_on(model: Model) -> Engine:
    return Engine(model, context_size=512, threads=1)


def test_an_engine_goes_on_while_others_come_and_go(path: Path, accelerator: Device) -> None:
    with load(path, accelerator) as model, engine_on(model) as engine:
        expected = engine.generate(PROMPT, GREEDY).tokens
        with load(path, accelerator) as other, engine_on(other) as idle, engine_on(model) as sibling:
            assert idle.generate(PROMPT, GREEDY).tokens == sibling.generate(PROMPT, GREEDY).tokens == expected
            with engine.stream(PROMPT, GREEDY) as stream:
                tokens = [next(stream).id for _ in range(20)]
                for ended in (sibling, idle, other):  # each frees memory on the worker
                    ended.close()
                    tokens += [next(stream).id for _ in range(20)]
                load(path, accelerator).close()
                tokens += [token.id for token in stream]
        assert tuple(tokens) == expected
        assert engine.generate(PROMPT, GREEDY).tokens == expected


def test_an_engine_goes_on_while_the_worker_is_measured(
    path: Path, accelerator: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_MOE_CACHE", str(tmp_path))
    with load(path, accelerator) as model, engine_on(model) as engine:
        expected = engine.generate(PROMPT, GREEDY).tokens
        with engine.stream(PROMPT, GREEDY) as stream:
            tokens = [next(stream).id for _ in range(20)]
            bandwidths(devices=[accelerator], threads=1)
            tokens += [token.id for token in stream]
        assert tuple(tokens) == expected


def test_engines_that_compute_at_the_same_time_do_not_get_each_others_results(path: Path, accelerator: Device) -> None:
    with load(path, accelerator) as one, load(path, accelerator) as two:
        engines = [engine_on(one), engine_on(one), engine_on(two)]
        expected = engines[0].generate(PROMPT, GREEDY).tokens
        texts: list[tuple[int, ...]] = []

        def generate(engine: Engine) -> None:
            texts.extend(engine.generate(PROMPT, GREEDY).tokens for _ in range(8))

        threads = [threading.Thread(target=generate, args=[engine]) for engine in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(texts) == 8 * len(engines)
        assert set(texts) == {expected}
