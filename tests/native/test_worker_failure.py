"""A worker that dies takes with it what was on it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import run_python

# In a process of its own: what was on a dead worker stays unusable for as long as a process lives.
BEGIN = """
import os, signal, sys, threading
import llama_moe
from llama_moe import Context, Engine, Model, SamplingParams
from llama_moe.errors import ClosedError, DecodeError, LlamaMoeError, PlacementError
from llama_moe.worker import Worker

path = sys.argv[1]
SHORT = SamplingParams(max_tokens=4, temperature=0)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)

def kill(worker):
    os.kill(worker.pid, signal.SIGKILL)

def fails(error, action, *arguments):
    try:
        action(*arguments)
    except error as caught:
        return str(caught)
    raise AssertionError(f"{action} did not fail")

worker = Worker(threads=1)
(device,) = llama_moe.add_rpc_device(worker.endpoint)
expected = llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False).generate("Hello", SHORT).tokens
model = Model(path, experts="gpu", devices=device)
engine = Engine(model, context_size=8192, threads=1)
assert engine.generate("Hello", SHORT).tokens == expected
"""

SCENARIOS = {
    "while a stream is read": """
        other = Engine(model, context_size=256, threads=1)
        context = Context(model, context_size=256, threads=1)
        stream = engine.stream("Hello", ENDLESS)
        next(stream)
        kill(worker)
        assert "a device failed and the engine is lost" in fails(DecodeError, list, stream)
        for use in (lambda: engine.generate("a", SHORT), lambda: other.generate("a", SHORT), lambda: context.decode([1])):
            assert "a device failed" in fails(DecodeError, use)
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
        assert "a device failed" in fails(DecodeError, decode)
        assert "lost" in fails(DecodeError, context.decode, [1])
    """,
    "between two requests": """
        kill(worker)
        assert "a device failed" in fails(DecodeError, lambda: engine.generate("Hello", SHORT))
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
        assert "a device failed" in fails(LlamaMoeError, lambda: Model(path, devices=[device]))
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
        assert "a device failed" in fails(DecodeError, lambda: engine.generate("Hello", SHORT))
        assert next(stream).id >= 0
        stream.close()
        assert second.generate("Hello", SHORT).tokens == expected
        assert Engine(Model(path, experts="cpu", devices=good), context_size=256, threads=1).generate("Hello", SHORT).tokens == expected
    """,
}

END = """
alone = llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1, repack=False)
assert alone.generate("Hello", SHORT).tokens == expected
print("the process went on")
"""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_process_goes_on_when_a_worker_dies(scenario: str, tiny_model: Callable[[str], Path]) -> None:
    lines = SCENARIOS[scenario].strip("\n").splitlines()
    middle = "\n".join(line.removeprefix(" " * 8) for line in lines)
    done = run_python(BEGIN + middle + END, tiny_model("qwen3moe"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "the process went on\n", "")
