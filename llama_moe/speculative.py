"""Speculative decoding: tokens are drafted cheaply and verified together by the model."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from ._options import native_model
from .errors import InvalidOptionError

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """How an engine drafts; made by `lookup()` or `draft()`.

    Drafted tokens count only where the model chooses the same ones, so what is generated is what would be without it, up to rounding: the
    model computes several tokens in one batch, where kernels may round otherwise than with one. Where they compute the same whatever the
    batch, it is the same token for token. It is quicker when verifying several tokens costs little more than computing one, and slower when
    few drafts are accepted; `Engine.stats()` tells how many.

    Attributes:
        draft_tokens: most tokens drafted at once, 1 to 64.
        ngram_size: tokens that are looked up in the text so far, 1 to `draft_tokens`; None: a draft model drafts.
        draft_model: the model that drafts; None: lookup.
        min_probability: a draft ends before a token that the draft model finds less likely, 0 to 1; of draft models only.

    Raises:
        InvalidOptionError: a value is outside its range, or both or neither of `ngram_size` and `draft_model` are given.
        TypeError: a value has the wrong type.
    """

    draft_tokens: int
    ngram_size: int | None = None
    draft_model: Model | None = None
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        if (self.ngram_size is None) == (self.draft_model is None):
            raise InvalidOptionError("speculative decoding drafts by lookup or with a draft model: give ngram_size or draft_model")
        _check_count("draft_tokens", self.draft_tokens, 64, "64")
        if self.ngram_size is not None:
            _check_count("ngram_size", self.ngram_size, self.draft_tokens, f"draft_tokens ({self.draft_tokens})")
        if self.draft_model is not None:
            native_model("draft_model", self.draft_model)
        _check_probability("min_probability", self.min_probability)

    @classmethod
    def lookup(cls, *, ngram_size: int = 3, draft_tokens: int = 8) -> Speculative:
        """Drafts what followed the last time that the newest `ngram_size` tokens occurred, in the prompt or in what was generated.

        Costs nothing to draft; good where the answer repeats parts of the prompt, as in editing, quoting and code.

        Args:
            ngram_size: 1 to `draft_tokens`.
            draft_tokens: most tokens drafted at once, 1 to 64.
        """
        return cls(draft_tokens=draft_tokens, ngram_size=ngram_size)

    @classmethod
    def draft(cls, model: Model, *, draft_tokens: int = 4, min_probability: float = 0.5) -> Speculative:
        """Drafts with a smaller model of the same vocabulary. Closing that model closes the engines that draft with it.

        Args:
            model: an open model.
            draft_tokens: most tokens drafted at once, 1 to 64.
            min_probability: a draft ends before a token that the draft model finds less likely, 0 to 1.
        """
        return cls(draft_tokens=draft_tokens, draft_model=model, min_probability=min_probability)


def _check_count(name: str, value: object, limit: int, limit_text: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if not 1 <= value <= limit:
        raise InvalidOptionError(f"{name} is {value}; it must be from 1 to {limit_text}")


def _check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= float(value) <= 1:
        raise InvalidOptionError(f"{name} is {value}; it must be from 0 to 1")


def speculation_options(speculative: Speculative | None) -> dict[str, int | float]:
    """The native options.

    Raises:
        TypeError: it is none.
    """
    if speculative is None:
        return {}
    if not isinstance(speculative, Speculative):
        raise TypeError(f"speculative must be a llama_moe.Speculative, such as Speculative.lookup(), not {speculative!r}")
    return {
        "draft_tokens": speculative.draft_tokens,
        "draft_ngram": speculative.ngram_size or 0,
        "draft_min_probability": float(speculative.min_probability),
    }
