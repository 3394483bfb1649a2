"""Every code block of README.md and docs/ does what the page says: each page's blocks run in order, against real models.

A page's blocks share one process and one folder, as they would at a reader's desk. What they cannot do here is marked in the page, with the
reason, and is a skipped test.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pytest

from llama_moe.worker import Worker
from tests.support.code_blocks import Block, blocks_of, with_stand_ins
from tests.support.fake_hub import FakeHub
from tests.support.full_size_models import write_full_size_model
from tests.support.processes import REPOSITORY, environment, run_on_one_core

pytestmark = pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="the pages are not here: an installed package is tested")

_DOCS = REPOSITORY / "docs"
_PAGES = sorted([Path("README.md"), *(path.relative_to(REPOSITORY) for path in _DOCS.rglob("*.md"))]) if _DOCS.is_dir() else []
_BLOCKS = {str(page): blocks_of(REPOSITORY / page, str(page)) for page in _PAGES}
_RUN = {page: [block for block in blocks if block.kind != "text" and not block.not_run] for page, blocks in _BLOCKS.items()}
_NOT_RUN = [block for blocks in _BLOCKS.values() for block in blocks if block.not_run]

_ADDRESSES = ("127.0.0.1:11435", "127.0.0.1:50052", "192.168.0.12:50052")
_SECOND_MACHINE = "192.168.0.13:50052"

# Headers of real models: for what reads no weights.
_FULL_SIZE = (("DeepSeek-MoE-16B", "F16"), ("Qwen3-30B-A3B", "Q4_K_M"))
_TEXT = "The museum of railways has steam engines from all over the world. Most of them still run on Sundays. " * 40


@pytest.fixture
def folder(tmp_path: Path, models: dict[str, Path]) -> Path:
    """The folder in which a page's blocks run."""
    for name, path in models.items():
        (tmp_path / name).symlink_to(path)
    (tmp_path / "text.txt").write_text(_TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Iterator[FakeHub]:
    """A hub that has OWNER/REPOSITORY."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "OWNER" / "REPOSITORY"
    repository.mkdir(parents=True)
    for name in ("FILE.gguf", "model-Q4_K_M.gguf"):
        (repository / name).symlink_to(models["model.gguf"])
    with FakeHub(folder) as hub:
        yield hub


@pytest.fixture
def stand_ins(page: str) -> Iterator[dict[str, str]]:
    """What takes the place of addresses that pages name: free ports, and a worker for the second of two machines."""
    stand_ins = {address: f"127.0.0.1:{free_port()}" for address in _ADDRESSES}
    with contextlib.ExitStack() as stack:
        if any(_SECOND_MACHINE in block.code for block in _RUN[page]):
            stand_ins[_SECOND_MACHINE] = stack.enter_context(Worker(threads=1)).endpoint
        yield stand_ins


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("page", [page for page, blocks in _RUN.items() if blocks])
def test_code_blocks_run(page: str, folder: Path, hub: FakeHub, variables: dict[str, str], stand_ins: dict[str, str]) -> None:
    blocks = [with_stand_ins(block, stand_ins) for block in _RUN[page]]
    for name, quantization in _FULL_SIZE:
        if any(f"{name}-{quantization}.gguf" in block.code for block in blocks):
            write_full_size_model(folder / f"{name}-{quantization}.gguf", name, quantization)
    ran = run_blocks(blocks, cwd=folder, env=variables | {"HF_ENDPOINT": hub.url})
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-6000:]}"


def run_blocks(blocks: list[Block], *, cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.support.code_blocks"]
    return run_on_one_core(command, stdin=json.dumps([asdict(block) for block in blocks]), cwd=cwd, env=env)


@pytest.mark.parametrize("block", _NOT_RUN, ids=str)
def test_code_block_that_is_not_run(block: Block) -> None:
    """Here to be listed among the skipped tests, with the reason."""
    pytest.skip(block.not_run)


def test_a_block_is_run_or_says_why_not() -> None:
    assert all(len(block.not_run) >= 10 for block in _NOT_RUN), "a reason that a reader understands"
    assert sum(map(len, _RUN.values())) > 0


def test_blocks_are_collected_with_their_place_and_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 1\n```\n\n<!-- not run: needs root -->\n```sh\nreboot\n```\n\n"
        "<!-- runs until the end of the page: 127.0.0.1:1 -->\n```sh\nserve\n```\n",
        encoding="utf-8",
    )
    first, second, third = blocks_of(page, "page.md")
    assert (first.kind, first.line, first.code, first.not_run) == ("python", 4, "x = 1\n", "")
    assert (second.kind, second.line, second.not_run) == ("shell", 9, "needs root")
    assert third.endpoint == "127.0.0.1:1"
    page.write_text("```\nllama-moe run\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page.md:2: a block of ''"):
        blocks_of(page, "page.md")


@pytest.mark.parametrize(
    ("kind", "code", "passes"),
    [
        ("python", "assert 1 + 1 == 2", True),
        ("python", "assert 1 + 1 == 3", False),
        ("python", "import warnings; warnings.warn('old')", False),
        ("shell", "true | cat", True),
        ("shell", "false | cat", False),
        ("console", "$ echo one; echo two\none\n...\n$ echo three\nthree\n", True),
        ("console", "$ echo one\ntwo\n", False),
        ("console", "$ false\n", False),
    ],
)
def test_a_block_that_fails_is_noticed(kind: Literal["python", "shell", "console"], code: str, passes: bool, tmp_path: Path) -> None:
    ran = run_blocks([Block(page="page.md", line=7, kind=kind, code=code)], cwd=tmp_path, env=environment())
    assert (ran.returncode == 0) == passes, ran.stderr
    assert ("This block failed: page.md:7" in ran.stderr) != passes
