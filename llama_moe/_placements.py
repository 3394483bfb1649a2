"""Placements as words: "gpu", "first:12", "fit:8GiB"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._sizes import format_size, parse_size
from .errors import PlacementError
from .placement import ExpertPlacement, as_placement

if TYPE_CHECKING:
    from .placement import PlacementLike

EXPECTED = "'gpu', 'cpu', 'fit', 'fit:8GiB', 'first:N' or 'last:N'"


def parse_placement(choice: PlacementLike | str) -> ExpertPlacement:
    """The policy that a word stands for; a policy stands for itself.

    Raises:
        PlacementError: it is no such word.
        InvalidOptionError: the size of a "fit:SIZE" is none.
    """
    if not isinstance(choice, str):
        return as_placement(choice)
    word, _, value = choice.partition(":")
    if word in ("first", "last") and value.isascii() and value.isdigit():
        return ExpertPlacement.cpu_first(int(value)) if word == "first" else ExpertPlacement.cpu_last(int(value))
    if word == "fit" and value:
        return ExpertPlacement.fit(vram=value)
    if choice == "gpu":
        return ExpertPlacement.gpu()
    if choice == "cpu":
        return ExpertPlacement.cpu()
    if choice == "fit":
        return ExpertPlacement.fit()
    raise PlacementError(f"unknown placement {choice!r}; expected {EXPECTED}")


def placement_name(choice: PlacementLike | str) -> str:
    """The word for a placement, or how its policy is written where there is no word."""
    if isinstance(choice, str):
        return choice
    if choice == ExpertPlacement(kind=choice.kind, count=choice.count):
        words = {"gpu": "gpu", "cpu": "cpu", "fit": "fit", "cpu_first": f"first:{choice.count}", "cpu_last": f"last:{choice.count}"}
        return words.get(choice.kind, repr(choice))
    if choice.vram is not None and choice == ExpertPlacement.fit(vram=choice.vram):
        short = format_size(choice.vram).replace(" ", "")
        return f"fit:{short if parse_size(short) == choice.vram else f'{choice.vram}B'}"
    return repr(choice)
