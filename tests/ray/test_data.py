"""Ray Data over two processes on this machine: nothing differs from one engine, and nothing is lost with a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_moe
from llama_moe import SamplingParams
from llama_moe.ray import LlamaMoe
from tests.support.ray_actors import DiesOnce, Traced, pids
from tests.support.waiting import eventually

pytestmark = [
    pytest.mark.usefixtures("ray_machine"),
    # Ray warns of names of its own.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]

ROWS = 32
BATCH = 4
# Sums in F32 throughout: the text is the same whatever is computed beside it.
EXACT: dict[str, Any] = {
    "experts": "gpu", "devices": [], "repack": False, "context_size": 256, "kv_type": "f32", "flash_attention": "off",
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
OUTPUTS = {"text": "answer", "tokens": "ids", "finish_reason": "why"}


@pytest.fixture(scope="module")
def path(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def expected(path: Path) -> list[dict[str, Any]]:
    """What one engine makes of the rows."""
    rows: list[dict[str, Any]] = [
        {"id": number, "prompt": f"Count from {number * 7}:", "kept": {"half": number / 2}} for number in range(ROWS)
    ]
    with llama_moe.load(path, **EXACT, threads=1) as engine:
        answers = engine.generate([row["prompt"] for row in rows], GREEDY)
    return [
        row | {"answer": answer.text, "ids": list(answer.tokens), "why": answer.finish_reason}
        for row, answer in zip(rows, answers, strict=True)
    ]


@pytest.fixture
def data_options() -> Iterator[None]:
    """Both actors are there before the first batch is given to one."""
    from ray.data import DataContext

    context = DataContext.get_current()
    before = (context.wait_for_min_actors_s, context.enable_progress_bars)
    context.wait_for_min_actors_s, context.enable_progress_bars = 120, False
    yield
    context.wait_for_min_actors_s, context.enable_progress_bars = before


def generated(actor: type[LlamaMoe], rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """The rows as two actors return them, by id."""
    import ray.data

    dataset = ray.data.from_items(
        [{name: row[name] for name in ("id", "prompt", "kept")} for row in rows], override_num_blocks=ROWS // BATCH
    )
    answered = dataset.map_batches(
        actor,
        fn_constructor_kwargs={"load_options": EXACT | {"max_sequences": 3}, "sampling": GREEDY, "output_columns": OUTPUTS, **options},
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    return sorted(answered.take_all(), key=lambda row: int(row["id"]))


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.usefixtures("data_options")
def test_two_actors_give_what_one_engine_gives(path: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = generated(Traced, expected, model=str(path), folder=str(tmp_path))
    assert without(rows, "pid", "threads") == expected
    workers = {row["pid"] for row in rows}
    assert len(workers) == 2
    assert pids(tmp_path, "loaded") == workers  # each loaded the model once: a second time would have failed
    assert {row["threads"] for row in rows} == {1}  # of the two CPUs, each has one
    assert eventually(lambda: pids(tmp_path, "closed") == workers)


@pytest.mark.usefixtures("data_options")
def test_no_row_is_lost_with_an_actor(path: Path, expected: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = generated(DiesOnce, expected, model=str(path), folder=str(tmp_path), fatal_id=ROWS // 2)
    assert without(rows, "pid", "threads") == expected
    killed = pids(tmp_path, "killed")
    assert len(killed) == 1
    assert killed < pids(tmp_path, "loaded")
    assert rows[ROWS // 2]["pid"] not in killed


@pytest.mark.usefixtures("data_options")
def test_a_bad_row_ends_the_job_and_says_which(path: Path, expected: list[dict[str, Any]]) -> None:
    from ray.exceptions import RayTaskError

    rows = [row | {"prompt": "z" * 4000} if row["id"] == 6 else row for row in expected]
    with pytest.raises(RayTaskError, match=r"ContextFullError: row 2 of a batch, 'zzz.*4002 tokens"):
        generated(LlamaMoe, rows, model=str(path))
