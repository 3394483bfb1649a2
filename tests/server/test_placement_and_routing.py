"""`/v1/placement` and `/v1/routing`: where a model's bytes are, and which experts it chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import llama_moe
from llama_moe import Model
from tests.support.servers import ServerProcess
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def client(models_dir: Path, dense: Path) -> Iterator[httpx.Client]:
    """Of a server with a Mixture of Experts, which is loaded at the start, and a dense model, which is not."""
    options = ["--ctx", 256, "--parallel", 2, "--threads", 1, "--cpu-moe"]
    with ServerProcess("--model", models_dir / "chat.gguf", "--model", dense, *options) as server:
        yield server.client


def complete(client: httpx.Client, model: str = "chat") -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    client.post("/v1/chat/completions", json=body).raise_for_status()


def routing(client: httpx.Client, model: str = "chat") -> dict[str, Any]:
    (report,) = client.get("/v1/routing", params={"model": model}).raise_for_status().json()["models"]
    assert isinstance(report, dict)
    return report


def reports(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The model of each event of a stream of one model."""
    for line in answer.iter_lines():
        if line.startswith("data:"):
            (report,) = json.loads(line.removeprefix("data:"))["models"]
            yield report


def test_the_placement_is_that_of_the_same_load(client: httpx.Client, models_dir: Path) -> None:
    report = client.get("/v1/placement", params={"tensors": True}).json()
    (found,) = [model for model in report["models"] if model["model"] == "chat"]
    # The server's process knows no workers; this one may, from other tests.
    local = [device for device in llama_moe.devices() if device.kind != "cpu" and device.backend != "RPC"]
    with llama_moe.load(models_dir / "chat.gguf", experts="cpu", devices=local, context_size=256, max_sequences=2) as engine:
        assert found["memory"] == engine.memory().to_dict()
        assert [tuple(tensor.values()) for tensor in found["placement"]["tensors"]] == [
            (tensor.name, tensor.device, tensor.role, tensor.bytes) for tensor in engine.model.placement
        ]
        by_role = {row["role"]: row["bytes"] for row in found["placement"]["rows"] if row["device"] == "CPU"}
        assert by_role["experts"] == engine.model.placement.by_role()["experts"]
        assert found["placement"]["total_bytes"] == engine.model.placement.total_bytes
    assert found["experts"] == report["settings"]["experts"] == "cpu()"
    assert (found["context_size"], found["max_sequences"]) == (256, 2)
    assert found["requests"] == {"running": 0, "waiting": 0}


def test_tensors_are_listed_only_on_request(client: httpx.Client) -> None:
    assert all(model["placement"]["tensors"] is None for model in client.get("/v1/placement").json()["models"])


def test_running_and_waiting_requests_are_shown(client: httpx.Client) -> None:
    def now() -> tuple[int, int]:
        requests = client.get("/v1/placement").json()["models"][0]["requests"]
        return requests["running"], requests["waiting"]

    # More than are computed at once.
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "n": 16, "max_tokens": 200, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body):
        assert eventually(lambda: (found := now())[0] == 2 and 0 < found[1] <= 14)
    assert eventually(lambda: now() == (0, 0))


def test_nothing_is_counted_unless_somebody_looks(client: httpx.Client) -> None:
    complete(client)
    report = routing(client)
    assert (report["loaded"], report["tracing"], report["tokens"], report["layers"]) == (True, False, 0, [])


def test_a_stream_counts_while_it_is_read(client: httpx.Client, models_dir: Path) -> None:
    with client.stream("GET", "/v1/routing/stream", params={"model": "chat", "interval": 0.1}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = reports(answer)
        first = next(events)
        assert (first["tracing"], first["tokens"]) == (True, 0)
        complete(client)
        second = next(event for event in events if event["tokens"])
        with Model(models_dir / "chat.gguf", devices=[]) as model:
            assert (second["expert_count"], second["experts_used"]) == (model.expert_count, model.experts_used)
        for layer in second["layers"]:
            assert sum(layer["counts"]) == layer["tokens"] * second["experts_used"]
        with client.stream("GET", "/v1/routing/stream", params={"model": "chat"}) as other:
            assert next(reports(other))["tokens"] >= second["tokens"]  # of one trace
        assert routing(client)["tracing"]
    assert eventually(lambda: not routing(client)["tracing"])


def test_a_model_is_counted_from_its_load_on(models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "later.gguf").write_bytes((models_dir / "chat.gguf").read_bytes())
    with ServerProcess("--model-dirs", tmp_path, "--ctx", 256, "--threads", 1) as server:
        client = server.client
        params = {"model": "later", "interval": "0.1"}
        with client.stream("GET", "/v1/routing/stream", params=params) as answer:
            events = reports(answer)
            first = next(events)
            assert (first["loaded"], first["tracing"]) == (False, False)
            body = {"model": "later", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
            usage = client.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
            # Whether the last token is computed depends on how the answer ended.
            wanted = usage["total_tokens"] - 1
            assert next(event for event in events if event["tokens"] >= wanted)["loaded"]


def test_a_model_without_experts_says_so(client: httpx.Client) -> None:
    complete(client, "dense")
    with client.stream("GET", "/v1/routing/stream", params={"model": "dense"}) as answer:
        report = next(reports(answer))
    assert (report["loaded"], report["tracing"], report["expert_count"]) == (True, False, 0)
    # --cpu-moe asks nothing of it.
    assert [model["experts"] for model in client.get("/v1/placement").json()["models"] if model["model"] == "dense"] == ["none"]


def test_an_unknown_model_is_an_error(client: httpx.Client) -> None:
    for path in ("/v1/routing", "/v1/routing/stream"):
        answer = client.get(path, params={"model": "nothing"})
        assert answer.status_code == 404
        assert "'nothing' does not exist" in answer.json()["error"]["message"]


def test_a_stream_does_not_hold_up_the_end_of_the_server(models_dir: Path) -> None:
    options = ["--ctx", 256, "--threads", 1, "--grace", 3600]
    with (
        ServerProcess("--model", models_dir / "chat.gguf", *options) as server,
        server.client.stream("GET", "/v1/routing/stream", params={"interval": 60}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        server.signal()
        for _ in lines:  # to a proper end
            pass
        assert server.finish() == 0
        assert "Traceback" not in server.log()


def test_the_interval_has_limits(client: httpx.Client) -> None:
    assert client.get("/v1/routing/stream", params={"interval": 0}).status_code == 400


def test_what_tells_of_models_needs_the_key(models_dir: Path) -> None:
    with ServerProcess("--model-dirs", models_dir, "--api-key", "secret") as server:
        client = server.client
        for path in ("/v1/placement", "/v1/routing", "/v1/routing/stream"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/placement", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/").status_code == 200
