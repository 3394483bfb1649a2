"""`llama-moe pull`: fetch a model from the Hugging Face hub."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llama_moe

from .console import exit_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_moe.model import StrPath


@exit_codes()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/REPOSITORY of the Hugging Face hub.")],
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A file of it; a pattern, such as '*Q4_K_M*'; or a format that one name has, such as Q4_K_M. Default: its only model.",
        ),
    ] = None,
    *,
    revision: Annotated[str | None, typer.Option("--revision", metavar="REV", help="A branch, tag or commit. Default: main.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Put it there. Default: the cache of the Hugging Face tools.")
    ] = None,
) -> None:
    """Fetch a model from the Hugging Face hub, and say where it is.

    All files of a split model are fetched. A download that was interrupted goes on where it ended. The token for what is not public is
    that of the Hugging Face tools ($HF_TOKEN, or 'hf auth login').
    """
    with download_bar(file or repo) as on_progress:
        path = llama_moe.pull(repo, file, revision=revision, folder=folder, on_progress=on_progress)
    typer.echo(path)


def model_file(model: Path) -> StrPath:
    """The file that a command's MODEL stands for: one on the hub is fetched first."""
    from llama_moe.hub import local_model  # late: HTTP takes long to import
    from llama_moe.remote import hub_reference

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
