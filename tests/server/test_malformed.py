"""Requests that no client library would send: each is refused with a reason, costs little, and leaves the server as it was."""

from __future__ import annotations

import functools
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.servers import ServerProcess

# A request of each API, whose text and further fields are to be put in.
REQUESTS = {
    "/v1/chat/completions": '{"model": "chat", "max_tokens": 2, "messages": [{"role": "user", "content": TEXT}] FIELDS}',
    "/v1/completions": '{"model": "chat", "max_tokens": 2, "prompt": TEXT FIELDS}',
    "/v1/responses": '{"model": "chat", "max_output_tokens": 2, "input": TEXT FIELDS}',
    "/v1/messages": '{"model": "chat", "max_tokens": 2, "messages": [{"role": "user", "content": TEXT}] FIELDS}',
    "/v1/messages/count_tokens": '{"model": "chat", "messages": [{"role": "user", "content": TEXT}] FIELDS}',
    "/v1/embeddings": '{"model": "chat", "input": TEXT FIELDS}',
    "/tokenize": '{"model": "chat", "content": TEXT FIELDS}',
}
GENERATING = [path for path in REQUESTS if path not in ("/v1/embeddings", "/tokenize", "/v1/messages/count_tokens")]


def body(path: str, text: str = '"x"', fields: str = "") -> bytes:
    """A request as JSON with what JSON does not have, too."""
    return REQUESTS[path].replace("TEXT", text).replace("FIELDS", "," + fields if fields else "").encode()


def refusal(server: ServerProcess, path: str, content: bytes, *, status: int = 400, media_type: str = "application/json") -> str:
    """The reason that it is refused for, in the shape of its API."""
    response = server.client.post(path, content=content, headers={"content-type": media_type})
    assert response.status_code == status, response.text[:500]
    error = response.json()["error"]
    assert error["type"] in ("invalid_request_error", "not_found_error", "request_too_large")
    assert ("code" in error) != path.startswith("/v1/messages")
    return str(error["message"])


@pytest.mark.parametrize("path", REQUESTS)
def test_halves_of_characters(server: ServerProcess, path: str) -> None:
    for half in (r'"\ud800"', r'"\uDfff x"', r'"\udc00\ud800"', r'"\\\ud83d"', r'"\ud83d\\ude00"'):
        assert "half of a character" in refusal(server, path, body(path, half))
    assert "half of a character" in refusal(server, path, body(path, fields=r'"metadata": {"\ud800": "x"}, "user": "x"'))
    for whole in (r'"\ud83d\ude00"', r'"\\ud800"', '"\U0001f600"', r'"\uffff"'):
        response = server.client.post(path, content=body(path, whole), headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", REQUESTS)
def test_bytes_that_are_no_text(server: ServerProcess, path: str) -> None:
    assert "not UTF-8: byte" in refusal(server, path, body(path, '"@"').replace(b"@", b"\xff\xfe"))
    assert "not UTF-8: byte" in refusal(server, path, body(path, '"@"').replace(b"@", b"\xed\xa0\x80"))  # a surrogate's
    assert "utf-16" in refusal(server, path, body(path).decode().encode("utf-16"))
    assert "utf-32" in refusal(server, path, body(path).decode().encode("utf-32-le"))
    assert "not JSON" in refusal(server, path, b"{")
    assert "not a JSON object" in refusal(server, path, b"[]")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "nonsense"])
def test_bodies_that_are_not_sent_as_json(server: ServerProcess, media_type: str) -> None:
    for path in REQUESTS:
        assert "content-type must be application/json" in refusal(server, path, body(path), media_type=media_type)


@pytest.mark.parametrize("path", REQUESTS)
def test_depth_and_digits_without_end(server: ServerProcess, path: str) -> None:
    for fields in ('"x": ' + "[" * 20_000 + "]" * 20_000, '"x": ' + '{"a":' * 20_000 + "1" + "}" * 20_000, '"x": ' + "9" * 100_000):
        assert "nested too deeply, or has a number" in refusal(server, path, body(path, fields=fields))


@pytest.mark.parametrize("path", GENERATING)
def test_numbers_that_are_none_or_huge(server: ServerProcess, path: str) -> None:
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1", '"1"', "true", "[1]", "9" * 400):
        assert "temperature" in refusal(server, path, body(path, fields=f'"temperature": {number}'))
    for number in ("1e300", "9" * 30, "0.5", '"1"'):
        assert "seed" in refusal(server, path, body(path, fields=f'"seed": {number}'))
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    for number in ("9" * 30, "0", "-5", "1.5", "NaN", "true"):
        assert name in refusal(server, path, body(path, fields=f'"{name}": {number}'))


