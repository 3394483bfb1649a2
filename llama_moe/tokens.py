"""Prompts and token ids in the forms a caller may have them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    TokenIds: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

# Users annotate with it, so it is there at run time too, where numpy is imported late and a name in quotes has no `|`.
Prompt: TypeAlias = Union[str, Sequence[int], "npt.NDArray[np.integer[Any]]"]


def token_ids(ids: TokenIds) -> list[int]:
    """The ids as a list of int.

    Raises:
        TypeError: not a sequence of integers.
    """
    if isinstance(ids, str | bytes):
        raise TypeError(f"token ids must be a sequence of int, not {ids!r}")
    try:
        return [operator.index(item) for item in ids]
    except TypeError:
        raise TypeError(f"token ids must be a sequence of int, not {ids!r}") from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[str | list[int]], bool]:
    """The prompts in the form that the native module takes, and whether there was one prompt, not a sequence of them.

    A sequence of integers is one prompt; an empty sequence is no prompt.

    Raises:
        TypeError: neither text nor token ids, nor a sequence of such.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, bytes) or not (isinstance(prompts, Sequence) or hasattr(prompts, "__array__")):
        raise TypeError(f"a prompt must be a str or token ids, and prompts a sequence of such, not {prompts!r}")
    if len(prompts) > 0 and _is_integer(prompts[0]):
        return [token_ids(prompts)], True  # type: ignore[arg-type]
    return [prompt if isinstance(prompt, str) else token_ids(prompt) for prompt in prompts], False  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False  # a numpy array has an __index__ too, but not for more than one number
    return True
