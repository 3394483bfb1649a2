"""Every error that llama_moe raises on purpose.

`LlamaMoeError` is the base of all of them. A model file that does not exist is Python's own `FileNotFoundError`, and an argument of the
wrong type is a `TypeError`. The native module raises these classes too: it looks them up here by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "CancelledError",
    "ClosedError",
    "ContextFullError",
    "DecodeError",
    "DoesNotFitError",
    "DownloadError",
    "InvalidOptionError",
    "LlamaMoeError",
    "ModelLoadError",
    "PlacementError",
    "QuantizeError",
    "QueueFullError",
    "RequestTimeoutError",
]


class LlamaMoeError(Exception):
    """Base class of the errors of this package."""


class ModelLoadError(LlamaMoeError):
    """The model file cannot be loaded: not GGUF, truncated, corrupted, of an unsupported architecture, or memory ran out."""


class DownloadError(ModelLoadError):
    """The model cannot be fetched: the hub cannot be reached or wants a token, or what it sent is damaged."""


class PlacementError(LlamaMoeError, ValueError):
    """The placement asks for something the model or this machine does not have."""


class DoesNotFitError(LlamaMoeError):
    """The model does not fit in the memory it may use; the message has the numbers.

    Attributes:
        shortfall: bytes missing on each device that is too small, "CPU" being host memory; empty where only a failed allocation is known.
        changes: options with which it would fit, each alone, such as "context_size=2048".
    """

    def __init__(self, message: str, *, shortfall: Mapping[str, int] | None = None, changes: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.shortfall = dict(shortfall or {})
        self.changes = tuple(changes)


class ContextFullError(LlamaMoeError):
    """The tokens do not fit in the context, or a sequence has no room left."""


class DecodeError(LlamaMoeError):
    """Computing a batch failed."""


class QuantizeError(LlamaMoeError):
    """A tensor cannot be quantised: it has values that are not finite, or a type that cannot be converted."""


class QueueFullError(LlamaMoeError):
    """Too many requests wait already; try again when some have ended."""


class ClosedError(LlamaMoeError):
    """The object was closed, or what it depends on was."""


class CancelledError(LlamaMoeError):
    """The work was cancelled before it had a result."""


class RequestTimeoutError(LlamaMoeError, TimeoutError):
    """A request did not end within its `timeout`; the message says how far it was."""


class InvalidOptionError(LlamaMoeError, ValueError):
    """An option has a value outside its allowed range; the message has both."""
