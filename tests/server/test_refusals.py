"""What is wrong with a request is told in the API's shape, with the value, and nothing of the server's own."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from llama_moe import SamplingParams
from llama_moe.server import ServerSettings
from tests.server.conftest import CONTEXT_SIZE
from tests.support.conversations import ADD
from tests.support.servers import LocalServer, ServerProcess, local_server

CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
TEXT: dict[str, Any] = {"model": "chat", "prompt": "Hello", "max_tokens": 4}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, whose shape is the same in all of them."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return body["error"]  # type: ignore[no-any-return]


BAD_CHATS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user'"),
    ({"messages": [{"role": "user"}]}, None, r"messages\[0\] has no content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None, "image_url"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"n": 17}, "n", "asks for 17 completions; this server allows up to 16"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "'x' is not the id of a token"),
    ({"logit_bias": {"99999999": 1}}, None, "99999999"),
    ({"tools": [ADD]}, None, "the chat template has no place for them"),
    ({"tool_choice": "required"}, None, "there are no tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, None, "has no schema"),
    ({"grammar": "root ::= ("}, None, "grammar"),
    ({"chat_template_kwargs": {"enable_thinking": 3}}, "chat_template_kwargs", "enable_thinking is 3"),
    ({"model": "other"}, "model", "the model 'other' does not exist; there are 'chat', 'thinks', 'tools'"),
    ({"model": None}, "model", "model is not given; there are 'chat'"),
    ({"model": "../chat"}, "model", "does not exist"),
]


@pytest.mark.parametrize(("wrong", "param", "message"), BAD_CHATS, ids=[" ".join(map(str, bad[0])) for bad in BAD_CHATS])
def test_a_chat_that_cannot_be_answered(server: ServerProcess, wrong: dict[str, Any], param: str | None, message: str) -> None:
    response = server.client.post("/v1/chat/completions", json=CHAT | wrong)
    assert response.status_code == (404 if "other" in str(wrong) or "../" in str(wrong) else 400)
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": [1 << 30]}, None),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 1 << 64}, "seed"),
    ],
)
def test_a_completion_that_cannot_be_given(server: ServerProcess, wrong: dict[str, Any], param: str | None) -> None:
    response = server.client.post("/v1/completions", json=TEXT | wrong)
    assert response.status_code == 400
    assert (error_of(response)["param"] or "").split(".")[0] == (param or "")


def test_a_prompt_that_is_longer_than_the_context(server: ServerProcess) -> None:
    for path, body in (
        ("/v1/completions", TEXT | {"prompt": "a " * CONTEXT_SIZE * 2}),
        ("/v1/embeddings", {"model": "chat", "input": "a " * 9999}),
    ):
        response = server.client.post(path, json=body)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"


def test_a_streamed_request_is_refused_before_its_stream_begins(server: ServerProcess) -> None:
    response = server.client.post("/v1/completions", json=TEXT | {"stream": True, "prompt": "a " * CONTEXT_SIZE * 2})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


def test_paths_and_methods_that_are_not_there(server: ServerProcess) -> None:
    missing = server.client.get("/v1/nothing")
    assert missing.status_code == 404
    assert error_of(missing)["message"] == "there is no GET /v1/nothing"
    wrong = server.client.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "not allowed" in error_of(wrong)["message"]


def test_bodies_that_are_not_json(server: ServerProcess) -> None:
    for content in (b"{", b"\xff\xfe", b"[]", b"", b'{"messages": NaN}', b"[" * 100_000):
        response = server.client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, content[:20]
        error_of(response)


def test_the_official_client_raises_its_own_errors(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="chat", prompt="x", suffix="y")


# ---- what a server of its own settings refuses


@pytest.fixture(scope="module")
def strict(models_dir: Any) -> Any:
    """A server with narrow limits."""
    settings = ServerSettings(
        models=[models_dir / "chat.gguf"],
        experts="cpu",
        devices=[],
        context_size=CONTEXT_SIZE,
        parallel=1,
        max_queue=1,
        threads=1,
        max_tokens=8,
        max_prompt_tokens=20,
        max_choices=2,
        max_body_bytes=2000,
    )
    with local_server(settings) as local:
        yield local


def test_limits_of_tokens(strict: LocalServer) -> None:
    body = {"prompt": "Hello", "ignore_eos": True}  # with one model, its name may be left out
    assert strict.client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 8
    for path, given in (
        ("/v1/completions", body | {"max_tokens": 9}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 9}),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 9}),
    ):
        response = strict.client.post(path, json=given)
        assert response.status_code == 400
        assert error_of(response)["message"] == "max_tokens is 9; this server allows up to 8"
    long: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "a " * 30}),
        ("/v1/embeddings", {"input": "a " * 30}),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "a " * 30}]}),
    ]
    for path, given in long:
        response = strict.client.post(path, json=given)
        assert response.status_code == 400
        assert "this server allows up to 20" in error_of(response)["message"]
    assert strict.client.post("/v1/completions", json=body | {"n": 3}).status_code == 400


def test_limits_of_bodies_also_of_those_that_do_not_tell_their_length(strict: LocalServer) -> None:
    body = b'{"prompt": "' + b"a" * 5000 + b'"}'
    for content in (body, iter([body[:1500], body[1500:]])):
        response = strict.client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert error_of(response)["message"] == "the request body is larger than 2000 bytes"
    assert strict.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_full_queue_says_when_to_come_again(strict: LocalServer) -> None:
    (served,) = strict.state.pool.loaded()
    endless = served.engine.stream(["Hello", "Hello"], SamplingParams(ignore_eos=True))  # one runs, one waits
    try:
        response = strict.client.post("/v1/completions", json={"prompt": "Hello"})
    finally:
        for stream in endless:
            stream.close()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert error_of(response)["code"] == "queue_full"


def test_a_bug_is_logged_and_not_told(strict: LocalServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret reason")

    monkeypatch.setattr(type(strict.state.pool), "files", broken)
    response = strict.client.get("/v1/models")
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "the secret reason" in caplog.text


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(strict: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (served,) = strict.state.pool.loaded()
    token_bytes = type(served.model).token_bytes
    calls = 0

    def breaks_later(model: Any, token: int) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise ZeroDivisionError("the secret reason")
        return token_bytes(model, token)

    monkeypatch.setattr(type(served.model), "token_bytes", breaks_later)
    body = {"prompt": "Hello", "stream": True, "logprobs": 0, "max_tokens": 8, "ignore_eos": True}
    response = strict.client.post("/v1/completions", json=body)
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert len(events) > 2
    assert "internal_error" in events[-1]
    assert "[DONE]" not in events
    assert "secret" not in response.text
    with openai.OpenAI(base_url=f"{strict.url}/v1", api_key="any", max_retries=0) as client, pytest.raises(openai.APIError):
        list(client.completions.create(model="chat", prompt="Hello", stream=True, logprobs=0, max_tokens=8))
    assert served.engine.stats()["requests_running"] == 0
