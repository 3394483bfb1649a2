"""Tokens of a running generation."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from . import _core
from .errors import LlamaMoeError, RequestTimeoutError
from .results import Completion, Token, make_completion

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import TypeAlias

    from typing_extensions import Self

    from .chat import ChatCompletion

    TokenEntry: TypeAlias = tuple[int, str, float | None, list[tuple[int, str, float]] | None]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT", bound="Completion | ChatCompletion")

# What Token(*entry) does, in a third of the time.
_plain_token: Callable[[TokenEntry], Token] = partial(tuple.__new__, Token)


def seconds(timeout: object) -> float | None:
    """A timeout as a native request takes it.

    Raises:
        TypeError: it is no number.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"timeout cannot be {timeout!r} ({type(timeout).__name__}); it must be a number of seconds")
    return float(timeout)


class Deadline:
    """The time that the requests of one call have together, from now on."""

    __slots__ = ("_begin", "_seconds")

    def __init__(self, timeout: object) -> None:
        self._seconds = seconds(timeout)
        self._begin = time.monotonic()

    def left(self) -> float | None:
        """What is left of it for a request that is submitted now.

        Raises:
            RequestTimeoutError: nothing.
        """
        if self._seconds is None:
            return None
        # In whole milliseconds, so that what is submitted at once has the timeout that the caller gave, also in messages.
        left = self._seconds - math.floor(1e3 * (time.monotonic() - self._begin)) / 1e3
        if left <= 0 < self._seconds:
            raise RequestTimeoutError(f"a request did not end within the timeout of {self._seconds:g} s; it was not submitted yet")
        return left


def _token(entry: TokenEntry) -> Token:
    token_id, text, logprob, top = entry
    return Token(token_id, text, logprob, None if top is None else tuple(Token(*each) for each in top))


def failure_text(error: LlamaMoeError) -> str:
    """What a stream keeps of its failure: not the exception, whose traceback refers to the stream, and so to the engine."""
    return f"{type(error).__name__}: {error}"


class AnyStream(Generic[ResultT]):
    """What all streams have: how the generation ended."""

    __slots__ = ("__weakref__", "_completion", "_failure")

    def __init__(self) -> None:
        self._completion: ResultT | None = None
        self._failure: str | None = None

    @property
    def completion(self) -> ResultT:
        """The whole generation, once it has ended: a `Completion`; of a chat a `ChatCompletion`.

        Raises:
            LlamaMoeError: it has not ended yet, or it failed.
        """
        if self._completion is not None:
            return self._completion
        if self._failure is not None:
            raise LlamaMoeError(f"there is no completion, the generation failed: {self._failure}")
        raise LlamaMoeError("there is no completion yet: read the stream to its end, or close it, first")

    def cancel(self) -> None:
        """Ends the generation without waiting for it; the stream then ends too. Any thread may call this; nothing happens after the end."""
        raise NotImplementedError

    @property
    def _ended(self) -> bool:
        return self._completion is not None or self._failure is not None

    @property
    def _state(self) -> str:
        return "failed" if self._failure is not None else "running" if self._completion is None else self._completion.finish_reason

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state}>"


class SyncStream(AnyStream[ResultT], Iterator[ItemT], Generic[ItemT, ResultT]):
    """What a thread reads, and can leave."""

    __slots__ = ()

    def read_all(self) -> ResultT:
        """Reads to the end and returns the `completion`."""
        for _ in self:
            pass
        return self.completion

    def close(self) -> None:
        """Cancels the generation if it still runs; `completion` then has what was read so far. Idempotent."""
        self.cancel()
        with contextlib.suppress(LlamaMoeError):
            for _ in self:
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class GenerationReader(AnyStream[Completion]):
    """What streams of tokens are made of: the tokens that were read, and those that came since."""

    __slots__ = (
        "_cancelled",
        "_engine",
        "_exhausted",
        "_generation",
        "_logprobs",
        "_ready",
        "_tokens",
    )

    # In a forked child, tokens that came before the fork are not given out either: the stream belongs to the parent.
    _forked: ClassVar[bool] = False

    def __init__(self, generation: _core.Generation, engine: object = None, *, logprobs: bool = False) -> None:
        super().__init__()
        self._generation = generation
        self._logprobs = logprobs
        self._engine = engine  # an engine that nobody else refers to lives as long as its streams
        self._tokens: list[Token] = []
        self._ready: deque[Token] = deque()
        self._exhausted = False
        self._cancelled = False

    @property
    def tokens(self) -> Sequence[Token]:
        """The tokens read so far; it grows while the stream is read."""
        return self._tokens

    @property
    def logprobs(self) -> bool:
        """Whether the tokens have log-probabilities."""
        return self._logprobs

    def cancel(self) -> None:
        """Ends the generation without waiting for it; the stream then ends too. Any thread may call this; nothing happens after the end."""
        if not self._ended:
            self._cancelled = True
            self._generation.cancel()

    def _fetch(self, *, wait: bool) -> bool:
        """Takes what came since the last call, or the end. False: there was nothing, which is only so without `wait`."""
        try:
            if self._exhausted:  # and all of it was read, or will not be
                self._complete()
                return True
            entries: list[TokenEntry]
            entries, self._exhausted = self._generation.take(wait)
            if entries and not self._cancelled:
                self._ready.extend(map(_plain_token if entries[0][3] is None else _token, entries))
            elif self._exhausted:
                self._complete()
        except LlamaMoeError as error:
            self._failure = failure_text(error)
            raise
        except BaseException:
            self.cancel()
            raise
        return bool(entries) or self._exhausted

    def _complete(self) -> None:
        # A generation may end by itself just before it is cancelled, with tokens that nobody read.
        self._completion = make_completion(self._tokens, self._generation.result(), cancelled=self._cancelled, logprobs=self._logprobs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._state}, {len(self._tokens)} tokens read>"


class TokenStream(GenerationReader, SyncStream[Token, Completion]):
    """Iterates over the tokens of one generation as they come; made by `Engine.stream()`.

    The generation runs whether or not anybody reads. When its engine is closed, the stream ends with what came until then, and the
    `finish_reason` "cancelled". It is cancelled by `close()`, by leaving a `with` block, and when nobody refers to the
    stream any more, so `for token in engine.stream(...)` may simply be left. An exception that interrupts the wait for a token, such as
    KeyboardInterrupt, cancels it too. One thread at a time may read a stream; any may cancel it.
    """

    __slots__ = ()

    def __next__(self) -> Token:
        """The next token; waits for it.

        Raises:
            DecodeError: the generation failed.
            ContextFullError: the KV cache has no room for its next batch.
            RequestTimeoutError: the generation's timeout passed.
            ClosedError: this process was forked from the one that the stream belongs to.
        """
        ready = self._ready
        while not ready or self._cancelled or self._forked:
            if self._ended:
                raise StopIteration
            self._fetch(wait=True)
        token = ready.popleft()
        self._tokens.append(token)
        return token


def _after_fork() -> None:
    GenerationReader._forked = _core.forked()


os.register_at_fork(after_in_child=_after_fork)
