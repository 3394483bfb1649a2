"""What `llama-moe serve` says of a load is what `llama_moe.load` does."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest

import llama_moe
from llama_moe import SamplingParams, Speculative, _core
from llama_moe.server import ServerSettings
from llama_moe.server.pool import ModelPool
from tests.server.test_metrics import Metrics
from tests.support.fake_hub import FakeHub
from tests.support.processes import cli
from tests.support.servers import ServerProcess

OPTIONS: list[Any] = ["--ctx", 256, "--parallel", 2, "--threads", 1, "--no-repack", "--cpu-moe"]
# What repeats itself can be looked up.
SAMPLING: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "grammar": 'root ::= "a river, " root'}
TEXT = SAMPLING | {"prompt": "Name one: a river, a river,"}
DRAFTING: dict[str, list[Any]] = {"nothing": [], "lookup": ["--lookup"], "a model": ["--draft-model"]}


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return models_dir / "chat.gguf"


@pytest.mark.parametrize("drafting", DRAFTING)
def test_micro_batches_and_drafts(model: Path, drafting: str) -> None:
    itself = [model] if drafting == "a model" else []
    with ServerProcess("--model", model, *OPTIONS, "--micro-batch", 32, *DRAFTING[drafting], *itself) as server:
        found = server.client.post("/v1/completions", json=TEXT).raise_for_status().json()["choices"][0]["text"]
        (loaded,) = server.client.get("/v1/placement").json()["models"]
        metrics = Metrics(server.client)
    drafted = metrics("draft_tokens_total", model="chat")
    assert (drafted > 0) == (drafting != "nothing")
    # A draft model knows nothing of the grammar.
    assert (0 < metrics("accepted_draft_tokens_total", model="chat") <= drafted) == (drafting == "lookup")
    with llama_moe.load(
        model,
        experts="cpu",
        devices=[],
        context_size=256,
        max_sequences=2,
        threads=1,
        repack=False,
        micro_batch_size=32,
        speculative=Speculative.lookup() if drafting == "lookup" else None,
    ) as engine:
        assert str(engine.generate(TEXT["prompt"], SamplingParams(**SAMPLING))) == found
        if drafting != "a model":
            assert loaded["memory"] == engine.memory().to_dict()


def test_a_draft_model_leaves_with_its_model(model: Path) -> None:
    settings = ServerSettings(models=[model], draft=model, experts="cpu", devices=[], context_size=256, parallel=1, threads=1)

    async def main() -> None:
        pool = ModelPool(settings)
        await pool.start()
        assert _core.live_objects()["models"] == before + 2
        await pool.close()

    gc.collect()
    before = _core.live_objects()["models"]
    asyncio.run(main())
    gc.collect()
    assert _core.live_objects()["models"] == before


def test_a_draft_model_has_to_be_there_and_of_the_same_vocabulary(model: Path, models_dir: Path) -> None:
    ended = cli("serve", "--model", model, "--draft-model", "gone.gguf", "--bind", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "gone.gguf" in ended.stderr
    ended = cli("serve", "--model", model, "--draft-model", models_dir / "tools.gguf", "--bind", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "draft model" in ended.stderr


def test_drafts_of_two_kinds_or_for_many_models(model: Path, models_dir: Path) -> None:
    ended = cli("serve", "--model", model, "--draft-model", model, "--lookup")
    assert ended.returncode == 2
    assert "each says what drafts tokens" in ended.stderr
    ended = cli("serve", "--model-dirs", models_dir, "--draft-model", model)
    assert ended.returncode == 2
    assert "a draft model is for one model" in ended.stderr


def test_a_model_of_the_hub_is_fetched(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "owner" / "models"
    folder.mkdir(parents=True)
    (folder / "chat.gguf").write_bytes(model.read_bytes())
    with FakeHub(tmp_path / "hub") as hub:
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_TOKEN_PATH", str(tmp_path / "none"))):
            monkeypatch.setenv(name, value)
        with ServerProcess("--model", "owner/models/chat.gguf", *OPTIONS) as server:
            (entry,) = server.client.get("/v1/models").json()["data"]
            assert (entry["id"], entry["state"]) == ("chat", "loaded")
            assert server.client.post("/v1/completions", json=TEXT).status_code == 200
