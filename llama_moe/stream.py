"""Tokens of a running generation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import LlamaMoeError
from .results import Completion, Token, make_completion

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from . import _core
    from .engine import Engine


class TokenStream(Iterator[Token]):
    """Iterates over the tokens of one generation as they come; made by `Engine.stream()`.

    The generation runs whether or not anybody reads. It is cancelled by `close()`, by leaving a `with` block, and when nobody refers to the
    stream any more, so `for token in engine.stream(...)` may simply be left. An exception that interrupts the wait for a token, such as
    KeyboardInterrupt, cancels it too. One thread at a time may read a stream; any may cancel it.
    """

    __slots__ = ("__weakref__", "_cancelled", "_completion", "_engine", "_failure", "_generation", "_tokens")

    def __init__(self, generation: _core.Generation, engine: Engine | None = None) -> None:
        self._generation = generation
        self._engine = engine  # an engine that nobody else refers to lives as long as its streams
        self._tokens: list[Token] = []
        self._cancelled = False
        self._completion: Completion | None = None
        self._failure: str | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        """The next token; waits for it.

        Raises:
            DecodeError: the generation failed.
        """
        if self._ended:
            raise StopIteration
        try:
            item = self._generation.next()
            if item is None:
                self._completion = self._complete()
        except LlamaMoeError as error:
            # Not the exception itself: its traceback refers to this frame, and a cycle would keep the engine alive.
            self._failure = f"{type(error).__name__}: {error}"
            raise
        except BaseException:
            self.cancel()
            raise
        if item is None:
            raise StopIteration
        token_id, text, logprob, top = item
        token = Token(token_id, text, logprob, None if top is None else tuple(Token(*entry) for entry in top))
        self._tokens.append(token)
        return token

    @property
    def completion(self) -> Completion:
        """The whole generation, once it has ended.

        Raises:
            LlamaMoeError: it has not ended yet, or it failed.
        """
        if self._completion is not None:
            return self._completion
        if self._failure is not None:
            raise LlamaMoeError(f"there is no completion, the generation failed: {self._failure}")
        raise LlamaMoeError("there is no completion yet: read the stream to its end, or close() it, first")

    def cancel(self) -> None:
        """Ends the generation without waiting for it; the stream then ends too. Any thread may call this; nothing happens after the end."""
        if not self._ended:
            self._cancelled = True
            self._generation.cancel()

    def close(self) -> None:
        """Cancels the generation if it still runs; `completion` then has the tokens read so far. Idempotent."""
        self.cancel()
        with contextlib.suppress(LlamaMoeError):
            for _ in self:
                pass

    def read_all(self) -> Completion:
        """Reads to the end and returns the completion."""
        for _ in self:
            pass
        return self.completion

    def _complete(self) -> Completion:
        result = self._generation.result()
        # A generation may end by itself just before it is cancelled, with tokens that nobody read.
        return make_completion(self._tokens, result, cancelled=self._cancelled)

    @property
    def _ended(self) -> bool:
        return self._completion is not None or self._failure is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "running" if not self._ended else self._completion.finish_reason if self._completion else "failed"
        return f"<TokenStream {state}, {len(self._tokens)} tokens read>"
