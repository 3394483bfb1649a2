"""What many tests need: small models, and a worker process that stands in for an accelerator.

A device cannot be taken back from llama.cpp. Once some test asked for `accelerator` it is there for all later ones, so a test that does not
want it says `devices=[]`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_moe
from llama_moe import Device, Model
from llama_moe.demo_model import demo_model_path, dense_model_path
from llama_moe.worker import Worker
from tests.support.loops import Loops, Run
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a tiny model by its name, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("tiny_models")

    @functools.cache
    def path_of(name: str) -> Path:
        return write_tiny_model(folder / f"{name}.gguf", name)

    return path_of


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    # One thread: on a machine with few cores more of them only wait for each other.
    with Worker(threads=1) as worker:
        yield worker


@pytest.fixture(scope="session")
def accelerator(worker: Worker) -> Device:
    """The worker's device."""
    (device,) = llama_moe.add_rpc_device(worker.endpoint)
    return device


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    """A tiny model on the CPU, which tests must not close. Its weights are F32, so it computes the same whatever the batch."""
    with Model(tiny_model("llama"), experts="gpu", devices=[], repack=False) as model:
        yield model


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo Mixture-of-Experts model."""
    return demo_model_path()


@pytest.fixture(scope="session")
def dense_path() -> Path:
    """The dense model that the demo model was made from."""
    return dense_model_path()


@pytest.fixture(scope="session")
def demo_model(demo_path: Path) -> Iterator[Model]:
    """The demo model on the CPU, which tests must not close: for what needs some seconds of work to look at."""
    with Model(demo_path, experts="gpu", devices=[]) as model:
        yield model


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Loops:
    """Makes event loops: asyncio's own, and uvloop's."""
    if request.param == "uvloop":
        return pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop  # type: ignore[no-any-return]
    return asyncio.new_event_loop


@pytest.fixture
def run(new_loop: Loops) -> Run:
    """`asyncio.run` with either kind of loop."""

    def run_on_new_loop(main: Coroutine[Any, Any, Any]) -> Any:
        loop = new_loop()
        try:
            return loop.run_until_complete(asyncio.wait_for(main, 240))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    return run_on_new_loop
