"""`llama-moe worker`: serve this machine's devices."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from llama_moe.errors import InvalidOptionError

from . import options
from .console import exit_codes


@exit_codes()
def worker(
    bind: Annotated[str, typer.Option("--bind", metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:50052",
    *,
    threads: options.Threads = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen where other machines can connect. The protocol has no authentication.")
    ] = False,
    cache: Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep weights that clients sent in this folder.")] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Serve this machine's devices to others.

    This is llama.cpp's RPC server; `llama-moe run --rpc HOST:PORT` uses it. It runs until it is killed.
    """
    from llama_moe.worker import check_local, parse_endpoint
    from llama_moe.worker import serve as serve_devices

    try:
        parse_endpoint(bind)
    except InvalidOptionError as error:
        raise typer.BadParameter(str(error), param_hint="--bind") from None
    try:
        if not allow_remote:
            check_local(bind)
    except InvalidOptionError as error:
        raise typer.BadParameter(f"{error}, or --allow-remote on a network you trust", param_hint="--bind") from None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    # llama.cpp's loop is left by no exception: Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    serve_devices(bind, threads=threads, cache_dir=None if cache is None else str(cache), until_stdin_closes=until_stdin_closes)
