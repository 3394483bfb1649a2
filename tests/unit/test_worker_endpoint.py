from __future__ import annotations

import socket

import pytest

from llama_moe.errors import InvalidOptionError, LlamaMoeError
from llama_moe.worker import Worker, check_local, parse_endpoint


def test_an_endpoint_is_an_ipv4_address_and_a_port() -> None:
    assert parse_endpoint("127.0.0.1:50052") == ("127.0.0.1", 50052)
    assert parse_endpoint("localhost:0") == ("127.0.0.1", 0)


@pytest.mark.parametrize("text", ["", "127.0.0.1", ":50052", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1", "[::1]:50052"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        parse_endpoint(text)
    assert repr(text) in str(caught.value)


def test_an_address_that_others_can_reach_is_not_local() -> None:
    check_local("127.0.0.1:1")
    check_local("127.1.2.3:1")
    with pytest.raises(InvalidOptionError, match="has no authentication"):
        check_local("0.0.0.0:50052")


def test_a_worker_never_listens_where_others_can_reach_it() -> None:
    with pytest.raises(InvalidOptionError, match="has no authentication"):
        Worker("0.0.0.0:0")


def test_a_worker_says_that_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LlamaMoeError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use"):
            Worker(f"127.0.0.1:{port}")
