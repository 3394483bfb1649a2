"""Who may ask: with a key, who sends it; without, programs of this machine, and no page of another site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from llama_moe.server import ServerSettings
from tests.support.servers import LocalServer, ServerProcess, local_server

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def locked(models_dir: Path) -> Iterator[LocalServer]:
    """A server with a key, none of whose models is loaded."""
    settings = ServerSettings(model_dirs=[models_dir], api_key=KEY, bind="0.0.0.0:0", max_body_bytes=1000)
    with local_server(settings) as local:
        yield local


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
    ],
    ids=str,
)
def test_requests_without_the_key(locked: LocalServer, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/openapi.json"), ("GET", "/no/such/path")):
        response = locked.client.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "authentication_error"
        assert KEY not in response.text


def test_requests_with_the_key(locked: LocalServer) -> None:
    given: list[dict[str, str]] = [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}]
    for headers in given:
        assert locked.client.get("/v1/models", headers=headers).status_code == 200
    # From wherever: with a key, the name that the server is called by does not matter.
    assert (
        locked.client.get("/v1/models", headers={"x-api-key": KEY, "Host": "models.example", "Origin": "https://example.com"}).status_code
        == 200
    )
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY) as client:
        assert len(list(client.models.list())) == 3
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="other", max_retries=0) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_health_needs_no_key(locked: LocalServer) -> None:
    assert locked.client.get("/health").json() == {"status": "ok"}


def test_the_key_is_asked_for_before_a_body_is_read(locked: LocalServer) -> None:
    response = locked.client.post("/v1/completions", content=b"x" * 5000)
    assert response.status_code == 401
    assert locked.client.post("/v1/completions", content=b"x" * 5000, headers={"x-api-key": KEY}).status_code == 413


def test_the_document_knows_of_the_key(locked: LocalServer, server: ServerProcess) -> None:
    document = locked.client.get("/openapi.json", headers={"x-api-key": KEY}).json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "securitySchemes" not in server.client.get("/openapi.json").json()["components"]


def test_every_operation_is_documented(server: ServerProcess) -> None:
    document = server.client.get("/openapi.json").json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) >= 8
    for operation in operations:
        assert operation["description"]
        assert {"4XX", "5XX"} <= set(operation["responses"])


# ---- without a key


def host(server: ServerProcess, name: str) -> httpx.Response:
    port = httpx.URL(server.url).port
    return server.client.get("/v1/models", headers={"Host": f"{name}:{port}"})


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]", "127.3.2.1"])
def test_local_names_are_answered(server: ServerProcess, name: str) -> None:
    assert host(server, name).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "192.0.2.7", "127.0.0.1.evil.example", "[::2]", "", "[", "a@b"])
def test_names_that_were_made_to_lead_here_are_not(server: ServerProcess, name: str) -> None:
    response = host(server, name)
    assert response.status_code in (400, 403)  # uvicorn itself refuses what is no name
    if response.status_code == 403:
        assert response.json()["error"]["code"] == "wrong_host"


def test_pages_of_other_sites_are_not_answered(server: ServerProcess) -> None:
    body = {"model": "chat", "prompt": "x", "max_tokens": 1}
    for origin in ("https://evil.example", "null", "file://", "http://localhost.evil.example:80"):
        response = server.client.post("/v1/completions", json=body, headers={"Origin": origin})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "wrong_origin"
    assert server.client.post("/v1/completions", json=body, headers={"Origin": server.url}).status_code == 200


def test_paths_do_not_lead_out_of_the_folders(server: ServerProcess) -> None:
    for path in ("..%2Fmodels%2Fchat", "%2Fetc%2Fpasswd", "..%2F..%2F..%2Fetc%2Fpasswd", "chat.gguf", "chat%00"):
        response = server.client.get(f"/v1/models/{path}")
        assert response.status_code == 404
        assert "root:" not in response.text
