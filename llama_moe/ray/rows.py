"""The rows of one batch, generated together."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from llama_moe.errors import CancelledError, ContextFullError, InvalidOptionError, QueueFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llama_moe.chat import ChatCompletion, ChatStream
    from llama_moe.results import Completion
    from llama_moe.stream import TokenStream

    Answer: TypeAlias = Completion | ChatCompletion
    Stream: TypeAlias = TokenStream | ChatStream

# What can be wrong with one row; everything else is of the engine, and ends the batch.
_ROW_ERRORS = (ContextFullError, InvalidOptionError, TypeError)


class Rows:
    """Answers to the rows of a batch, in their order.

    Args:
        prompts: of each row.
        start: begins to generate for the row of a number.
        keep_errors: remember what is wrong with a row, in place of raising it.

    Attributes:
        answers: of each row; None where something is wrong with it.
        errors: what that is; None elsewhere.
    """

    def __init__(self, prompts: Sequence[Any], start: Callable[[int], Stream], *, keep_errors: bool) -> None:
        self._prompts = prompts
        self._start = start
        self._keep_errors = keep_errors
        self._running: deque[tuple[int, Stream]] = deque()
        self.answers: list[Answer | None] = [None] * len(prompts)
        self.errors: list[str | None] = [None] * len(prompts)

    def generate(self) -> None:
        """Generates for all of them; what interrupts it cancels all.

        Raises:
            CancelledError: the engine was closed meanwhile.
            The errors of a row, unless they are kept, and those of the engine.
        """
        try:
            for row in range(len(self._prompts)):
                self._submit(row)
            while self._running:
                self._finish_oldest()
        except BaseException:
            for _, stream in self._running:
                stream.cancel()
            raise

    def _submit(self, row: int) -> None:
        while True:
            try:
                self._running.append((row, self._start(row)))
            except QueueFullError:
                if not self._running:
                    raise
                self._finish_oldest()  # which makes room
                continue
            except _ROW_ERRORS as error:
                self._refuse(row, error)
            return

    def _finish_oldest(self) -> None:
        row, stream = self._running.popleft()
        try:
            answer = stream.read_all()
        except _ROW_ERRORS as error:
            self._refuse(row, error)
            return
        if answer.finish_reason == "cancelled":
            raise CancelledError("the engine was closed while it generated for a batch")
        self.answers[row] = answer

    def _refuse(self, row: int, error: Exception) -> None:
        if not self._keep_errors:
            raise type(error)(f"row {row} of a batch, {_beginning(self._prompts[row])}: {error}") from error
        self.errors[row] = f"{type(error).__name__}: {error}"


def _beginning(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
