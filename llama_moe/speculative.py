"""Speculative decoding: tokens are drafted cheaply and verified together by the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InvalidOptionError

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """How an engine drafts; made by `lookup()` or `draft()`.

    What is generated is what would be without it: drafted tokens count only where the model chooses the same ones. It is quicker when
    verifying several tokens costs little more than computing one, and slower when few drafts are accepted; `Engine.stats()` tells how many.

    Attributes:
        draft_tokens: most tokens drafted at once.
        ngram_size: tokens that are looked up in the text so far; None: a draft model drafts.
        draft_model: the model that drafts; None: lookup.
        min_probability: a draft ends before a token that the draft model finds less likely, 0 to 1.
    """

    draft_tokens: int
    ngram_size: int | None = None
    draft_model: Model | None = None
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        if (self.ngram_size is None) == (self.draft_model is None):
            raise InvalidOptionError("speculative decoding drafts by lookup or with a draft model: give ngram_size or draft_model")
        if not 1 <= self.draft_tokens <= 64:
            raise InvalidOptionError(f"draft_tokens is {self.draft_tokens}; it must be from 1 to 64")
        if self.ngram_size is not None and not 1 <= self.ngram_size <= self.draft_tokens:
            raise InvalidOptionError(f"ngram_size is {self.ngram_size}; it must be from 1 to draft_tokens ({self.draft_tokens})")

    @classmethod
    def lookup(cls, *, ngram_size: int = 3, draft_tokens: int = 8) -> Speculative:
        """Drafts what followed the last time that the newest `ngram_size` tokens occurred, in the prompt or in what was generated.

        Costs nothing to draft; good where the answer repeats parts of the prompt, as in editing, quoting and code.
        """
        return cls(draft_tokens=draft_tokens, ngram_size=ngram_size)

    @classmethod
    def draft(cls, model: Model, *, draft_tokens: int = 4, min_probability: float = 0.5) -> Speculative:
        """Drafts with a smaller model of the same vocabulary, which must stay open as long as the engine."""
        return cls(draft_tokens=draft_tokens, draft_model=model, min_probability=min_probability)


def speculation_options(speculative: Speculative | None) -> dict[str, int | float]:
    """The native options."""
    if speculative is None:
        return {}
    return {
        "draft_tokens": speculative.draft_tokens,
        "draft_ngram": speculative.ngram_size or 0,
        "draft_min_probability": speculative.min_probability,
    }
