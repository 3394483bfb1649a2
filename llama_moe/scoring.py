"""What a model thinks of a text: log-probabilities, perplexity; and the names of what embeddings can be pooled to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    import numpy as np
    import numpy.typing as npt

    Pooling: TypeAlias = Literal["mean", "last", "cls", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How likely a model finds a text.

    Attributes:
        tokens: ids of the text's tokens, n of them.
        logprobs: natural logarithms of the probabilities of the tokens but the first, each given all before it: float32 of shape [n - 1].
    """

    tokens: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]

    @property
    def total(self) -> float:
        """The text's log-probability, given its first token."""
        return float(self.logprobs.sum(dtype=float))

    @property
    def perplexity(self) -> float:
        """E to the power of the mean negative log-probability."""
        return math.exp(-self.total / len(self.logprobs))

    def __repr__(self) -> str:
        return f"<Score of {len(self.tokens)} tokens: log-probability {self.total:.3f}, perplexity {self.perplexity:.3f}>"


def perplexity(score: Callable[[list[list[int]]], list[Score]], tokens: list[int], *, window: int, stride: int | None) -> float:
    """Perplexity of a text in windows; see `Engine.perplexity()`."""
    step = window // 2 if stride is None else stride
    if not 1 <= step < window:
        raise InvalidOptionError(f"stride is {stride}; it must be from 1 to {window - 1}, which is the context less one token")
    begins = [0]
    while begins[-1] + window < len(tokens):
        begins.append(begins[-1] + step)
    scores = score([tokens[begin : begin + window] for begin in begins])
    total, counted = 0.0, 0
    known = 1  # tokens, from the text's first one on, that were counted or have no probability
    for begin, part in zip(begins, scores, strict=True):
        fresh = part.logprobs[known - begin - 1 :]
        total += float(fresh.sum(dtype=float))
        counted += len(fresh)
        known += len(fresh)
    return math.exp(-total / counted)
