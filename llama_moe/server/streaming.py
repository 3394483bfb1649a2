"""Answers that are sent as they come, as server-sent events, and what a client that goes away means."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError

from .errors import ApiError, as_api_error, error_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence

    from fastapi import Request
    from pydantic import BaseModel
    from starlette.types import Receive, Scope, Send

    from .state import ServerState

logger = logging.getLogger("llama_moe.server")

# A client that takes nothing for so long holds a model for nothing.
_SEND_SECONDS = 60.0

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

DONE = ServerSentEvent("[DONE]", sep="\n")
"""The last event of a stream of OpenAI's."""


class StreamResponse(EventSourceResponse):
    """Server-sent events, with what has to be held until their end.

    A client that goes away cancels the iterator, wherever it waits; the streams of an engine are cancelled with it.

    Args:
        events: what to send. An error becomes an event of its own, in the shape of the API that the request's path belongs to, and is the
            last one.
        request: what is answered.
        state: of the application.
        held: closed when the response has ended, in whatever way.
    """

    def __init__(self, events: AsyncIterator[ServerSentEvent], *, request: Request, state: ServerState, held: AsyncExitStack) -> None:
        # A server that stops ends the streams itself, by closing their models; until then they may go on.
        self._failure: Exception | None = None
        super().__init__(
            self._with_errors(events, request.url.path),
            shutdown_grace_period=state.settings.grace_seconds,
            send_timeout=_SEND_SECONDS,
            sep="\n",
        )
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.info("a client took nothing of its stream for %g s, which was ended", _SEND_SECONDS)
        finally:
            await self._release()

    async def _release(self) -> None:
        failure = self._failure
        if failure is None:
            await self._held.aclose()
            return
        # As if it had been raised where these were opened: a model's pool wants to know what became of it.
        with contextlib.suppress(Exception):
            await self._held.__aexit__(type(failure), failure, failure.__traceback__)

    async def _with_errors(self, events: AsyncIterator[ServerSentEvent], path: str) -> AsyncGenerator[ServerSentEvent, None]:
        try:
            async for event in events:
                yield event
        except Exception as error:  # noqa: BLE001 - the response has begun: nobody else can tell the client
            self._failure = error
            yield error_event(path, as_api_error(error))


def json_event(data: BaseModel | dict[str, Any], *, event: str | None = None) -> ServerSentEvent:
    """An event whose data is JSON; of a pydantic model, the fields that were set."""
    if isinstance(data, dict):
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    else:
        text = data.model_dump_json(exclude_unset=True)
    return ServerSentEvent(text, event=event, sep="\n")


def error_event(path: str, error: ApiError) -> ServerSentEvent:
    """The error as an event: OpenAI's clients raise on data with an "error", Anthropic's on the event's name."""
    body = error_body(path, error)
    return json_event(body, event="error" if body.get("type") == "error" else None)


async def read_to_end(events: AsyncIterator[object]) -> None:
    """Lets all of it happen where nobody waits for the events themselves."""
    async for _ in events:
        pass


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """What several iterators give, as it comes, with the number of each. The first failure of one ends all."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                ready.put_nowait((index, item))
        except Exception as error:  # noqa: BLE001 - it is raised where it is read
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    tasks = [asyncio.create_task(read(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            entry = await ready.get()
            if isinstance(entry, BaseException):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield entry
    finally:
        await _end(tasks)


class Readable(Protocol[T_co]):
    """A stream of an engine's."""

    async def read_all(self) -> T_co:
        """Reads it to its end."""
        ...


async def read_all(streams: Sequence[Readable[T]]) -> list[T]:
    """What all streams end with; when one fails, the others are no longer read."""
    tasks = [asyncio.ensure_future(stream.read_all()) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled when the client goes away first.

    Raises:
        ClientGoneError: it did. Nobody sees the response.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _end([working, watching])


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ClientGoneError(ApiError):
    """The client closed the connection before its answer was there."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_gone")
