"""`llama-moe bench`: memory, speed and quality under several placements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import llama_moe

from . import options
from .console import EXIT_FAILURE, check_one_of, exit_codes, note, text_of
from .loading import add_workers, choose_lora

if TYPE_CHECKING:
    from llama_moe.model import ExpertKernels, HostMemory


@exit_codes()
def bench(
    model: options.Model,
    *,
    placements: Annotated[
        str | None,
        typer.Option(
            "--placements",
            metavar="LIST",
            help="Where the experts go, separated by commas: gpu, cpu, fit, fit:8GiB, first:12 (layers in host memory), last:4. "
            "Default: gpu,cpu,fit; only gpu where that makes no difference.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=0, metavar="N", help="Length of the prompts; 0: none.")] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", "-n", min=0, metavar="N", help="Tokens to decode; 0: none.")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Of each test.")] = 3,
    context_size: Annotated[
        int | None,
        typer.Option(
            "--ctx",
            min=0,
            metavar="N",
            help="Tokens of context; 0: what the model was trained for. Default: 4096, or more if the tests need more.",
        ),
    ] = None,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch", min=1, metavar="N", help="Most prompt tokens computed at once.")] = 512,
    threads: options.Threads = None,
    threads_batch: options.BatchThreads = None,
    host_memory: Annotated[
        str, typer.Option("--host-memory", metavar="MODE", help="How host memory holds weights: mmap, pageable, pinned or locked.")
    ] = "mmap",
    repack: options.Repack = True,
    expert_kernels: options.ExpertKernels = "auto",
    rpc: options.Rpc = None,
    lora: options.Lora = None,
    quality: Annotated[
        Path | None, typer.Option("--quality", metavar="FILE", help="Compare what is predicted along this text: perplexity, agreement, KL.")
    ] = None,
    quality_tokens: Annotated[
        int | None, typer.Option("--quality-tokens", min=3, metavar="N", help="How much of it to use. Default: 1024.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="Measure this file too, such as another quantisation.")
    ] = None,
    as_json: options.Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
) -> None:
    """Measure memory, speed and quality under several placements.

    The speeds compare with llama-bench's. A placement that fails is reported and the others go on; the exit status is then 1.
    """
    check_one_of("each is a format of the report", {"--json": as_json, "--markdown": as_markdown, "--csv": as_csv})
    if quality is None and quality_tokens is not None:
        raise typer.BadParameter("it limits the text of --quality, which is not given", param_hint="--quality-tokens")
    text = None if quality is None else text_of(quality, "--quality")
    add_workers(rpc)
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
        expert_kernels=cast("ExpertKernels", expert_kernels),
        lora=choose_lora(lora),
        quality=text,
        quality_tokens=1024 if quality_tokens is None else quality_tokens,
        against=against,
        on_progress=note if sys.stderr.isatty() else None,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif as_csv:
        typer.echo(report.to_csv(), nl=False)
    else:
        typer.echo(report.to_markdown() if as_markdown else str(report))
    if report.failed:
        if as_json or as_csv:  # the tables say it themselves
            for row in report.rows:
                if row.error is not None:
                    note(f"error: {row.placement}: {row.error}")
        raise typer.Exit(EXIT_FAILURE)
