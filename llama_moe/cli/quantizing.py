"""`llama-moe quantize` and `llama-moe imatrix`: smaller model files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

import llama_moe
from llama_moe import Model
from llama_moe._sizes import format_size

from .console import note, progress, regex_rules, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llama_moe import ExpertPlacement


def quantize_model(
    source: Path,
    arguments: Sequence[str],
    *,
    experts: str | None,
    attention: str | None,
    output: str | None,
    embedding: str | None,
    overrides: Sequence[str],
    imatrix: Path | None,
    requantize: bool,
    threads: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Writes a smaller file, or what it would be like."""
    target, quantization = _target_and_type(arguments, dry_run=dry_run)
    with progress("Quantizing") as on_progress:
        report = llama_moe.quantize(
            source,
            target,
            quantization,
            experts=experts,
            attention=attention,
            output=output,
            embedding=embedding,
            overrides=regex_rules(overrides, "TYPE", "--override"),
            imatrix=imatrix,
            requantize=requantize,
            threads=threads,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
    note(f"{'it would have' if dry_run else f'{target}:'} {format_size(report.file_bytes)}")


def compute_imatrix(
    model: Path,
    file: Path,
    out: Path,
    *,
    experts: ExpertPlacement,
    rpc: Sequence[str],
    context_size: int,
    chunks: int | None,
    output: bool,
    parse_special: bool,
    threads: int | None,
) -> None:
    """Writes the importance matrix of a model."""
    text = text_of(file, "--file")
    for endpoint in rpc:
        llama_moe.add_rpc_device(endpoint)
    with progress("Loading") as on_progress:
        loaded = Model(model, experts=experts, fit_context_tokens=context_size, on_progress=on_progress)
    with loaded, progress("Computing") as on_progress:
        report = llama_moe.imatrix(
            loaded,
            text,
            out,
            context_size=context_size,
            chunks=chunks,
            output=output,
            parse_special=parse_special,
            dataset=file.name,
            threads=threads,
            on_progress=on_progress,
        )
    typer.echo(report)
    if report.unused_experts:
        note(f"warning: no token used {report.unused_experts} of the experts' matrices; a longer or more varied text helps")


def _target_and_type(arguments: Sequence[str], *, dry_run: bool) -> tuple[str | None, str]:
    """`DST TYPE`, of which a dry run needs only the second."""
    if len(arguments) == 1 and dry_run:
        return None, arguments[0]
    if len(arguments) != 2:
        raise typer.BadParameter("give the file to write and the type: SRC DST TYPE" + (", or SRC TYPE" if dry_run else ""))
    return arguments[0], arguments[1]
