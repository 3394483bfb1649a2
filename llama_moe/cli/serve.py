"""`llama-moe serve`: the HTTP server."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llama_moe.errors import InvalidOptionError, LlamaMoeError

from . import options
from .console import check_one_of, exit_codes, text_of
from .loading import choose_lora, choose_placement
from .pull import model_file

if TYPE_CHECKING:
    from llama_moe.model import ExpertKernels

# What the page, Prometheus and load balancers ask for again and again.
_POLLED = ("/v1/placement", "/v1/models", "/metrics", "/health")


@exit_codes()
def serve(
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Serve this GGUF file, or OWNER/REPOSITORY/FILE of Hugging Face, which is fetched if need be. May be given several times.",
        ),
    ] = None,
    *,
    model_dirs: Annotated[
        list[Path] | None,
        typer.Option("--model-dirs", metavar="DIR", help="Serve the GGUF files in this folder. May be given several times."),
    ] = None,
    more_dirs: Annotated[list[Path] | None, typer.Argument(metavar="DIR", help="Further folders, after --model-dirs.")] = None,
    cpu_moe: options.CpuMoe = False,
    n_cpu_moe: options.NCpuMoe = None,
    experts_on: options.ExpertsOn = None,
    fit: Annotated[bool, typer.Option("--fit", help="As many experts as fit on the accelerators. That is the default.")] = False,
    bind: Annotated[str, typer.Option("--bind", metavar="HOST:PORT", help="Where to listen; port 0: any free one.")] = "127.0.0.1:11435",
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="LLAMA_MOE_API_KEY", help="Clients must send it. Needed where others can connect."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file with the key.")] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, metavar="N", help="Requests computed at once; more wait.")] = 4,
    context_size: options.ContextSize = 4096,
    context_pool: Annotated[
        int | None, typer.Option("--context-pool", min=1, metavar="N", help="Tokens of KV cache for all requests. Default: --ctx for each.")
    ] = None,
    ttl: Annotated[float | None, typer.Option("--ttl", min=0.0, metavar="S", help="Unload models that nobody used for S seconds.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", metavar="SIZE", help="Memory of all loaded models. Default: what is free.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of one answer.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option("--max-prompt-tokens", min=1, metavar="N", help="Of one prompt.")] = None,
    max_choices: Annotated[int, typer.Option("--max-choices", min=1, metavar="N", help="Answers that one request may ask for.")] = 16,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Of one request.")] = "16MiB",
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, metavar="N", help="Requests that may wait.")] = 1024,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.0, metavar="S", help="Of one request, its wait included.")] = None,
    grace: Annotated[float, typer.Option("--grace", min=0.0, metavar="S", help="What running requests have to end, when stopped.")] = 10.0,
    trace_routing: Annotated[
        bool, typer.Option("--trace-routing", help="Count which experts are chosen, for /metrics and /v1/routing; costs speed.")
    ] = False,
    threads: options.Threads = None,
    threads_batch: options.BatchThreads = None,
    micro_batch: Annotated[
        int | None, typer.Option("--micro-batch", min=1, metavar="N", help="Most prompt tokens computed at once. Default: 512.")
    ] = None,
    kv_type: options.KvType = "f16",
    repack: options.TunableRepack = None,
    expert_kernels: options.TunableExpertKernels = None,
    profile: options.Profile = None,
    rpc: options.Rpc = None,
    lora: options.Lora = None,
    lookup: options.Lookup = False,
    draft_model: options.DraftModel = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what llama.cpp says, too.")] = False,
) -> None:
    """Serve models over HTTP, with the OpenAI API's shapes.

    It listens on this machine only, unless --bind says otherwise, and then needs a key. Models in folders are loaded when they are first
    asked for, and the least recently used is unloaded when another needs its memory. It runs until Ctrl-C or SIGTERM; requests that run
    then have the time of --grace to end.
    """
    from llama_moe import server

    check_one_of(
        "each says where the experts go",
        {"--fit": fit, "--cpu-moe": cpu_moe, "--n-cpu-moe": n_cpu_moe is not None, "--experts-on": bool(experts_on)},
    )
    experts = choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=experts_on)
    check_one_of("each says what drafts tokens", {"--lookup": lookup, "--draft-model": draft_model is not None})
    key = api_key_of(api_key, api_key_file)
    try:
        settings = server.ServerSettings(
            models=models or [],
            model_dirs=[*(model_dirs or []), *(more_dirs or [])],
            experts=experts,
            bind=bind,
            api_key=key,
            parallel=parallel,
            context_size=context_size,
            context_pool=context_pool,
            ttl=ttl,
            memory_budget=memory_budget,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            max_choices=max_choices,
            max_body_bytes=max_body,
            max_queue=max_queue,
            timeout=timeout,
            grace_seconds=grace,
            trace_routing=trace_routing,
            threads=threads,
            threads_batch=threads_batch,
            micro_batch_size=micro_batch,
            kv_type=kv_type,
            repack=repack,
            expert_kernels=cast("ExpertKernels | None", expert_kernels),
            profile=profile,
            rpc=rpc or [],
            lora=choose_lora(lora),
            draft="lookup" if lookup else draft_model,
        )
    except InvalidOptionError as error:
        raise typer.BadParameter(str(error)) from None
    settings = replace(settings, models=[model_file(model) for model in models or ()])
    _log_to_stderr(verbose=verbose)
    try:
        server.serve(settings, on_ready=lambda url: typer.echo(f"Serving on {url}"))
    except ImportError as error:
        raise LlamaMoeError(str(error)) from None


def api_key_of(api_key: str | None, api_key_file: Path | None) -> str | None:
    """The key that the options give; both of them are a usage error."""
    check_one_of("each gives the key", {"--api-key": api_key is not None, "--api-key-file": api_key_file is not None})
    return api_key if api_key_file is None else text_of(api_key_file, "--api-key-file").strip()


def _log_to_stderr(*, verbose: bool) -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # of its starting and stopping we tell ourselves
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
    if not verbose:
        logging.getLogger("llama_moe").setLevel(logging.WARNING)
        logging.getLogger("llama_moe.server").setLevel(logging.INFO)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether an entry of uvicorn's access log is one of a request that is not made every few seconds."""
    match record.args:
        case (_, _, str(path), _, 200):
            return path.partition("?")[0] not in _POLLED
    return True
