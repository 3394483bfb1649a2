"""`llama-moe worker`: serve this machine's devices."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import typer

from llama_moe import worker
from llama_moe.errors import InvalidOptionError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn


def run_worker(bind: str, *, threads: int | None, allow_remote: bool, cache: Path | None, until_stdin_closes: bool) -> NoReturn:
    """Serves until the process is killed; an address that it must not or cannot have is a usage error."""
    try:
        worker.parse_endpoint(bind)
    except InvalidOptionError as error:
        raise typer.BadParameter(str(error), param_hint="--bind") from None
    try:
        if not allow_remote:
            worker.check_local(bind)
    except InvalidOptionError as error:
        raise typer.BadParameter(f"{error}, or --allow-remote on a network you trust", param_hint="--bind") from None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    # llama.cpp's loop is left by no exception: Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    worker.serve(bind, threads=threads, cache_dir=None if cache is None else str(cache), until_stdin_closes=until_stdin_closes)
