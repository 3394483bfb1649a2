"""Models come into memory when they are used, and leave it when they are not."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama_moe
from llama_moe.errors import DoesNotFitError
from llama_moe.server import ServerSettings
from llama_moe.server.discovery import ModelFile, find_models
from llama_moe.server.errors import ApiError
from llama_moe.server.pool import ModelPool
from tests.support.loops import until

OPTIONS: dict[str, Any] = {"experts": "cpu", "devices": [], "context_size": 256, "parallel": 1, "threads": 1}


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """Four models of one size: a, b, c and d."""
    for name in "abcd":
        shutil.copy(tiny_model("llama"), tmp_path / f"{name}.gguf")
    return tmp_path


@pytest.fixture
def two_models(folder: Path) -> int:
    """Memory for two of them, and half of a third."""
    plan = llama_moe.plan(folder / "a.gguf", experts="cpu", devices=[], context_size=256, max_sequences=1)
    return plan.memory.total_bytes * 5 // 2


@contextlib.asynccontextmanager
async def open_pool(folder: Path, **options: Any) -> Any:
    pool = ModelPool(ServerSettings(model_dirs=[folder], **OPTIONS | options))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()
        assert pool.loaded() == []


def names(pool: ModelPool) -> set[str]:
    return {served.name for served in pool.loaded()}


async def touch(pool: ModelPool, *models: str) -> None:
    """Uses the models, one after the other."""
    for name in models:
        async with pool.use(name) as served:
            assert served.name == name
            assert not served.engine.closed


def test_a_model_is_loaded_once_for_all_who_ask(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder) as pool:
            assert names(pool) == set()
            engines = []

            async def ask() -> None:
                async with pool.use("a") as served:
                    engines.append(served.engine)
                    await served.engine.agenerate("Hello", llama_moe.SamplingParams(max_tokens=2))

            await asyncio.gather(*(ask() for _ in range(10)))
            assert len(set(map(id, engines))) == 1
            assert names(pool) == {"a"}
            assert pool.loading() == {}
        assert engines[0].closed
        assert engines[0].model.closed

    asyncio.run(main())


def test_the_least_recently_used_makes_room(folder: Path, two_models: int) -> None:
    async def main() -> None:
        async with open_pool(folder, memory_budget=two_models) as pool:
            await touch(pool, "a", "b", "a", "c")
            assert names(pool) == {"a", "c"}
            await touch(pool, "a", "d")
            assert names(pool) == {"a", "d"}

    asyncio.run(main())


def test_without_a_budget_all_that_fits_stays(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder) as pool:
            await touch(pool, "a", "b", "c", "d")
            assert names(pool) == {"a", "b", "c", "d"}

    asyncio.run(main())


def test_a_model_in_use_stays_until_its_users_are_done(folder: Path, two_models: int) -> None:
    async def main() -> None:
        async with open_pool(folder, memory_budget=two_models) as pool, contextlib.AsyncExitStack() as held:
            first = await held.enter_async_context(pool.use("a"))
            await held.enter_async_context(pool.use("b"))
            third = asyncio.create_task(touch(pool, "c"))
            await until(lambda: "c" in pool.loading())
            again = asyncio.create_task(touch(pool, "a", "b"))  # which wait for their next loads where they have to
            assert (await first.engine.agenerate("Hello", llama_moe.SamplingParams(max_tokens=2))).finish_reason != "cancelled"
            assert not third.done()
            assert names(pool) == {"a", "b"}
            await held.aclose()
            await asyncio.gather(third, again)

    asyncio.run(main())


def test_many_users_of_more_models_than_fit(folder: Path, two_models: int) -> None:
    async def main() -> None:
        async with open_pool(folder, memory_budget=two_models) as pool:

            async def ask(name: str) -> str:
                async with pool.use(name) as served:
                    assert sum(report.memory.total_bytes for report in pool.loaded()) <= two_models
                    completion = await served.engine.agenerate("Hello", llama_moe.SamplingParams(max_tokens=4, temperature=0))
                    assert completion.finish_reason != "cancelled"
                    return str(completion)

            texts = await asyncio.gather(*(ask("abcd"[number % 4]) for number in range(40)))
            assert len(set(texts)) == 1

    asyncio.run(main())


def test_a_model_that_is_larger_than_the_budget(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder, memory_budget="10 KiB") as pool:
            for _ in range(2):
                with pytest.raises(
                    ApiError, match=r"'a' cannot be loaded: it takes .* of the memory budget of 10.0 KiB is left"
                ) as refused:
                    await touch(pool, "a")
                assert refused.value.status == 503
                assert refused.value.code == "model_does_not_fit"
                assert isinstance(refused.value.__cause__, DoesNotFitError)

    asyncio.run(main())


def test_what_is_not_used_leaves_after_its_time(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder, ttl=0.01) as pool:
            async with pool.use("a") as held:
                await touch(pool, "b")
                await until(lambda: names(pool) == {"a"})
                await touch(pool, "c")
                await until(lambda: names(pool) == {"a"})
                assert not held.engine.closed
            await until(lambda: names(pool) == set())
            assert held.engine.closed
            await touch(pool, "a")

    asyncio.run(main())


def test_a_user_who_leaves_while_it_loads_does_not_stop_the_load(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder) as pool:
            user = asyncio.create_task(touch(pool, "a"))
            await until(lambda: "a" in pool.loading())
            user.cancel()
            await asyncio.gather(user, return_exceptions=True)
            assert user.cancelled()
            await until(lambda: names(pool) == {"a"})

    asyncio.run(main())


def test_files_that_come_change_and_go(folder: Path, tiny_model: Callable[[str], Path]) -> None:
    async def main() -> None:
        async with open_pool(folder) as pool:
            with pytest.raises(ApiError, match="the model 'new' does not exist; there are 'a', 'b', 'c', 'd'") as missing:
                await touch(pool, "new")
            assert missing.value.status == 404
            (folder / "new.gguf").write_bytes(b"GGUF" + b"junk" * 100)
            with pytest.raises(ApiError, match="'new' cannot be loaded") as broken:
                await touch(pool, "new")
            assert broken.value.status == 500
            assert str(folder) not in broken.value.message
            shutil.copy(tiny_model("llama"), folder / "new.gguf")
            await touch(pool, "new")
            # One that was known, and now leads out of the folder.
            (folder / "b.gguf").unlink()
            (folder / "b.gguf").symlink_to(tiny_model("llama"))
            with pytest.raises(ApiError, match="'b' does not exist"):
                await touch(pool, "b")
            assert "b" not in await pool.files()

    asyncio.run(main())


def test_names_that_do_not_exist_cost_few_looks_at_the_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def counted(settings: ServerSettings) -> dict[str, ModelFile]:
        begin = time.perf_counter()
        try:
            return find_models(settings)
        finally:
            looks.append(time.perf_counter() - begin)

    monkeypatch.setattr(llama_moe.server.pool, "find_models", counted)

    async def ask(pool: ModelPool, name: str) -> None:
        with pytest.raises(ApiError, match=f"{name!r} does not exist"):
            await touch(pool, name)

    async def main() -> None:
        async with open_pool(folder) as pool:
            looks.clear()
            await asyncio.gather(*(ask(pool, f"no-{number}") for number in range(1000)))
            assert 1 <= len(looks) <= 2
            # One after the other each has a look of its own, but with pauses.
            looks.clear()
            begin = time.perf_counter()
            for number in range(20):
                await ask(pool, f"no-{number}")
            assert len(looks) == 20
            assert sum(looks) < (time.perf_counter() - begin) / 5
            # A file that came meanwhile is found by the first who asks, also among many who ask for what is not there.
            others = [asyncio.create_task(ask(pool, f"no-{number}")) for number in range(100)]
            await asyncio.sleep(0)
            shutil.copy(folder / "a.gguf", folder / "new.gguf")
            await touch(pool, "new")
            await asyncio.gather(*others)

    asyncio.run(main())


def test_the_name_may_be_left_out_where_there_is_one_model(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder) as pool:
            with pytest.raises(ApiError, match="model is not given; there are 'a', 'b', 'c', 'd'"):
                async with pool.use(None):
                    pass
        for name in "bcd":
            (folder / f"{name}.gguf").unlink()
        async with open_pool(folder) as pool, pool.use(None) as served:
            assert served.name == "a"

    asyncio.run(main())


def test_a_named_model_is_loaded_at_the_start(folder: Path) -> None:
    async def main() -> None:
        pool = ModelPool(ServerSettings(models=[folder / "b.gguf", folder / "a.gguf"], model_dirs=[folder], **OPTIONS))
        await pool.start()
        assert names(pool) == {"b"}
        await pool.close()

    asyncio.run(main())


def test_closing_ends_what_runs_and_what_waits(folder: Path) -> None:
    async def main() -> None:
        async with open_pool(folder, context_size=1 << 16) as pool:
            async with pool.use("a") as served:
                endless = served.engine.astream("Hello", llama_moe.SamplingParams(ignore_eos=True))
                waiting = asyncio.create_task(touch(pool, "b"))
                await until(lambda: "b" in pool.loading())
                await pool.close()
                assert (await endless.read_all()).finish_reason == "cancelled"
                (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
                assert isinstance(outcome, ApiError)
                assert outcome.code == "shutting_down"
            with pytest.raises(ApiError, match="shutting down"):
                await touch(pool, "a")

    asyncio.run(main())
