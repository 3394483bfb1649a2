"""`llama-moe tune`: the options with which a model is quickest."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, cast

import typer

import llama_moe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from llama_moe.profiles import Objective
    from llama_moe.tuning import TuningProgress


def run_tune(
    model: Path,
    *,
    minutes: float,
    objective: str,
    context_size: int,
    max_sequences: int,
    rpc: Sequence[str],
    vram: str | None,
    prompt_tokens: int,
    generate_tokens: int,
    repetitions: int,
    restart: bool,
    as_json: bool,
) -> None:
    """Runs the sweep, and writes its trials and the winner."""
    with _bar(minutes) as on_progress:
        report = llama_moe.tune(
            model,
            minutes=minutes,
            objective=cast("Objective", objective),
            context_size=context_size,
            max_sequences=max_sequences,
            rpc=rpc,
            vram=vram,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            repetitions=repetitions,
            restart=restart,
            on_progress=on_progress,
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))


@contextlib.contextmanager
def _bar(minutes: float) -> Iterator[Callable[[TuningProgress], None] | None]:
    """What is tried, and how much of the time is over, on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn(f"of {minutes:g} min"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the model", total=1.0)
        yield lambda now: bar.update(task, completed=now.share, description=f"trial {now.number}: {now.options}")
