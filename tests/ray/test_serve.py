"""The server in a replica of Ray Serve, asked by OpenAI's own client."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import llama_moe
from llama_moe import ExpertPlacement, SamplingParams
from llama_moe.errors import InvalidOptionError
from llama_moe.ray import build_app, deployment
from llama_moe.ray.serve import settings_of
from llama_moe.server import ServerSettings
from tests.support.processes import run_python

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")  # of names of its own

QUESTION: list[Any] = [{"role": "user", "content": "What is it?"}]
KEY = secrets.token_hex(8)


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("qwen3moe")


@pytest.fixture(scope="module")
def url(ray_machine: None, path: Path) -> Iterator[str]:
    """A server that computes one request at a time, which may be a very long one, and has a key."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        build_app({"models": str(path), "experts": "gpu", "repack": "false", "parallel": "1", "context_size": "131072", "api_key": KEY})
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected(path: Path) -> str:
    with llama_moe.load(path, experts="gpu", devices=[], repack=False, threads=1) as engine:
        return engine.chat(QUESTION, SamplingParams(max_tokens=12, temperature=0)).text


def test_it_answers_as_the_engine_does(client: openai.OpenAI, path: Path, expected: str) -> None:
    (model,) = client.models.list()
    assert model.id == path.stem
    answer = client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected


def test_it_streams(client: openai.OpenAI, path: Path, expected: str) -> None:
    chunks = list(client.chat.completions.create(model=path.stem, messages=QUESTION, max_tokens=12, temperature=0, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(parts) > 1
    assert "".join(parts) == expected


def test_a_client_that_leaves_frees_its_place(client: openai.OpenAI, path: Path) -> None:
    stream = client.chat.completions.create(model=path.stem, messages=QUESTION, temperature=0, stream=True)  # to the end of the context
    next(iter(stream))
    stream.close()
    answer = client.with_options(timeout=30).chat.completions.create(model=path.stem, messages=QUESTION, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.slow  # Ray Serve tries three times
def test_what_is_wrong_with_a_model_is_said(url: str, tmp_path: Path) -> None:
    from ray import serve

    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match="failed"):
        serve.run(build_app({"models": str(tmp_path / "broken.gguf")}), name="broken", route_prefix="/broken")
    (state,) = serve.status().applications["broken"].deployments.values()
    assert "ModelLoadError" in state.message
    serve.delete("broken")


def test_errors_have_their_shape(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'other' does not exist"):
        client.chat.completions.create(model="other", messages=QUESTION)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


# ---- settings


def test_a_replica_reserves_the_threads_it_has() -> None:
    made = deployment(ServerSettings(models=["model.gguf"], threads=6, parallel=4, max_queue=10))
    assert made.name == "LlamaMoeServer"
    assert (made.ray_actor_options or {})["num_cpus"] == 6
    assert made.max_ongoing_requests == 15


def test_arguments_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    settings = settings_of(
        {
            "models": "/models/a.gguf,/models/b.gguf",
            "experts": "first:12",
            "parallel": "8",
            "ttl": "null",
            "timeout": "2.5",
            "memory_budget": "24GiB",
            "kv_type": "q8_0",
            "repack": "false",
            "threads": 3,
            "api_key_file": str(tmp_path / "key"),
        }
    )
    assert settings == ServerSettings(
        models=["/models/a.gguf", "/models/b.gguf"],
        experts=ExpertPlacement.cpu_first(12),
        parallel=8,
        timeout=2.5,
        memory_budget="24GiB",
        kv_type="q8_0",
        repack=False,
        threads=3,
        api_key="secret",
    )
    assert settings_of({"models": ["a.gguf"], "api_key": "123456"}).api_key == "123456"  # though it looks like a number


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="no setting 'model'; there are models, model_dirs"):
        build_app({"model": "model.gguf"})
    with pytest.raises(InvalidOptionError, match="nothing to serve"):
        build_app({})
    with pytest.raises(InvalidOptionError, match="give one of them"):
        build_app({"models": "model.gguf", "api_key": "a", "api_key_file": "key"})


def test_without_ray_an_error_says_what_to_install() -> None:
    ran = run_python("""
        import sys
        sys.modules["ray"] = None  # as if it were not there
        from llama_moe.ray import build_app
        try:
            build_app({"models": "model.gguf"})
        except ImportError as error:
            print(error)
    """)
    assert ran.stdout.strip() == 'llama_moe.ray.deployment needs Ray: pip install "llama-moe[ray]"', ran.stderr
