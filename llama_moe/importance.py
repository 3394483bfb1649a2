"""Importance matrices: which inputs of a model's weights are large, so that a quantiser can be careful where it matters."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, _logging, _table
from ._files import written_whole
from ._options import fill
from .errors import InvalidOptionError
from .model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    from .model import StrPath

__all__ = ["ImatrixEntry", "ImatrixReport", "imatrix"]


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """What is known of the inputs of one tensor.

    Attributes:
        name: the tensor's name.
        columns: its width: how many inputs each row of it has.
        experts: how many experts' matrices it holds; None: it is not of experts.
        unused_experts: those of them that no token of the text used; their inputs count as all alike.
        rows: input vectors seen, by all experts together.
    """

    name: str
    columns: int
    experts: int | None
    unused_experts: tuple[int, ...]
    rows: int


@dataclass(frozen=True, slots=True, repr=False)
class ImatrixReport:
    """What `imatrix()` wrote; `str()` is a table.

    Attributes:
        path: the file.
        chunks: how many chunks of the text were computed.
        tokens: how many tokens those are.
        entries: one for each tensor.
    """

    path: Path
    chunks: int
    tokens: int
    entries: tuple[ImatrixEntry, ...]

    @property
    def unused_experts(self) -> int:
        """Experts' matrices of which nothing is known, over all tensors."""
        return sum(len(entry.unused_experts) for entry in self.entries)

    def __str__(self) -> str:
        experts = sum(entry.experts or 0 for entry in self.entries)
        rows = [
            ("file", str(self.path)),
            ("text", f"{self.tokens} tokens in {self.chunks} chunks"),
            ("tensors", str(len(self.entries))),
        ]
        if experts:
            rows.append(("unused", f"{self.unused_experts} of {experts} experts' matrices"))
        return _table.columns(rows)

    def __repr__(self) -> str:
        return f"<ImatrixReport {str(self.path)!r}: {len(self.entries)} tensors, {self.tokens} tokens>"


def imatrix(
    model: Model | StrPath,
    text: str | os.PathLike[str],
    out: StrPath,
    *,
    context_size: int = 512,
    chunks: int | None = None,
    output: bool = False,
    parse_special: bool = False,
    dataset: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> ImatrixReport:
    """Computes a text and writes how large the inputs of each weight matrix are: the importance matrix that `quantize()` takes.

    For every tensor of the layers, the squares of its inputs are summed by column; for experts, for each expert that a token uses. The
    file is in llama.cpp's GGUF format: its own `llama-quantize` reads it, and files of its `llama-imatrix` are read by `quantize()`.
    The text should be like what the model will be used for, and long: an expert that no token uses is quantised blindly, and a warning of
    the logger "llama_moe" says how many there are. Runs without the GIL; Ctrl-C, and an exception from `on_progress`, stop it. `out`
    appears when it is whole.

    Args:
        model: an open model, or a GGUF file, which is loaded with `Model`'s defaults. Best in F16, BF16 or Q8_0. LoRA adapters of a model
            change the inputs; the matrix is of the weights alone.
        text: the text, or as a `Path` a file in UTF-8 that has it.
        out: the file to write.
        context_size: tokens of a chunk. Each chunk is computed as a text of its own; a rest that fills none is left out. 32 or more.
        chunks: how many of them to compute; None: all.
        output: also for the output matrix.
        parse_special: read names of special tokens in the text, such as "<|im_start|>", as these tokens.
        dataset: what the file says it was computed from; None: the name of the text's file, or nothing.
        threads: CPU threads; None: one for each physical core this process may use.
        on_progress: called on this thread with the share done, 0 to 1.

    Raises:
        InvalidOptionError: the text is shorter than a chunk, or an option is outside its range.
        QuantizeError: the model computes values that are not finite.
        OSError: `text` cannot be read or `out` cannot be written.
        UnicodeDecodeError: the file of the text is not UTF-8.
        LlamaMoeError: what `Model` raises for a file.
    """
    _logging.sync_level()
    if chunks is not None and chunks < 1:
        raise InvalidOptionError(f"chunks must be 1 or more, not {chunks}")
    if threads is not None and threads < 1:
        raise InvalidOptionError(f"threads must be 1 or more, not {threads}")
    name = dataset if dataset is not None else "" if isinstance(text, str) else Path(text).name
    options = fill(
        _core.ImatrixOptions(),
        {"context_size": context_size, "chunks": chunks or 0, "output": output, "threads": threads or 0, "dataset": name},
    )
    options.validate()
    content = text if isinstance(text, str) else Path(text).read_text(encoding="utf-8")
    if not isinstance(model, Model):
        with Model(model) as loaded:
            tokens = loaded.tokenize(content, parse_special=parse_special)
            return _compute(loaded, tokens, Path(out), options, on_progress)
    return _compute(model, model.tokenize(content, parse_special=parse_special), Path(out), options, on_progress)


def _compute(
    model: Model, tokens: list[int], out: Path, options: _core.ImatrixOptions, on_progress: Callable[[float], object] | None
) -> ImatrixReport:
    with written_whole(out) as partial:
        # Tried before the work of minutes or hours, which a folder that is missing would make useless.
        partial.touch()
        computed = _core.collect_imatrix(model._native, tokens, options, on_progress)
        _core.write_imatrix(computed, os.fspath(partial))
    return ImatrixReport(
        path=out,
        chunks=computed.chunk_count,
        tokens=computed.chunk_count * computed.chunk_size,
        entries=tuple(_entry(name, computed.entry(name)) for name in computed.names),
    )


def _entry(name: str, native: _core.ImatrixEntry) -> ImatrixEntry:
    of_experts = len(native.counts) > 1
    return ImatrixEntry(
        name=name,
        columns=native.columns,
        experts=len(native.counts) if of_experts else None,
        unused_experts=tuple(index for index, count in enumerate(native.counts) if count == 0) if of_experts else (),
        rows=round(sum(native.counts)),
    )
