"""A worker that dies or hangs takes with it what was on it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import run_python

# In a process of its own: what was on a dead worker stays unusable for as long as a process lives.
BEGIN = """
import atexit, os, signal, sys, threading
import llama_moe
from llama_moe import Context, Engine, Model, SamplingParams
from llama_moe.errors import ClosedError, DecodeError, InvalidOptionError, LlamaMoeError, PlacementError, RequestTimeoutError
from llama_moe.worker import Worker

path = sys.argv[1]
SHORT = SamplingParams(max_tokens=4, temperature=0)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)

def kill(worker):
    os.kill(worker.pid, signal.SIGKILL)

def halt(worker):
    os.kill(worker.pid, signal.SIGSTOP)

def go_on(worker):
    os.kill(worker.pid, signal.SIGCONT)

def fails(error, action, *arguments):
    try:
        action(*arguments)
    except error as caught:
        return str(caught)
    raise AssertionError(f"{action} did not fail")

worker = Worker(threads=1)
atexit.register(kill, worker)  # one that is halted does not notice that we ended
(device,) = llama_moe.add_rpc_device(worker.endpoint)
NAME = f"device 'RPC0' ({worker.endpoint})"
FAILED = f"{NAME} failed: its worker ended, or the connection to it broke"
HANGS = f"{NAME} failed: its worker has not answered for"
expected = llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False).generate("Hello", SHORT).tokens
model = Model(path, experts="gpu", devices=device)
engine = Engine(model, context_size=8192, threads=1)
assert engine.generate("Hello", SHORT).tokens == expected
"""

DEATHS = {
    "while a stream is read": """
        other = Engine(model, context_size=256, threads=1)
        context = Context(model, context_size=256, threads=1)
        stream = engine.stream("Hello", ENDLESS)
        next(stream)
        kill(worker)
        assert not engine.lost
        assert f"the engine is lost: {FAILED}" in fails(DecodeError, list, stream)
        assert engine.lost
        for use in (lambda: engine.generate("a", SHORT), lambda: other.generate("a", SHORT), lambda: context.decode([1])):
            assert FAILED in fails(DecodeError, use)
        assert f"device 'RPC0' ({worker.endpoint}) failed earlier" in fails(PlacementError, lambda: Model(path, devices=[device]))
        assert f"the RPC worker at {worker.endpoint} failed earlier" in fails(LlamaMoeError, llama_moe.add_rpc_device, worker.endpoint)
        (dead,) = [found for found in llama_moe.devices() if found.name == "RPC0"]
        assert (dead.memory_free, dead.memory_total) == (0, 0)
    """,
    "while a context decodes": """
        context = Context(model, context_size=8192, threads=1)
        killer = threading.Timer(0.2, kill, [worker])
        killer.start()
        def decode():
            while True:
                context.clear()
                context.decode([7] * 1000)
        assert FAILED in fails(DecodeError, decode)
        assert "lost" in fails(DecodeError, context.decode, [1])
    """,
    "between two requests": """
        kill(worker)
        assert FAILED in fails(DecodeError, lambda: engine.generate("Hello", SHORT))
    """,
    "before everything is closed": """
        second = Engine(model, context_size=256, threads=1)
        context = Context(model, context_size=256, threads=1)
        kill(worker)
        for thing in (second, context, engine, model):
            thing.close()
            assert thing.closed
        fails(ClosedError, lambda: engine.generate("Hello", SHORT))
    """,
    "before a load": """
        kill(worker)
        assert FAILED in fails(LlamaMoeError, lambda: Model(path, devices=[device]))
        assert "failed earlier" in fails(PlacementError, lambda: Model(path, devices=[device]))
        with Model(path) as fresh:  # without being named it is not chosen
            assert set(fresh.placement.by_device()) == {"CPU"}
    """,
    "before the devices are listed": """
        kill(worker)
        fails(LlamaMoeError, llama_moe.devices)
        assert [found.name for found in llama_moe.devices()] == ["CPU", "RPC0"]
    """,
    "while another worker works": """
        healthy = Worker(threads=1)
        (good,) = llama_moe.add_rpc_device(healthy.endpoint)
        both = Model(path, experts="gpu", devices=good)
        second = Engine(both, context_size=8192, threads=1)
        stream = second.stream("Hello", ENDLESS)
        next(stream)
        kill(worker)
        assert FAILED in fails(DecodeError, lambda: engine.generate("Hello", SHORT))
        assert next(stream).id >= 0
        stream.close()
        assert second.generate("Hello", SHORT).tokens == expected
        assert Engine(Model(path, experts="cpu", devices=good), context_size=256, threads=1).generate("Hello", SHORT).tokens == expected
    """,
}

HANGS = {
    "while a stream is read": """
        llama_moe.add_rpc_device(worker.endpoint, answer_timeout=0.5)
        other = Engine(model, context_size=256, threads=1)
        stream = engine.stream("Hello", ENDLESS)
        next(stream)
        halt(worker)
        assert f"the engine is lost: {HANGS}" in fails(DecodeError, list, stream)
        for use in (lambda: engine.generate("a", SHORT), lambda: other.generate("a", SHORT)):
            assert HANGS in fails(DecodeError, use)
        assert f"{NAME} failed earlier" in fails(PlacementError, lambda: Model(path, devices=[device]))
        for thing in (engine, other, model):
            thing.close()
    """,
    "before a load": """
        llama_moe.add_rpc_device(worker.endpoint, answer_timeout=0.5)
        halt(worker)
        assert HANGS in fails(DecodeError, lambda: Model(path, experts="gpu", devices=[device]))
    """,
    "shorter than its answer_timeout": """
        halt(worker)
        fails(RequestTimeoutError, lambda: engine.generate("Hello", SHORT, timeout=1))
        go_on(worker)
        assert engine.generate("Hello", SHORT).tokens == expected
    """,
    "and answers when it is asked": """
        llama_moe.add_rpc_device(worker.endpoint, answer_timeout=0.5)
        halt(worker)
        threading.Timer(2, go_on, [worker]).start()
        assert engine.generate("Hello", SHORT).tokens == expected
    """,
    "while everything is closed": """
        second = Engine(model, context_size=256, threads=1)
        context = Context(model, context_size=256, threads=1)
        stream = engine.stream("Hello", ENDLESS)
        next(stream)
        halt(worker)
        for thing in (engine, second, context, model):
            thing.close()
            assert thing.closed
        list(stream)
        assert stream.completion.finish_reason == "cancelled"
    """,
    "with an answer_timeout that cannot be": """
        for value in (0, -1, float("nan"), float("inf")):
            error = fails(InvalidOptionError, lambda: llama_moe.add_rpc_device(worker.endpoint, answer_timeout=value))
            assert "it must be a number of seconds above 0" in error, error
    """,
}

END = """
alone = llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False)
assert alone.generate("Hello", SHORT).tokens == expected
print("the process went on")
"""


def run(scenario: str, path: Path) -> None:
    lines = scenario.strip("\n").splitlines()
    middle = "\n".join(line.removeprefix(" " * 8) for line in lines)
    done = run_python(BEGIN + middle + END, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the process went on\n", "")


@pytest.mark.parametrize("scenario", DEATHS)
def test_the_process_goes_on_when_a_worker_dies(scenario: str, tiny_model: Callable[[str], Path]) -> None:
    run(DEATHS[scenario], tiny_model("qwen3moe"))


@pytest.mark.parametrize(
    "scenario", [pytest.param(name, marks=pytest.mark.slow) if "closed" in name or "while" in name else name for name in HANGS]
)
def test_nobody_waits_for_ever_when_a_worker_hangs(scenario: str, tiny_model: Callable[[str], Path]) -> None:
    run(HANGS[scenario], tiny_model("qwen3moe"))
