"""An HTTP server with the OpenAI API's shapes; needs `pip install "llama-moe[server]"`.

`ServerSettings` says what is served and how, `serve()` does it until it is stopped, and `create_app()` gives the ASGI application for a
server of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

__all__ = ["ServerSettings", "create_app", "serve"]


def create_app(settings: ServerSettings) -> FastAPI:
    """The ASGI application.

    Models are loaded when they are first used, the first one of `settings.models` when the application starts, and closed when it ends. Of
    `settings.bind` only the host is looked at: whether it is a loopback address decides which requests are taken without a key.

    Raises:
        ImportError: the extra is not installed.
        InvalidOptionError: there is nothing to serve, or no such file or folder.
    """
    _check_extra()
    from .app import create_app as create

    return create(settings)


def serve(settings: ServerSettings, *, on_ready: Callable[[str], object] | None = None) -> None:
    """Serves until SIGTERM or SIGINT comes; then what runs has `settings.grace_seconds` to end, and the models are closed.

    Args:
        settings: what to serve, and how.
        on_ready: called with the server's URL when it takes requests.

    Raises:
        ImportError: the extra is not installed.
        LlamaMoeError: the address cannot be listened on, or the model that is loaded at the start cannot be loaded.
        FileNotFoundError: there is no such model file or folder.
    """
    _check_extra()
    from .running import serve as run

    run(settings, on_ready=on_ready)


def _check_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import sse_starlette
        import uvicorn
    except ImportError as error:
        raise ImportError(f'the server needs {error.name}, which is not installed: pip install "llama-moe[server]"') from error
    del fastapi, prometheus_client, sse_starlette, uvicorn
