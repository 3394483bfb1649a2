"""`llama-moe pull`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import typer

import llama_moe
from llama_moe.hub import local_model
from llama_moe.remote import hub_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llama_moe.model import StrPath


def pull_model(repo: str, file: str | None, *, revision: str | None, folder: Path | None) -> None:
    """Fetches a model, and writes where it is to standard output."""
    with download_bar(file or repo) as on_progress:
        path = llama_moe.pull(repo, file, revision=revision, folder=folder, on_progress=on_progress)
    typer.echo(path)


def model_file(model: Path) -> StrPath:
    """The file that a command's MODEL stands for: one on the hub is fetched first."""
    name = str(model)
    if hub_reference(name) is None:
        return model
    with download_bar(name) as on_progress:
        return local_model(name, on_progress=on_progress)


@contextlib.contextmanager
def download_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """How much is there, how quick it comes and how long it will take, on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name.rpartition("/")[2], total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
