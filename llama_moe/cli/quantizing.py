"""`llama-moe quantize` and `llama-moe imatrix`: smaller model files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llama_moe
from llama_moe import Model
from llama_moe._sizes import format_size

from . import options
from .console import exit_codes, note, progress, regex_rules, text_of
from .loading import add_workers, choose_lora, choose_placement

if TYPE_CHECKING:
    from collections.abc import Sequence


@exit_codes()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="GGUF file; the first one of a split model.")],
    target_and_type: Annotated[
        list[str],
        typer.Argument(metavar="DST TYPE", help="File to write (not needed with --dry-run), and a type such as Q4_K_M, Q2_K, Q8_0 or F16."),
    ],
    *,
    experts: Annotated[str | None, typer.Option("--experts", metavar="T", help="Of the routed experts, such as Q2_K.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="T", help="Of the attention, such as Q6_K.")] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="T", help="Of the output matrix.")] = None,
    embedding: Annotated[str | None, typer.Option("--embedding", metavar="T", help="Of the token embedding.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="REGEX=T",
            help="Of tensors whose name matches. May be given several times; the first that matches decides, before the options above.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix: IQ1, IQ2, IQ3_XXS and Q2_K_S need it.")
    ] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Also change what is quantised, losing precision twice.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: one for each core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done; reads no weights.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model in smaller number formats.

    TYPE is one of llama.cpp's mixes, which choose a format for every tensor; the options change it for a part of the model.
    """
    target, quantization = _target_and_type(target_and_type, dry_run=dry_run)
    with progress("Quantizing") as on_progress:
        report = llama_moe.quantize(
            source,
            target,
            quantization,
            experts=experts,
            attention=attention,
            output=output,
            embedding=embedding,
            overrides=regex_rules(override or (), "TYPE", "--override"),
            imatrix=imatrix,
            requantize=requantize,
            threads=threads,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
    note(f"{'it would have' if dry_run else f'{target}:'} {format_size(report.file_bytes)}")


@exit_codes()
def imatrix(
    model: options.Model,
    *,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Compute this text.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="File to write.")] = Path("imatrix.gguf"),
    context_size: Annotated[int, typer.Option("--ctx", min=32, metavar="N", help="Tokens that are computed together.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="How many of them. Default: the whole text.")] = None,
    output: Annotated[bool, typer.Option("--process-output", help="Also for the output matrix.")] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read names of special tokens in the text as these tokens.")
    ] = False,
    cpu_moe: options.CpuMoe = False,
    n_cpu_moe: options.NCpuMoe = None,
    rpc: options.Rpc = None,
    lora: options.Lora = None,
    threads: options.Threads = None,
) -> None:
    """Compute the importance matrix of a model, for quantize --imatrix."""
    experts = choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe)
    text = text_of(file, "--file")
    add_workers(rpc)
    with progress("Loading") as on_progress:
        loaded = Model(model, experts=experts, lora=choose_lora(lora), fit_context_tokens=context_size, on_progress=on_progress)
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
