"""Streams for asyncio: no thread waits for them, and no loop asks for them.

An engine's thread writes a file descriptor when a stream that is waited for has news. The event loop watches that descriptor, one for all
its streams, like any other, and wakes those concerned.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Generic

from . import _core
from .chat import ChatCompletion, ChatDelta, ChatReader
from .errors import LlamaMoeError, QueueFullError
from .results import Completion, Token
from .stream import AnyStream, Deadline, GenerationReader, ItemT, ResultT, failure_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import TypeAlias

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from .chat import ChatPrompt
    from .engine import Engine
    from .sampling import SamplingParams

    Request: TypeAlias = tuple[str | list[int], _core.SamplingOptions]
    # A native method that submits a request, all but its delivery given.
    Submit: TypeAlias = Callable[..., _core.Generation]

# Between two looks for a device that failed, which nothing announces.
_HEARTBEAT_SECONDS = 0.5
# An event loop's clock may be coarse: a timer that goes off too early is set again, but not in a busy loop.
_LEAST_TIMER_SECONDS = 0.001
# Between two looks for room in a queue that the requests of others fill.
_ROOM_SECONDS = 0.01


class AsyncStream(AnyStream[ResultT], AsyncIterator[ItemT], Generic[ItemT, ResultT]):
    """What a task reads, and can leave."""

    __slots__ = ()

    async def read_all(self) -> ResultT:
        """Reads to the end and returns the `completion`."""
        async for _ in self:
            pass
        return self.completion

    async def aclose(self) -> None:
        """Cancels the generation if it still runs; `completion` then has what was read so far. Waits for nothing. Idempotent."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        await self.aclose()


class AsyncTokenStream(GenerationReader, AsyncStream[Token, Completion]):
    """Iterates over the tokens of one generation as they come; made by `Engine.astream()`.

    The generation runs whether or not anybody reads. When its engine is closed, the stream ends with what came until then, and the
    `finish_reason` "cancelled". It is cancelled by `aclose()`, by leaving an `async with` block, when the task that
    waits for a token is cancelled, and when nobody refers to the stream any more, so `async for token in engine.astream(...)` may simply be
    left. One task at a time may read a stream, in the event loop in which it was made; `cancel()` may be called from any thread.
    """

    __slots__ = ("_deadline", "_hub", "_tag")

    def __init__(self, generation: _core.Generation, engine: Engine, hub: _Hub, tag: int, timeout: float | None, *, logprobs: bool) -> None:
        super().__init__(generation, engine, logprobs=logprobs)
        self._hub = hub
        self._tag = tag
        self._deadline = None if timeout is None else time.monotonic() + timeout

    async def __anext__(self) -> Token:
        """The next token; waits for it.

        Raises:
            LlamaMoeError: what `TokenStream` raises.
            RuntimeError: another task waits already, or the stream belongs to another event loop.
        """
        ready = self._ready
        while not ready or self._cancelled or self._forked:
            if self._ended:
                raise StopAsyncIteration
            await self._more()
        token = ready.popleft()
        self._tokens.append(token)
        return token

    async def aclose(self) -> None:
        """Cancels the generation if it still runs; `completion` then has the tokens read so far. Waits for nothing. Idempotent."""
        self._close()

    def _close(self) -> None:
        self.cancel()
        with contextlib.suppress(LlamaMoeError):
            while not self._ended:
                self._fetch(wait=False)
        self._hub.wake(self._tag)  # a task that waits finds that it ended
        self._hub.release(self._tag)

    async def _more(self) -> None:
        if not self._forked:  # there no loop counts as running, and _fetch() knows the better reason
            self._hub.check_reader(self._tag)
        try:
            if not self._fetch(wait=False):
                await self._hub.wait(self._tag, self._generation, self._deadline)
        except BaseException:
            self.cancel()
            self._hub.release(self._tag)
            raise
        # Not as soon as it was cancelled: its end, which another thread brings about, has to wake it.
        if self._exhausted or self._ended:
            self._hub.release(self._tag)

    def __del__(self) -> None:
        self._hub.release(self._tag)


