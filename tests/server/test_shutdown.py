"""A signal stops the server: what runs may end, the rest is told so, and the exit status is 0."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from typer.testing import CliRunner

from llama_moe.cli.app import app
from llama_moe.cli.serve import api_key_of
from llama_moe.errors import LlamaMoeError
from llama_moe.server import ServerSettings, serve
from tests.support.processes import cli
from tests.support.servers import ServerProcess
from tests.support.waiting import eventually

CONTEXT_SIZE = 1 << 17
OPTIONS = ["--ctx", CONTEXT_SIZE, "--parallel", 2, "--threads", 1, "--cpu-moe"]
ENDLESS: dict[str, Any] = {"model": "chat", "prompt": "Hello", "ignore_eos": True, "max_tokens": CONTEXT_SIZE, "temperature": 0}


@pytest.fixture
def stopping(models_dir: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server of one test, with so many seconds of grace."""
    with ServerProcess("--model", models_dir / "chat.gguf", "--grace", request.param, *OPTIONS) as server:
        yield server


def data_of(lines: Iterator[str]) -> Iterator[str]:
    return (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


@pytest.mark.parametrize("stopping", [60], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_what_runs_ends_as_it_would_have(stopping: ServerProcess, number: signal.Signals) -> None:
    """Streams, requests without one, and those that still waited for their turn."""
    body = ENDLESS | {"max_tokens": 500}
    with ThreadPoolExecutor() as threads, stopping.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = data_of(response.iter_lines())
        first = next(events)
        others = [threads.submit(httpx.post, f"{stopping.url}/v1/completions", json=body, timeout=240) for _ in range(4)]
        assert eventually(lambda: stopping.log().count("POST") >= 1)
        assert eventually(lambda: connections(stopping) >= 5)
        stopping.signal(number)
        rest = list(events)
        assert rest[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in [first, *rest[:-1]]]
        assert choices[-1]["finish_reason"] == "length"
        text = "".join(choice["text"] for choice in choices)
        answered = [other.result() for other in others]
    # One whose body came when the server was already stopping was refused in order.
    assert {reply.status_code for reply in answered} <= {200, 503}
    assert all(reply.json()["choices"][0]["text"] == text for reply in answered if reply.status_code == 200)
    assert any(reply.status_code == 200 for reply in answered)
    assert stopping.finish() == 0
    assert "Traceback" not in stopping.log()


def connections(server: ServerProcess) -> int:
    """Of clients, that the server has accepted."""

    return sum(each.status == "ESTABLISHED" for each in psutil.Process(server.pid).net_connections("tcp"))


@pytest.mark.parametrize("stopping", [0.5], indirect=True)
def test_what_has_not_ended_by_then_is_told_so(stopping: ServerProcess) -> None:
    with ThreadPoolExecutor() as threads, stopping.client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as response:
        events = data_of(response.iter_lines())
        next(events)
        others = [threads.submit(httpx.post, f"{stopping.url}/v1/completions", json=ENDLESS, timeout=240) for _ in range(3)]
        assert eventually(lambda: connections(stopping) >= 4)
        stopping.signal()
        *_, last = events
        assert json.loads(last)["error"]["code"] == "shutting_down"
        for other in others:
            reply = other.result()
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert reply.json()["error"]["code"] == "shutting_down"
    assert stopping.finish() == 0
    assert "Traceback" not in stopping.log()


@pytest.mark.parametrize("stopping", [60], indirect=True)
def test_new_requests_are_refused_meanwhile(stopping: ServerProcess) -> None:
    address = (httpx.URL(stopping.url).host, httpx.URL(stopping.url).port or 0)
    with stopping.client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as response:
        events = response.iter_lines()  # which closes the response when nobody refers to it any more
        next(events)
        with socket.create_connection(address) as half_sent:
            half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
            assert eventually(lambda: connections(stopping) >= 2)
            stopping.signal()
            assert eventually(lambda: not accepts(address))
    # The client that had the endless one left: nothing is waited for.
    assert stopping.finish() == 0


def accepts(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("stopping", [60], indirect=True)
def test_a_second_interrupt_ends_it_at_once(stopping: ServerProcess) -> None:
    with stopping.client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as response:
        events = response.iter_lines()
        next(events)
        stopping.signal(signal.SIGINT)
        assert eventually(lambda: "stopping" in stopping.log())
        stopping.signal(signal.SIGINT)
        assert stopping.finish() == 0


def test_the_official_client_raises_when_the_server_stops(models_dir: Path) -> None:
    with (
        ServerProcess("--model", models_dir / "chat.gguf", "--grace", 0, *OPTIONS) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        stream = client.completions.create(
            model="chat", prompt="Hello", max_tokens=CONTEXT_SIZE, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.signal()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.finish() == 0


# ---- what keeps it from starting


def test_usage_errors(models_dir: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-key\n")
    model = models_dir / "chat.gguf"
    wrong: list[tuple[list[object], str]] = [
        ([], "nothing to serve"),
        (["--model", model, "--bind", "0.0.0.0:0"], "can be reached by other machines"),
        (["--model", model, "--bind", "nowhere"], "expected host:port"),
        (["--model", model, "--cpu-moe", "--fit"], "give only one"),
        (["--model", model, "--api-key", "x", "--api-key-file", key], "give only one"),
        (["--model", model, "--api-key-file", tmp_path / "none"], "cannot be read"),
        (["--model", model, "--memory-budget", "lots"], "not a size"),
    ]
    for arguments, message in wrong:
        outcome = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert outcome.exit_code == 2, outcome.output
        assert message in " ".join(outcome.output.split())


def test_what_cannot_be_served_is_said_at_once(models_dir: Path, tmp_path: Path) -> None:
    model = models_dir / "chat.gguf"
    with pytest.raises(FileNotFoundError, match=r"gone\.gguf"):
        serve(ServerSettings(models=[tmp_path / "gone.gguf"]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(LlamaMoeError, match=f"cannot listen on {bind}: Address already in use"):
            serve(ServerSettings(models=[model], bind=bind))
    with pytest.raises(LlamaMoeError, match="no RPC worker at"):
        serve(ServerSettings(models=[model], bind="127.0.0.1:0", rpc=["127.0.0.1:1"]))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"junk" * 10)
    outcome = cli("serve", "--model", broken, "--bind", "127.0.0.1:0")
    assert outcome.returncode == 1
    *_, last = outcome.stderr.splitlines()
    assert last.startswith("error: ")
    assert str(broken) in last
    assert "Traceback" not in outcome.stderr


def test_options_of_the_command_line(models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several folders after one option, and the key from the environment."""
    (tmp_path / "more").symlink_to(models_dir)
    (tmp_path / "linked.gguf").symlink_to(models_dir / "chat.gguf")
    monkeypatch.setenv("LLAMA_MOE_API_KEY", "a-secret")
    with ServerProcess("--model-dirs", models_dir, tmp_path, "--bind", "0.0.0.0:0", key="a-secret") as server:
        assert {entry["id"] for entry in server.client.get("/v1/models").json()["data"]} == {"chat", "thinks", "tools", "linked"}
        assert server.client.get("/v1/models", headers={"Authorization": ""}).status_code == 401
        assert server.stop() == 0
        assert "a-secret" not in server.log()
        assert 'GET /v1/models HTTP/1.1" 401' in server.log()
    key = tmp_path / "key"
    key.write_text(" from-a-file\n")
    assert api_key_of(None, key) == "from-a-file"
