"""Counts the requests of an application, by endpoint, model and status."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .figures import ServerMetrics

# A list, since what a task sets in its own context is not seen by the one that began it.
_model_of_request: ContextVar[list[str] | None] = ContextVar("_model_of_request", default=None)


def note_model(name: str) -> None:
    """The request that is being answered is one for this model, which is there."""
    found = _model_of_request.get()
    if found is not None:
        found[:] = [name]


class RequestMeter:
    """Measures each request to the end of its answer; an ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # of an application that fails before it answers

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begin = time.perf_counter()
        model: list[str] = []
        token = _model_of_request.set(model)
        try:
            with self._metrics.answering():
                await self._app(scope, receive, watched_send)
        finally:
            _model_of_request.reset(token)
            self._metrics.on_request(_endpoint(scope), "".join(model), status, time.perf_counter() - begin)


def _endpoint(scope: Scope) -> str:
    """The path as its route has it: what clients make up must not become a label."""
    return getattr(scope.get("route"), "path", "") or "other"
