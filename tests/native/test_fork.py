"""A forked child has none of our threads: what was made before the fork refuses to work there, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import run_python

BEGIN = """
import asyncio, gc, os, signal, sys, threading, warnings
import llama_moe
from llama_moe import Context, Engine, Model, SamplingParams
from llama_moe.errors import ClosedError

warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
path = sys.argv[1]
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, temperature=0)
TEMPLATE = "{{ messages[0]['content'] }}"

def refused(action, *arguments):
    try:
        action(*arguments)
    except ClosedError as error:
        assert f"belongs to process {parent}; llama.cpp cannot be used in a forked child" in str(error), error
        return
    raise AssertionError(f"{action} was not refused")

def wait_for(child):
    # Killed, and so no status of 0, if it hangs.
    timer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert status == 0, status

parent = os.getpid()
"""

SCENARIOS = {
    "in the middle of everything": """
        model = Model(path, experts="gpu", devices=[], repack=False)
        engine = Engine(model, context_size=8192, max_sequences=3, threads=1)
        context = Context(model, context_size=256, threads=1)
        prefix = path + ".prefix"
        engine.save_prefix(list(range(20, 60)), prefix)
        question = [{"role": "user", "content": "Hello"}]
        engine.chat(question, SHORT, template=TEMPLATE)  # the template is there before the fork
        expected = engine.generate("Hello", LONG).text
        stream = engine.stream("Hello", LONG)
        text = str(next(stream))
        waited_for = engine.stream("Hello", ENDLESS)
        reader = threading.Thread(target=lambda: list(waited_for))
        reader.start()
        tracing = engine.trace_routing(choices=True)
        routing = tracing.__enter__()
        child = os.fork()
        if child == 0:
            for use in (
                lambda: next(stream),
                lambda: engine.trace_routing().__enter__(),
                lambda: context.trace_routing().__enter__(),
                lambda: routing.counts,
                lambda: routing.choices,
                lambda: routing.active,
                lambda: engine.generate("a", SHORT),
                lambda: engine.stream([1, 2], SHORT),
                lambda: asyncio.run(engine.agenerate("a", SHORT)),
                lambda: Model(path),
                lambda: Engine(model),
                lambda: Context(model),
                lambda: context.decode([1]),
                lambda: context.sequence_length(0),
                lambda: model.tokenize("a"),
                lambda: engine.score("Hello there"),
                lambda: engine.embed("Hello there"),
                lambda: engine.perplexity("Hello there"),
                lambda: engine.chat(question, SHORT, template=TEMPLATE),
                lambda: engine.stream_chat(question, SHORT, template=TEMPLATE),
                lambda: asyncio.run(engine.achat(question, SHORT, template=TEMPLATE)),
                lambda: engine.load_prefix(prefix),
                lambda: engine.save_prefix([20, 21], prefix),
                engine.clear_prefixes,
                model.memory, engine.memory, engine.stats, llama_moe.devices,
            ):
                refused(use)
            assert engine.closed and model.closed and context.closed
            assert "closed" in repr(engine) and "llama" == model.architecture and llama_moe.__version__
            stream.close()
            stream.cancel()
            engine.close()
            context.close()
            model.close()
            del stream, engine, context, model
            gc.collect()
            sys.exit(0)  # all of the interpreter's end
        wait_for(child)
        text += "".join(map(str, stream))
        assert text == expected
        assert routing.counts.sum() > 0
        tracing.__exit__(None, None, None)
        waited_for.cancel()
        reader.join()
    """,
    "without closing anything": """
        engine = llama_moe.load(path, experts="gpu", devices=[], context_size=8192, max_sequences=2, threads=1)
        stream = engine.stream("Hello", ENDLESS)
        next(stream)
        child = os.fork()
        if child == 0:
            sys.exit(0)
        wait_for(child)
        next(stream)
    """,
    "while a load is under way": """
        children = []
        def fork(share):
            if not children:
                children.append(os.fork())
                if children == [0]:
                    refused(Model, path)
                    os._exit(0)
        Model(path, experts="gpu", devices=[], on_progress=fork).close()
        # The callback's first call is before llama.cpp's own work, its last one after it.
        wait_for(children[0])
    """,
    "from an event loop": """
        engine = llama_moe.load(path, experts="gpu", devices=[], context_size=8192, max_sequences=2, threads=1, repack=False)
        async def main():
            expected = (await engine.agenerate("Hello", LONG)).text
            stream = engine.astream("Hello", LONG)
            text = str(await anext(stream))
            child = os.fork()
            if child == 0:
                try:
                    await anext(stream)
                except ClosedError:
                    await stream.aclose()
                    del stream
                    gc.collect()
                    os._exit(0)
                os._exit(1)
            await asyncio.to_thread(wait_for, child)
            text += "".join([str(token) async for token in stream])
            assert text == expected
        asyncio.run(main())
    """,
    "before the first load": """
        child = os.fork()
        parent = os.getpid()
        with llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1) as llm:
            assert len(llm.generate("a", SHORT).tokens) == 4
            grandchild = os.fork()
            if grandchild == 0:
                refused(llm.generate, "a", SHORT)
                sys.exit(0)
            wait_for(grandchild)
        if child == 0:
            sys.exit(0)
        wait_for(child)
    """,
    "with multiprocessing": """
        import multiprocessing
        engine = llama_moe.load(path, experts="gpu", devices=[], context_size=256, threads=1)
        def work():
            refused(engine.generate, "a", SHORT)
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == 0, process.exitcode
        assert len(engine.generate("a", SHORT).tokens) == 4
    """,
    "with a worker's model": """
        from llama_moe.worker import Worker
        worker = Worker(threads=1)
        (device,) = llama_moe.add_rpc_device(worker.endpoint)
        engine = llama_moe.load(path, experts="gpu", devices=device, context_size=256, threads=1)
        expected = engine.generate("a", SHORT).tokens
        child = os.fork()
        if child == 0:
            refused(engine.generate, "a", SHORT)
            sys.exit(0)
        wait_for(child)
        assert engine.generate("a", SHORT).tokens == expected
    """,
}

END = """
if os.getpid() == parent:
    print("went on")
"""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_forked_child_is_told_and_ends_and_the_parent_goes_on(scenario: str, tiny_model: Callable[[str], Path]) -> None:
    lines = SCENARIOS[scenario].strip("\n").splitlines()
    middle = "\n".join(line.removeprefix(" " * 8) for line in lines)
    done = run_python(BEGIN + middle + END, tiny_model("llama"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