@pytest.mark.parametrize("path", GENERATING)
def test_schemas_and_grammars_that_never_end(server: ServerProcess, path: str) -> None:
    deep = '{"properties": {"a": ' * 300 + "{}" + "}}" * 300
    assert "nested deeper" in refusal(server, path, body(path, fields=f'"json_schema": {deep}'))
    assert "grammar" in refusal(server, path, body(path, fields='"grammar": "root ::= root | root root"'))
    assert "grammar" in refusal(server, path, body(path, fields=f'"grammar": "root ::= {"(" * 5000}"'))


NESTED = r"a ::= \"a\"{0,40}\nb ::= a{0,40}\nc ::= b{0,40}\nd ::= c{0,40}\ne ::= d{0,40}\n"
AMBIGUOUS = [
    f'"grammar": "{NESTED}root ::= e"',
    f'"grammar": "{NESTED}root ::= [^a] e"',  # only known once the first token is there
    '"json_schema": {"type": "string", "pattern": "^(((((a{0,30}){0,30}){0,30}){0,30}){0,30})*b$"}',
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("fields", AMBIGUOUS)
def test_what_can_be_read_in_very_many_ways(server: ServerProcess, path: str, fields: str) -> None:
    """It is refused while others are served."""
    plain = body("/v1/completions", fields='"temperature": 0').replace(b'"max_tokens": 2', b'"max_tokens": 40')
    post = functools.partial(server.client.post, headers={"content-type": "application/json"})
    alone = post("/v1/completions", content=plain).json()["choices"]
    with ThreadPoolExecutor() as threads:
        others = [threads.submit(post, "/v1/completions", content=plain) for _ in range(2)]
        assert "too ambiguous" in refusal(server, path, body(path, fields=fields))
        for other in others:
            assert other.result().json()["choices"] == alone
    streamed = post(path, content=body(path, fields='"stream": true, ' + fields))
    assert "too ambiguous" in streamed.text
    assert streamed.status_code == 400 or "error" in streamed.text.splitlines()[-2]


def test_a_pattern_that_llama_cpp_would_not_end_with(server: ServerProcess) -> None:
    fields = '"json_schema": {"type": "string", "pattern": "^((a{0,30}){0,30})*b$"}'
    content = body("/v1/completions", fields=fields).replace(b'"max_tokens": 2', b'"max_tokens": 60')
    response = server.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert re.match('"a*(b|$)', response.json()["choices"][0]["text"])


def test_conversations_that_are_none(server: ServerProcess) -> None:
    conversations: list[tuple[Any, str]] = [
        ([], "at least 1 item"),
        (None, "messages"),
        ("x", "messages"),
        ([{}], "role"),
        ([{"role": "king", "content": "x"}], "role"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user", "content": {"a": 1}}], "content"),
        ([{"role": "user", "content": [[]]}], "content"),
    ]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"):
        for messages, reason in conversations:
            sent = {"model": "chat", "max_tokens": 2, "messages": messages}
            assert reason in refusal(server, path, json.dumps(sent).encode())
    for items, _ in conversations[:2] + conversations[3:]:
        assert "input" in refusal(server, "/v1/responses", json.dumps({"model": "chat", "input": items}).encode())


def test_a_body_of_ten_megabytes(server: ServerProcess) -> None:
    """A prompt that no context holds; that is known before all of its tokens are."""
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/embeddings"):
        assert re.search(r"more than \d+ tokens; the context holds", refusal(server, path, body(path, '"' + "word " * 2_000_000 + '"')))
    # Its spaces may all be one token.
    assert re.search(r"has \d+ tokens", refusal(server, "/v1/completions", body("/v1/completions", '"' + " " * 200_000 + '"')))
    assert "larger than" in refusal(server, "/v1/messages", b" " * (17 << 20), status=413)


def answer(server: ServerProcess, request: bytes) -> bytes:
    """The beginning of what comes back for bytes that are not HTTP, or hardly so."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=120) as connection:
        try:
            connection.sendall(request)
            return connection.recv(1 << 16)
        except ConnectionError:  # closed while there was still more to send
            return b""


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x: y\r\n" * 200_000, b"400"),  # and it would go on
        (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(1000)) + b"\r\n", b"200"),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n{}", b"400"),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\ncontent-length: " + b"9" * 18 + b"\r\n\r\n{}", b"413"),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\ncontent-length: -1\r\n\r\n{}", b"400"),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[::1\r\n\r\n", b"403"),
        (b"GET /v1/models/%ff%00%2e%2e%2f HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"FROB /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    ],
    ids=lambda value: str(value[:40]) + str(len(value)),
)
def test_what_is_hardly_http(server: ServerProcess, request_: bytes, expected: bytes) -> None:
    received = answer(server, request_)
    assert received == b"" or received.startswith(b"HTTP/1.1 " + expected), received[:200]
    assert received or expected == b"400"
    assert server.client.get("/health").status_code == 200
