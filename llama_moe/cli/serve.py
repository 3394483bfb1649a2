"""`llama-moe serve`: the HTTP server."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import typer

from llama_moe.errors import InvalidOptionError, LlamaMoeError
from llama_moe.server import ServerSettings, serve

from .console import check_one_of, text_of

if TYPE_CHECKING:
    from pathlib import Path

# What the page, Prometheus and load balancers ask for again and again.
_POLLED = ("/v1/placement", "/v1/models", "/metrics", "/health")


def api_key_of(api_key: str | None, api_key_file: Path | None) -> str | None:
    """The key that the options give; both of them are a usage error."""
    check_one_of("each gives the key", {"--api-key": api_key is not None, "--api-key-file": api_key_file is not None})
    return api_key if api_key_file is None else text_of(api_key_file, "--api-key-file").strip()


def run_server(*, verbose: bool, **options: Any) -> None:
    """Serves until it is stopped; options that contradict each other are a usage error."""
    try:
        settings = ServerSettings(**options)
    except InvalidOptionError as error:
        raise typer.BadParameter(str(error)) from None
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # of its starting and stopping we tell ourselves
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
    if not verbose:
        logging.getLogger("llama_moe").setLevel(logging.WARNING)
        logging.getLogger("llama_moe.server").setLevel(logging.INFO)
    try:
        serve(settings, on_ready=lambda url: typer.echo(f"Serving on {url}"))
    except ImportError as error:
        raise LlamaMoeError(str(error)) from None


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether an entry of uvicorn's access log is one of a request that is not made every few seconds."""
    match record.args:
        case (_, _, str(path), _, 200):
            return path.partition("?")[0] not in _POLLED
    return True
