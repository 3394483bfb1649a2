"""A running server, which all of its tests share, and the models that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_moe import Engine, Model
from tests.support import chat_templates as templates
from tests.support.servers import ServerProcess
from tests.support.tiny_models import DENSE, MODELS, write_tiny_model

PARALLEL = 4
CONTEXT_SIZE = 1024


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tiny models.

    "chat" has a ChatML template and weights of F32, so that it computes the same whatever the batch; "tools" has a template with a place
    for tools; "thinks" always begins with its reasoning.
    """
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "chat.gguf", replace(MODELS["llama"], chat_template=templates.CHATML))
    write_tiny_model(folder / "tools.gguf", replace(MODELS["qwen3moe"], chat_template=templates.HERMES))
    write_tiny_model(folder / "thinks.gguf", replace(MODELS["qwen3moe"], chat_template=templates.DEEPSEEK_R1))
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without experts, with a ChatML template, in a folder of its own."""
    return write_tiny_model(tmp_path_factory.mktemp("dense") / "dense.gguf", replace(MODELS[DENSE], chat_template=templates.CHATML))


@pytest.fixture(scope="session")
def server(models_dir: Path) -> Iterator[ServerProcess]:
    """`llama-moe serve` over these models, with few sequences and one thread."""
    options = ["--ctx", CONTEXT_SIZE, "--parallel", PARALLEL, "--threads", 1, "--no-repack", "--cpu-moe"]
    with ServerProcess("--model-dirs", models_dir, *options) as server:
        yield server
        assert server.stop() == 0, server.log()
        assert "Traceback" not in server.log()


@pytest.fixture(scope="session")
def open_engine(models_dir: Path) -> Iterator[Callable[[str], Engine]]:
    """An engine of this process over one of the models, as the server has it."""
    engines: dict[str, Engine] = {}

    def engine_of(name: str) -> Engine:
        if name not in engines:
            model = Model(models_dir / f"{name}.gguf", experts="cpu", devices=[], repack=False)
            engines[name] = Engine(model, context_size=CONTEXT_SIZE, max_sequences=PARALLEL, threads=1)
        return engines[name]

    yield engine_of
    for engine in engines.values():
        engine.model.close()
