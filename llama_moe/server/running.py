"""Running the application in uvicorn, and stopping it in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
from typing import TYPE_CHECKING

import uvicorn
from sse_starlette.sse import AppStatus

from llama_moe.errors import LlamaMoeError

from .app import create_app

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .settings import ServerSettings
    from .state import ServerState

logger = logging.getLogger("llama_moe.server")

# From the end of the grace period, when models are closed and their requests told so, to the end of connections that are still open.
_LAST_SECONDS = 5


def serve(settings: ServerSettings, *, on_ready: Callable[[str], object] | None) -> None:
    """See `llama_moe.server.serve`."""
    app = create_app(settings)
    with contextlib.closing(_listen(settings)) as listener:
        # h11 limits what a request may have before its body, 64 KiB in all; the other parser that uvicorn may find takes any amount.
        config = uvicorn.Config(app, http="h11", ws="none", log_config=None, lifespan="on", server_header=False)
        config.timeout_graceful_shutdown = math.ceil(settings.grace_seconds) + _LAST_SECONDS
        _Server(config, app.state.server, on_ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's, which loads the first model before it takes requests, and gives those that run a time to end when it is stopped."""

    def __init__(self, config: uvicorn.Config, state: ServerState, on_ready: Callable[[str], object] | None) -> None:
        super().__init__(config)
        self._state = state
        self._on_ready = on_ready

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            # Not by the application's lifespan: what is wrong with a model is for the caller, not for uvicorn's log.
            await self._state.pool.start()
            with _streams_outlive_signals(), _signals_only_stop():
                await super().serve(sockets)
        finally:
            await self._state.pool.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None and sockets:
            self._on_ready(_url(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self._state.settings.grace_seconds
        logger.info("stopping; requests that run have %g s to end", grace)
        self._state.stopping = True
        ending = asyncio.create_task(self._close_models(grace))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _close_models(self, grace: float) -> None:
        await asyncio.sleep(grace)
        await self._state.pool.close()


@contextlib.contextmanager
def _signals_only_stop() -> Iterator[None]:
    """Lets signals end nothing when uvicorn, which they stopped, raises them again at its end: the exit status is 0."""
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_number: int, _frame: object) -> None:
    pass


@contextlib.contextmanager
def _streams_outlive_signals() -> Iterator[None]:
    """sse-starlette would end every stream as soon as a signal comes."""
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        AppStatus.enable_automatic_graceful_drain_mode()  # type: ignore[no-untyped-call]


def _listen(settings: ServerSettings) -> socket.socket:
    """A socket bound to the settings' address, so that one that is taken is told of before a model is loaded."""
    host, port = settings.address
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise LlamaMoeError(f"cannot listen on {settings.bind}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise LlamaMoeError(f"cannot listen on {settings.bind}: {error.strerror}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
