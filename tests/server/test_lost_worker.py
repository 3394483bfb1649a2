"""A worker that dies takes the answers that it computed with it, and not the server."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from llama_moe.worker import Worker
from tests.support.servers import ServerProcess


def test_the_model_is_loaded_anew_on_what_is_left(models_dir: Path) -> None:
    options = ["--ctx", 1 << 16, "--parallel", 2, "--threads", 1]
    body = {"prompt": "Hello", "ignore_eos": True, "max_tokens": 1 << 16, "temperature": 0}
    with Worker(threads=1) as worker, ServerProcess("--model", models_dir / "chat.gguf", "--rpc", worker.endpoint, *options) as server:
        (model,) = server.client.get("/v1/placement").json()["models"]
        assert "RPC0" in {row["device"] for row in model["memory"]["rows"]}
        with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            events = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            next(events)
            os.kill(worker.pid, signal.SIGKILL)
            *_, last = events
            assert "the engine is lost: device 'RPC0'" in json.loads(last)["error"]["message"]
        reply = server.client.post("/v1/completions", json=body | {"max_tokens": 3})
        assert reply.status_code == 200, reply.text
        (model,) = server.client.get("/v1/placement").json()["models"]
        assert {row["device"] for row in model["memory"]["rows"]} == {"CPU"}
        assert "Traceback" not in server.log()