class AsyncChatStream(ChatReader[AsyncTokenStream], AsyncStream[ChatDelta, ChatCompletion]):
    """Iterates over what an answer gains; made by `Engine.astream_chat()`. Cancelled as an `AsyncTokenStream` is."""

    __slots__ = ()

    async def __anext__(self) -> ChatDelta:
        """What the answer gained next; waits for it.

        Raises:
            LlamaMoeError: what `AsyncTokenStream` raises.
        """
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._push(await anext(self._tokens))
            except StopAsyncIteration:
                self._finish(self._tokens.completion)
            except LlamaMoeError as error:
                self._failure = failure_text(error)
                raise
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Cancels the generation if it still runs; `completion` then has what was read so far. Waits for nothing. Idempotent."""
        await self._tokens.aclose()
        with contextlib.suppress(LlamaMoeError):
            async for _ in self:
                pass


def _start_one(engine: Engine, submit: Submit, timeout: float | None, *, logprobs: bool = False) -> AsyncTokenStream:
    hub = _hub_of(asyncio.get_running_loop())
    tag = hub.open()
    try:
        generation = submit(timeout=timeout, notifier=hub.notifier, tag=tag)
    except BaseException:
        hub.release(tag)
        raise
    return AsyncTokenStream(generation, engine, hub, tag, timeout, logprobs=logprobs)


def _start_request(engine: Engine, request: Request, timeout: float | None) -> AsyncTokenStream:
    prompt, sampling = request
    return _start_one(engine, partial(engine._native.submit, prompt, sampling), timeout, logprobs=sampling.logprobs is not None)


def start(engine: Engine, requests: Sequence[Request], timeout: object) -> list[AsyncTokenStream]:
    """Submits requests whose streams belong to the running event loop.

    Raises:
        RuntimeError: no event loop runs in this thread.
    """
    deadline = Deadline(timeout)
    streams: list[AsyncTokenStream] = []
    try:
        for request in requests:
            streams.append(_start_request(engine, request, deadline.left()))  # noqa: PERF401 - those before a failure are closed
    except BaseException:
        for stream in streams:
            stream._close()
        raise
    return streams


def start_chat(engine: Engine, prompt: ChatPrompt, *, timeout: object = None) -> AsyncChatStream:
    """Submits a conversation whose prompt was made before; the stream belongs to the running event loop.

    Raises:
        RuntimeError: no event loop runs in this thread.
    """
    (tokens,) = start(engine, [(prompt.text, prompt._options())], timeout)
    return AsyncChatStream(tokens, prompt.parser())


async def open_stream(engine: Engine, request: Request, timeout: float | None) -> AsyncTokenStream:
    """Does what `start` does with one request, on another thread: compiling a large grammar takes seconds.

    Raises:
        RuntimeError: no event loop runs in this thread.
    """
    loop = asyncio.get_running_loop()
    hub = _hub_of(loop)
    tag = hub.open()
    prompt, sampling = request
    submit = partial(engine._native.submit, prompt, sampling, timeout=timeout, notifier=hub.notifier, tag=tag)
    submitting = loop.run_in_executor(None, submit)
    try:
        generation = await asyncio.shield(submitting)
    except BaseException:
        if submitting.done():
            _forget(hub, tag, submitting)
        else:
            submitting.add_done_callback(partial(_forget, hub, tag))
        raise
    return AsyncTokenStream(generation, engine, hub, tag, timeout, logprobs=sampling.logprobs is not None)


def _forget(hub: _Hub, tag: int, submitting: asyncio.Future[_core.Generation]) -> None:
    """Ends what was submitted when nobody waited for it any more."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
    hub.release(tag)


async def open_chat(
    engine: Engine, prompt: ChatPrompt, ids: list[int], *, params: SamplingParams, timeout: float | None
) -> AsyncChatStream:
    """Does what `start_chat` does, on another thread.

    Args:
        engine: what answers.
        prompt: of the engine's model.
        ids: its tokens.
        params: in place of those that the prompt was made with, from which they may differ in nothing but chance.
        timeout: as for `Engine.chat`.
    """
    tokens = await open_stream(engine, (ids, prompt._options(params)), timeout)
    return AsyncChatStream(tokens, prompt.parser())


async def generate(engine: Engine, requests: Sequence[Request], timeout: object) -> list[Completion]:
    """The completions of requests; when the queue is full, all but the first wait for room in it."""
    streams = await _read_all([partial(_start_request, engine, request) for request in requests], timeout)
    return [stream.completion for stream in streams]


async def values(engine: Engine, submits: Sequence[Submit], timeout: object) -> list[npt.NDArray[np.float32]]:
    """What requests that generate nothing compute; when the queue is full, all but the first wait for room in it."""
    streams = await _read_all([partial(_start_one, engine, submit) for submit in submits], timeout)
    return [stream._generation.take_values() for stream in streams]


