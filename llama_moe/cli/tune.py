"""`llama-moe tune`: the options with which a model is quickest."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

import llama_moe

from . import options
from .console import exit_codes
from .loading import choose_lora

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_moe.profiles import Objective
    from llama_moe.tuning import TuningProgress


@exit_codes()
def tune(
    model: options.Model,
    *,
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, metavar="M", help="Time for all of it.")] = 10.0,
    objective: Annotated[
        str, typer.Option("--objective", metavar="KIND", help="What to be quick at: decode (single tokens), prompt, or mixed.")
    ] = "decode",
    context_size: options.ContextSize = 4096,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, metavar="N", help="Texts that are generated at once.")] = 1,
    rpc: options.Rpc = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", metavar="SIZE", help="Most memory on each accelerator, such as 8GiB. Default: what is free."),
    ] = None,
    lora: options.Lora = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, metavar="N", help="Length of the prompts; micro-batches are not larger.")
    ] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", "-n", min=1, metavar="N", help="Tokens to decode.")] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Of both in each trial.")] = 3,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the trials of an earlier sweep, which are otherwise kept.")] = False,
    as_json: options.Json = False,
) -> None:
    """Find the options with which a model is quickest here.

    They are kept for this model, --lora, machine, --ctx and --max-sequences; `llama-moe run --profile auto` and
    `load(..., profile="auto")` use them. A second sweep goes on where the first one ended.
    """
    with _bar(minutes) as on_progress:
        report = llama_moe.tune(
            model,
            minutes=minutes,
            objective=cast("Objective", objective),
            context_size=context_size,
            max_sequences=max_sequences,
            rpc=rpc or (),
            vram=vram,
            lora=choose_lora(lora),
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
