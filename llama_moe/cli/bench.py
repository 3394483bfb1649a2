"""`llama-moe bench`: memory, speed and quality under several placements."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, cast

import typer

import llama_moe

from .console import EXIT_FAILURE, check_one_of, note, text_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from llama_moe import LoraAdapter
    from llama_moe.model import HostMemory


def run_bench(
    model: Path,
    *,
    placements: str | None,
    prompt_tokens: int,
    generate_tokens: int,
    repetitions: int,
    context_size: int | None,
    micro_batch_size: int,
    threads: int | None,
    threads_batch: int | None,
    host_memory: str,
    repack: bool,
    rpc: Sequence[str],
    lora: Sequence[LoraAdapter],
    quality: Path | None,
    quality_tokens: int | None,
    against: Path | None,
    formats: Mapping[str, bool],
) -> None:
    """Measures, and writes the report in the format that is asked for; exits with 1 if a placement failed."""
    check_one_of("each is a format of the report", formats)
    if quality is None and quality_tokens is not None:
        raise typer.BadParameter("it limits the text of --quality, which is not given", param_hint="--quality-tokens")
    text = None if quality is None else text_of(quality, "--quality")
    for endpoint in rpc:
        llama_moe.add_rpc_device(endpoint)
    report = llama_moe.benchmark(
        model,
        placements=None if placements is None else [word.strip() for word in placements.split(",") if word.strip()],
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        repetitions=repetitions,
        context_size=context_size,
        micro_batch_size=micro_batch_size,
        threads=threads,
        threads_batch=threads_batch,
        host_memory=cast("HostMemory", host_memory),
        repack=repack,
        lora=lora,
        quality=text,
        quality_tokens=1024 if quality_tokens is None else quality_tokens,
        against=against,
        on_progress=note if sys.stderr.isatty() else None,
    )
    if formats["--json"]:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif formats["--csv"]:
        typer.echo(report.to_csv(), nl=False)
    else:
        typer.echo(report.to_markdown() if formats["--markdown"] else str(report))
    if report.failed:
        if formats["--json"] or formats["--csv"]:  # the tables say it themselves
            for row in report.rows:
                if row.error is not None:
                    note(f"error: {row.placement}: {row.error}")
        raise typer.Exit(EXIT_FAILURE)