async def _read_all(starts: Sequence[Callable[[float | None], AsyncTokenStream]], timeout: object) -> list[AsyncTokenStream]:
    """Starts streams, the later ones when there is room for them, and reads all to their ends."""
    deadline = Deadline(timeout)
    streams: list[AsyncTokenStream] = []
    ended = 0
    try:
        for start_one in starts:
            await asyncio.sleep(0)  # nothing in here has to wait for anything, and other tasks want to run
            while True:
                try:
                    streams.append(start_one(deadline.left()))
                    break
                except QueueFullError:
                    if not streams:
                        raise
                if ended < len(streams):
                    await streams[ended].read_all()
                    ended += 1
                else:  # the requests of others fill the queue, and nothing tells when one of them ends
                    await asyncio.sleep(_ROOM_SECONDS)
        for stream in streams[ended:]:
            await asyncio.sleep(0)
            await stream.read_all()
    except BaseException:
        for stream in streams:
            stream._close()
        raise
    return streams


class _Hub:
    """Wakes the streams of one event loop. There from its first open stream to the end of its last one.

    Nothing but its loop and its streams refers to it, so that a loop that is closed and forgotten with streams still open takes them along.
    All is done on the loop's thread, but for `release()`.
    """

    __slots__ = ("__weakref__", "_closed", "_heartbeat", "_loop", "_open", "_process", "_tags", "_waiting", "notifier")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.notifier = _core.Notifier()
        self._loop = weakref.ref(loop)
        self._process = os.getpid()
        self._tags = itertools.count()
        self._open: set[int] = set()
        self._waiting: dict[int, tuple[asyncio.Future[None], _core.Generation]] = {}
        self._closed = False
        loop.add_reader(self.notifier.fileno(), self._on_ready)
        self._heartbeat = loop.call_later(_HEARTBEAT_SECONDS, self._on_heartbeat)

    def open(self) -> int:
        """A tag for a new stream."""
        tag = next(self._tags)
        self._open.add(tag)
        return tag

    def release(self, tag: int) -> None:
        """The stream needs no waking any more. Any thread may call this, and more than once."""
        self._open.discard(tag)
        # A forked child shares the parent's selector: nothing may be taken out of it there.
        if self._open or self._closed or os.getpid() != self._process:
            return
        loop = self._loop()
        if loop is None or loop.is_closed() or asyncio._get_running_loop() is loop:
            self._close_if_idle()
            return
        with contextlib.suppress(RuntimeError):  # closed in this moment: its end is the hub's end
            loop.call_soon_threadsafe(self._close_if_idle)

    def check_reader(self, tag: int) -> None:
        """Refuses a task that could not be woken."""
        if asyncio.get_running_loop() is not self._loop():
            raise RuntimeError("this stream belongs to another event loop: the one in which it was made")
        if tag in self._waiting:
            raise RuntimeError("another task already waits for this stream's next token")

    async def wait(self, tag: int, generation: _core.Generation, deadline: float | None) -> None:
        """Returns when there may be news; `deadline` is of `time.monotonic()`."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting[tag] = (future, generation)
        timer = None
        if deadline is not None:
            timer = loop.call_later(max(deadline - time.monotonic(), _LEAST_TIMER_SECONDS), self.wake, tag)
        try:
            await future
        finally:
            del self._waiting[tag]
            if timer is not None:
                timer.cancel()

    def wake(self, tag: int) -> None:
        """Lets the task that waits for a stream look again, if there is one."""
        waiting = self._waiting.get(tag)
        if waiting is not None and not waiting[0].done():
            waiting[0].set_result(None)

    def _on_ready(self) -> None:
        for tag in self.notifier.take():
            self.wake(tag)

    def _on_heartbeat(self) -> None:
        for _, generation in list(self._waiting.values()):
            generation.check_lost()  # what is lost ends, and that is news
        loop = self._loop()
        if loop is not None:
            self._heartbeat = loop.call_later(_HEARTBEAT_SECONDS, self._on_heartbeat)

    def _close_if_idle(self) -> None:
        if self._open or self._closed:
            return
        self._closed = True
        loop = self._loop()
        if loop is not None:
            if not loop.is_closed():
                loop.remove_reader(self.notifier.fileno())
                self._heartbeat.cancel()
            _hubs.pop(loop, None)
        self.notifier.close()


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[_Hub]] = weakref.WeakKeyDictionary()


def _hub_of(loop: asyncio.AbstractEventLoop) -> _Hub:
    reference = _hubs.get(loop)
    hub = None if reference is None else reference()
    if hub is None:
        hub = _Hub(loop)
        _hubs[loop] = weakref.ref(hub)
    return hub
