"""LoRA adapters: small matrices that are loaded beside a model's weights and change what it computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _core

if TYPE_CHECKING:
    from typing import TypeAlias

    StrPath: TypeAlias = str | os.PathLike[str]
    LoraLike: TypeAlias = "Sequence[LoraAdapter | StrPath] | LoraAdapter | StrPath"


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA adapter to load with a model, as llama.cpp's convert_lora_to_gguf.py writes them.

    The product of its two matrices for a weight, times its own alpha / rank and `scale`, counts as if it were added to the weight.

    Attributes:
        path: a GGUF file.
        scale: how much of it is added; 0 leaves it out, and it takes no memory then.
    """

    path: StrPath
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise TypeError(f"the path of a LoraAdapter must be a path, not {self.path!r}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise TypeError(f"the scale of a LoraAdapter must be a number, not {self.scale!r}")

    def _to_native(self) -> _core.LoraOptions:
        return _core.LoraOptions(os.fspath(self.path), float(self.scale))


def as_adapters(lora: LoraLike) -> tuple[LoraAdapter, ...]:
    """The adapters that an argument stands for.

    Raises:
        TypeError: one is neither a `LoraAdapter` nor a path.
    """
    given = [lora] if isinstance(lora, LoraAdapter | str | os.PathLike) else lora
    if not isinstance(given, Sequence):
        raise TypeError(f"lora must be LoRA adapters, as LoraAdapter objects or paths, not {lora!r}")
    return tuple(each if isinstance(each, LoraAdapter) else LoraAdapter(each) for each in given)
