"""The memory report against what the operating system says: the worker's process is the accelerator's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.processes import run_python

# In a process of its own, with a worker of its own: memory that an earlier test freed may still belong to a process.
MEASURE = """
    import json, sys
    import psutil
    import llama_moe
    from llama_moe import Engine, Model, SamplingParams
    from llama_moe.worker import Worker

    path, experts = sys.argv[1:]
    with Worker(threads=1) as worker:
        process = psutil.Process(worker.pid)
        (device,) = llama_moe.add_rpc_device(worker.endpoint)
        before = process.memory_info().rss
        with Model(path, experts=experts, devices=device) as model, Engine(
            model, context_size=2048, micro_batch_size=64, threads=1
        ) as engine:
            # Memory becomes resident when it is first written: fill a whole micro-batch.
            engine.generate(list(range(100, 164)), SamplingParams(max_tokens=2, temperature=0))
            growth = process.memory_info().rss - before
            print(json.dumps({"growth": growth, "report": engine.memory().to_dict(), "device": device.name}))
"""


@pytest.mark.parametrize("experts", ["gpu", "cpu"])
def test_the_worker_grows_by_what_the_report_says(experts: str, demo_path: Path) -> None:
    done = run_python(MEASURE, demo_path, experts)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    rows = [row for row in measured["report"]["rows"] if row["device"] == measured["device"]]
    assert {row["role"] for row in rows} == {"weights", "kv_cache", "compute"} | ({"experts"} if experts == "gpu" else set())
    assert measured["growth"] == pytest.approx(sum(row["bytes"] for row in rows), rel=0.05)
