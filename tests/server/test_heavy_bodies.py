"""Bodies that take long to read: none keeps other requests waiting, and one that would is refused."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from llama_moe.server.bodies import MAX_PARTS, MAX_TOOLS, MAX_VALUES, check_body
from llama_moe.server.errors import ApiError
from llama_moe.server.tokens import MAX_TEXT_BYTES
from tests.support.servers import ServerProcess

BODY_BYTES = (16 << 20) - 1000  # what is taken, by default
# Of any other request. A tenth of it is usual; with as much in a body as its size allows, reading it would take ten times as long.
MOST_SECONDS = 2.0

MESSAGE = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "tools", "max_tokens": 1, "messages": [MESSAGE]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def filled(fields: dict[str, Any], name: str, item: str) -> bytes:
    """A body of the largest size, with a list of as many items as that allows."""
    items = ",".join([item] * (BODY_BYTES // (len(item) + 1)))
    return f"{json.dumps(fields)[:-1]}, {json.dumps(name)}: [{items}]}}".encode()


def answered(server: ServerProcess, path: str, body: bytes) -> httpx.Response:
    """The answer to a body, while which no other request waited for long."""
    ended = threading.Event()
    longest = 0.0

    def ask() -> None:
        nonlocal longest
        address = urlsplit(server.url)
        with contextlib.closing(http.client.HTTPConnection(address.hostname or "", address.port)) as connection:
            while not ended.wait(0.002):
                begin = time.perf_counter()
                connection.request("GET", "/health")
                assert connection.getresponse().read()
                longest = max(longest, time.perf_counter() - begin)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        response = server.client.post(path, content=body, headers={"content-type": "application/json"})
    finally:
        ended.set()
        asking.join()
    assert 0 < longest < MOST_SECONDS
    return response


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", filled(CHAT, "messages", json.dumps(MESSAGE))),
        ("/v1/chat/completions", filled(CHAT, "messages", "{}")),
        ("/v1/chat/completions", filled(CHAT, "tools", json.dumps(TOOL))),
        ("/v1/chat/completions", filled(CHAT, "unknown", "[]")),
        ("/v1/messages", filled(CHAT, "messages", json.dumps(MESSAGE | {"content": [{"type": "text", "text": "x"}]}))),
        ("/v1/responses", filled({"model": "tools"}, "input", json.dumps(MESSAGE))),
        ("/v1/completions", filled({"model": "tools"}, "prompt", '"x"')),
        ("/v1/embeddings", filled({"model": "tools"}, "input", "[1]")),
        ("/tokenize", filled({"model": "tools", "content": "\ud800"}, "unknown", '"x"')),
    ],
    ids=["messages", "errors", "tools", "lists", "parts", "input", "prompts", "token ids", "halves"],
)
def test_more_than_can_be_read_while_others_wait(server: ServerProcess, path: str, body: bytes) -> None:
    response = answered(server, path, body)
    assert response.status_code == 400
    assert f"strings, lists and objects; there can be up to {MAX_PARTS}" in response.json()["error"]["message"]


def test_more_numbers_than_can_be_read_while_others_wait(server: ServerProcess) -> None:
    for path, name in (("/detokenize", "tokens"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input")):
        response = answered(server, path, filled({"model": "tools"}, name, "1"))
        assert response.status_code == 400
        assert f"values; there can be up to {MAX_VALUES}" in response.json()["error"]["message"]


def test_as_much_as_is_allowed(server: ServerProcess) -> None:
    messages = [MESSAGE] * (MAX_PARTS // 5 - 10)
    ids = [1] * (MAX_VALUES - 10)
    bodies: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", CHAT | {"messages": messages}, "the context holds"),
        ("/v1/messages", CHAT | {"messages": messages}, "the context holds"),
        ("/v1/responses", {"model": "tools", "input": messages}, "the context holds"),
        ("/v1/chat/completions", CHAT | {"messages": [{}] * (MAX_PARTS - 100)}, "messages.0.role: Field required"),
        ("/v1/chat/completions", CHAT | {"logit_bias": dict.fromkeys(map(str, range(MAX_PARTS // 2 - 20)), "x")}, "logit_bias.0"),
        ("/v1/completions", {"model": "tools", "prompt": ids}, "the context holds"),
        ("/v1/completions", {"model": "tools", "prompt": ["x"] * (MAX_PARTS - 10)}, "this server allows up to 16"),
        ("/v1/embeddings", {"model": "tools", "input": ids}, "the context holds"),
        ("/v1/embeddings", {"model": "tools", "input": [[1]] * (MAX_PARTS - 10)}, "there can be up to 2048"),
        ("/v1/embeddings", {"model": "tools", "input": [*ids, "x"]}, "valid integer"),
    ]
    for path, body, reason in bodies:
        response = answered(server, path, json.dumps(body).encode())
        assert response.status_code == 400
        assert reason in response.json()["error"]["message"]
    response = answered(server, "/detokenize", json.dumps({"model": "tools", "tokens": ids}).encode())
    assert len(response.json()["content"]) == len(ids)
    response = answered(server, "/v1/embeddings", json.dumps({"model": "tools", "input": ["x"] * 2048}).encode())
    assert [row["index"] for row in response.json()["data"]] == list(range(2048))


def test_long_texts(server: ServerProcess) -> None:
    for path, fields, name in (
        ("/v1/chat/completions", CHAT, "content"),
        ("/v1/completions", {"model": "tools"}, "prompt"),
        ("/v1/embeddings", {"model": "tools"}, "input"),
    ):
        for text in ('[{"x": 1}, ' * (BODY_BYTES // 14), "\\" * (BODY_BYTES // 2), "ü" * (BODY_BYTES // 2)):
            body = fields | ({"messages": [{"role": "user", name: text}]} if name == "content" else {name: text})
            response = answered(server, path, json.dumps(body, ensure_ascii=False).encode())
            assert response.status_code == 400
            assert "the context holds" in response.json()["error"]["message"]


def test_the_longest_text_that_becomes_tokens(server: ServerProcess) -> None:
    response = answered(server, "/tokenize", json.dumps({"model": "tools", "content": "\u2400" * (MAX_TEXT_BYTES // 3)}).encode())
    assert len(response.json()["tokens"]) > MAX_TEXT_BYTES // 6
    response = server.client.post("/tokenize", json={"model": "tools", "content": "x" * (MAX_TEXT_BYTES + 1)})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"content has {MAX_TEXT_BYTES + 1} bytes; there can be up to {MAX_TEXT_BYTES}"


def test_more_tools_than_anybody_has(server: ServerProcess) -> None:
    for path, body in (
        ("/v1/chat/completions", CHAT | {"tools": [TOOL] * (MAX_TOOLS + 1)}),
        ("/v1/messages", CHAT | {"tools": [{"name": "f", "input_schema": {}}] * (MAX_TOOLS + 1)}),
        ("/v1/responses", {"model": "tools", "input": "x", "tools": [{"type": "function", "name": "f"}] * (MAX_TOOLS + 1)}),
    ):
        response = server.client.post(path, json=body)
        assert response.status_code == 400
        assert f"at most {MAX_TOOLS} items" in response.json()["error"]["message"]


def test_of_a_list_the_first_item_that_is_wrong_is_told(server: ServerProcess) -> None:
    response = server.client.post("/v1/chat/completions", json=CHAT | {"messages": [MESSAGE, {}, {}]})
    assert response.json()["error"]["message"] == "messages.1.role: Field required"


def check(body: bytes) -> None:
    asyncio.run(check_body(body))


def test_what_is_counted() -> None:
    inside = ["[{,", '"', "\\", '\\"[', "{" * MAX_PARTS, "," * MAX_VALUES]
    strings = inside + [""] * (MAX_PARTS - len(inside) - 1)
    check(json.dumps(strings).encode())
    with pytest.raises(ApiError, match=rf"the body has {MAX_PARTS + 1} strings, lists and objects"):
        check(json.dumps([*strings, []]).encode())
    with pytest.raises(ApiError, match=rf"the body has {MAX_PARTS + 1} strings, lists and objects"):
        check(json.dumps([*strings, ""]).encode())
    numbers = [0] * MAX_VALUES
    check(json.dumps(numbers).encode())
    with pytest.raises(ApiError, match=rf"the body has {MAX_VALUES + 1} values"):
        check(json.dumps([*numbers, 0]).encode())
