"""A client that goes away gives its place in the engine to the next one."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_moe import Engine
from llama_moe.server import ServerSettings, security, streaming
from tests.support.servers import LocalServer, local_server
from tests.support.waiting import eventually

CONTEXT_SIZE = 1 << 16
# Only the context's end would end it, seconds later.
ENDLESS: dict[str, Any] = {"prompt": "Hello", "ignore_eos": True, "max_tokens": CONTEXT_SIZE, "temperature": 0}


@pytest.fixture(scope="module")
def local(models_dir: Path) -> Iterator[LocalServer]:
    """A server with a single place."""
    settings = ServerSettings(
        models=[models_dir / "chat.gguf"], experts="cpu", devices=[], context_size=CONTEXT_SIZE, parallel=1, threads=1, max_queue=100
    )
    with local_server(settings) as local:
        yield local


@pytest.fixture
def engine(local: LocalServer) -> Engine:
    (served,) = local.state.pool.loaded()
    return served.engine


def count(engine: Engine, what: str) -> int:
    return int(engine.stats()[f"requests_{what}"])


def is_free(local: LocalServer, engine: Engine) -> None:
    """The engine has no request left, and room for the next one."""
    assert eventually(lambda: count(engine, "running") == count(engine, "waiting") == 0)
    reply = local.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2, "ignore_eos": True}).json()
    assert reply["usage"]["completion_tokens"] == 2


def send(local: LocalServer, path: str, body: dict[str, Any], *, buffer: int | None = None) -> socket.socket:
    """Sends a request, and leaves its answer to whoever reads the socket. `buffer`: bytes that the system takes meanwhile, about."""
    url = httpx.URL(local.url)
    client = socket.socket()
    if buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect((url.host, url.port or 0))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    client.sendall(head.encode() + content)
    return client


def test_a_stream_that_is_left_stops_within_a_step(local: LocalServer, engine: Engine) -> None:
    before = engine.stats()["generated_tokens"]
    with local.client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as response:
        events = response.iter_lines()
        assert next(events).startswith("data: ")
        assert count(engine, "running") == 1
    is_free(local, engine)
    assert engine.stats()["generated_tokens"] - before < CONTEXT_SIZE / 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", ENDLESS),
        ("/v1/completions", ENDLESS | {"stream": True}),
        ("/v1/completions", ENDLESS | {"n": 3}),
        ("/v1/completions", ENDLESS | {"n": 3, "stream": True}),
        ("/v1/completions", ENDLESS | {"prompt": ["a", "b"], "stream": True}),
        ("/v1/chat/completions", ENDLESS | {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/chat/completions", ENDLESS | {"messages": [{"role": "user", "content": "Hello"}], "stream": True}),
        ("/v1/responses", {"input": "Hello", "ignore_eos": True}),
        ("/v1/responses", {"input": "Hello", "ignore_eos": True, "stream": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100_000, "ignore_eos": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100_000, "ignore_eos": True, "stream": True}),
        ("/v1/embeddings", {"input": ["a " * 20_000] * 50}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(key for key in value if key in ("n", "prompt", "stream")),
)
def test_a_request_that_nobody_waits_for_is_cancelled(local: LocalServer, engine: Engine, path: str, body: dict[str, Any]) -> None:
    with send(local, path, body):
        assert eventually(lambda: count(engine, "running") == 1)
    is_free(local, engine)


def test_a_request_that_waits_for_its_turn_leaves_the_queue(local: LocalServer, engine: Engine) -> None:
    with send(local, "/v1/completions", ENDLESS):
        assert eventually(lambda: count(engine, "running") == 1)
        with send(local, "/v1/completions", ENDLESS), send(local, "/v1/completions", ENDLESS | {"stream": True}):
            assert eventually(lambda: count(engine, "waiting") == 2)
        assert eventually(lambda: count(engine, "waiting") == 0)
        assert count(engine, "running") == 1
    is_free(local, engine)


def test_many_clients_that_come_and_go(local: LocalServer, engine: Engine) -> None:
    clients = [send(local, "/v1/completions", ENDLESS | {"stream": bool(number % 2)}) for number in range(40)]
    assert eventually(lambda: count(engine, "running") + count(engine, "waiting") == 40)
    for client in clients:
        client.close()
    is_free(local, engine)


def test_a_client_that_reads_nothing_is_left(local: LocalServer, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SEND_SECONDS", 0.2)
    with send(local, "/v1/completions", ENDLESS | {"stream": True, "logprobs": 20}, buffer=4096) as client:
        assert eventually(lambda: count(engine, "running") == 1)
        is_free(local, engine)
        assert engine.stats()["generated_tokens"] > 0
        while client.recv(1 << 20):  # what was on its way; then the connection ends
            pass


def test_a_body_that_does_not_come_is_not_waited_for(local: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_BODY_SECONDS", 0.05)
    url = httpx.URL(local.url)
    with socket.create_connection((url.host, url.port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = b""
        while received := client.recv(1 << 16):
            answer += received
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"no more of the request body came" in answer


def test_a_schema_that_takes_long_to_compile_holds_up_nobody(local: LocalServer, engine: Engine) -> None:
    properties = {f"p{number}": {"type": "string"} for number in range(500)}
    body = {"prompt": "Hello", "max_tokens": 2, "json_schema": {"type": "object", "properties": properties}}
    with send(local, "/v1/completions", body) as client:
        client.setblocking(False)
        others = 0
        while not select.select([client], [], [], 0)[0]:
            assert local.client.get("/health").status_code == 200
            others += 1
    assert others > 3
    is_free(local, engine)
