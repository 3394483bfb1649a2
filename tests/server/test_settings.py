"""Settings say what is wrong with them, and what would be right."""

from __future__ import annotations

from typing import Any

import pytest

from llama_moe.errors import InvalidOptionError, PlacementError
from llama_moe.server import ServerSettings
from llama_moe.server.settings import is_loopback, parse_bind


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("127.0.0.1:11435", ("127.0.0.1", 11435)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(bind: str, address: tuple[str, int]) -> None:
    assert parse_bind(bind) == address
    assert ServerSettings(models=["a"], bind=bind).address == address


@pytest.mark.parametrize("bind", ["", "127.0.0.1", ":80", "host:", "host:x", "host:70000", "::1", "::1:80", "[::1]", "[::1]:"])
def test_what_is_no_address(bind: str) -> None:
    with pytest.raises(InvalidOptionError, match="expected host:port, such as 127"):
        parse_bind(bind)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])
def test_without_a_key_only_this_machine_may_ask(host: str) -> None:
    bind = f"[{host}]:80" if ":" in host else f"{host}:80"
    with pytest.raises(InvalidOptionError, match="can be reached by other machines; give an API key"):
        ServerSettings(models=["a"], bind=bind)
    assert ServerSettings(models=["a"], bind=bind, api_key="key").address == (host, 80)


def test_loopback_addresses() -> None:
    assert is_loopback("localhost")
    assert is_loopback("127.8.8.8")
    assert is_loopback("::1")
    with pytest.raises(InvalidOptionError, match=r"'no\.such\.host\.invalid' has no address"):
        is_loopback("no.such.host.invalid")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"models": []}, "nothing to serve"),
        ({"models": ["a", "b"], "lora": "c"}, "an adapter is of one model; give one of models and no model_dirs"),
        ({"models": ["a", "b"], "draft": "c"}, "a draft model is for one model; give one of models and no model_dirs, or 'lookup'"),
        ({"parallel": 0}, "parallel: 0 is out of range; it must be 1 or more"),
        ({"ttl": -1}, "ttl: -1"),
        ({"ttl": float("nan")}, "ttl: nan"),
        ({"timeout": 0}, "timeout: 0 is out of range; it must be more than 0"),
        ({"max_body_bytes": "1 MiX"}, "max_body_bytes: '1 MiX' is not a size"),
        ({"memory_budget": "lots"}, "memory_budget: 'lots' is not a size"),
        ({"experts": "nowhere"}, "nowhere"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "schlüssel"}, "printable ASCII"),
        ({"api_key": "key\n"}, "printable ASCII"),
    ],
)
def test_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidOptionError, PlacementError), match=message):
        ServerSettings(**{"models": ["a"]} | wrong)


def test_a_path_alone_is_no_list_of_them() -> None:
    with pytest.raises(TypeError, match=r"models must be a sequence, not 'a\.gguf'"):
        ServerSettings(models="a.gguf")


def test_the_key_is_not_shown() -> None:
    assert "hidden" not in repr(ServerSettings(models=["a"], api_key="hidden"))
