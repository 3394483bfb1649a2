"""Quantising a model file: smaller number formats, chosen for each role of the weights."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import _core, _logging, _table
from ._files import written_whole
from ._options import fill
from ._sizes import format_size
from .errors import InvalidOptionError
from .placement import ROLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .model import StrPath
    from .placement import TensorRole

__all__ = ["QuantizeReport", "QuantizedTensor", "quantization_types", "quantize", "tensor_types"]


def quantization_types() -> tuple[str, ...]:
    """The mixes that `quantize()` knows, from large to small: "F32", ..., "Q4_K_M", ..., "Q1_0"."""
    return tuple(_core.mix_names())


def tensor_types() -> tuple[str, ...]:
    """The number formats that a single tensor can be given, from large to small: "F32", ..., "Q4_K", ..., "Q1_0"."""
    return tuple(_core.tensor_type_names())


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One tensor, before and after.

    Attributes:
        name: its name.
        shape: its dimensions as GGUF has them, the fastest-changing first.
        role: "experts", "weights", "embedding" or "output".
        type_before: ggml's name of its number format in the source, such as "F16".
        type_after: the same in the new file.
        bytes_before: its size in the source.
        bytes_after: its size in the new file.
        wanted_type: what the mix or an option asked for, where the rows are no multiple of that format's blocks and llama.cpp takes the
            format in `type_after` instead; None: `type_after` is what was asked for.
        needs_imatrix: `type_after` is one that cannot be made without an importance matrix.
    """

    name: str
    shape: tuple[int, ...]
    role: TensorRole
    type_before: str
    type_after: str
    bytes_before: int
    bytes_after: int
    wanted_type: str | None
    needs_imatrix: bool


@dataclass(frozen=True, slots=True, repr=False)
class QuantizeReport:
    """What `quantize()` did, or with `dry_run` would do; `str()` is a table by role.

    Attributes:
        tensors: every tensor, in the order of the new file.
        file_bytes: the size of the new file.
    """

    tensors: tuple[QuantizedTensor, ...]
    file_bytes: int

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(tensor.bytes_before for tensor in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors in the new file."""
        return sum(tensor.bytes_after for tensor in self.tensors)

    @property
    def needs_imatrix(self) -> bool:
        """The new file cannot be made without an importance matrix."""
        return any(tensor.needs_imatrix for tensor in self.tensors)

    @property
    def fallbacks(self) -> tuple[QuantizedTensor, ...]:
        """The tensors that get another format than was asked for, because of their width."""
        return tuple(tensor for tensor in self.tensors if tensor.wanted_type is not None)

    def by_role(self) -> dict[TensorRole, tuple[int, int]]:
        """Bytes before and after of each role."""
        before = _table.totals((tensor.role, tensor.bytes_before) for tensor in self.tensors)
        after = _table.totals((tensor.role, tensor.bytes_after) for tensor in self.tensors)
        return {role: (size, after[role]) for role, size in before.items()}

    def to_dict(self) -> dict[str, object]:
        """For JSON: `{"rows": [{"name", "role", "shape", "type_before", ...}, ...], "bytes_before", "bytes_after", "file_bytes"}`."""
        rows = [{field: getattr(tensor, field) for field in QuantizedTensor.__slots__} for tensor in self.tensors]
        return {"rows": rows, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "file_bytes": self.file_bytes}

    def __str__(self) -> str:
        rows = [("role", "before", "after", "bits per weight", "formats")]
        present = self.by_role()
        rows += [self._row(role, [tensor for tensor in self.tensors if tensor.role == role]) for role in ROLES if role in present]
        rows.append(self._row("total", self.tensors, formats=False))
        lines = [_table.columns(rows, right=(1, 2, 3))]
        if self.fallbacks:
            kinds = Counter((tensor.wanted_type, tensor.type_after, tensor.shape[0]) for tensor in self.fallbacks)
            lines += [
                f"{count} {'tensors get' if count > 1 else 'tensor gets'} {after} instead of {wanted}: "
                f"rows of {width} are no multiple of its blocks."
                for (wanted, after, width), count in kinds.items()
            ]
        if self.needs_imatrix:
            names = ", ".join(dict.fromkeys(tensor.type_after for tensor in self.tensors if tensor.needs_imatrix))
            lines.append(f"{names} cannot be made without an importance matrix.")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<QuantizeReport: {len(self.tensors)} tensors, {format_size(self.bytes_before)} -> {format_size(self.bytes_after)}>"

    @staticmethod
    def _row(label: str, tensors: Sequence[QuantizedTensor], *, formats: bool = True) -> tuple[str, str, str, str, str]:
        sizes: Counter[str] = Counter()
        weights = 0
        for tensor in tensors:
            sizes[tensor.type_after] += tensor.bytes_after
            count = 1
            for extent in tensor.shape:
                count *= extent
            weights += count
        after = sum(sizes.values())
        before = sum(tensor.bytes_before for tensor in tensors)
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in sizes.most_common()) if formats else ""
        return label, format_size(before), format_size(after), f"{after * 8 / max(weights, 1):.2f}", parts


def quantize(
    src: StrPath,
    dst: StrPath | None,
    type: str,  # noqa: A002  the field's word for it
    *,
    experts: str | None = None,
    attention: str | None = None,
    output: str | None = None,
    embedding: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    imatrix: StrPath | None = None,
    requantize: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    on_progress: Callable[[float], object] | None = None,
) -> QuantizeReport:
    """Writes a model file with smaller number formats.

    `type` is a mix of llama.cpp's, which gives each tensor a format by its part in the model; the other options change that for a role or
    for named tensors. Norms, biases and routers stay as they are. It runs without the GIL; Ctrl-C, and an exception from `on_progress`,
    stop it. `dst` appears when it is whole; whatever goes wrong before leaves a file of that name as it was.

    Args:
        src: a GGUF file; the first one of a split model. The result is always one file.
        dst: the file to write. It may exist, but not be (part of) `src`. None is possible with `dry_run`.
        type: one of `quantization_types()`, such as "Q4_K_M", "Q2_K", "Q8_0", "IQ4_NL", "MXFP4_MOE" or "F16".
        experts: one of `tensor_types()`, such as "Q2_K", for the routed experts.
        attention: the same for the matrices of the attention.
        output: the same for the output matrix; for the embedding, when the model uses that as its output.
        embedding: the same for the token embedding.
        overrides: pairs of a regular expression (ECMAScript's, found anywhere in a tensor's name) and a tensor type. The first that
            matches decides, before the roles above.
        imatrix: an importance matrix for the model, see `llama_moe.imatrix()`. The IQ1 and IQ2 types, "IQ3_XXS" and
            "Q2_K_S" need one.
        requantize: also change tensors that are quantised already, losing precision twice.
        threads: CPU threads; None: one for each core that this process may use.
        dry_run: only report what would be done. Weights are not read.
        on_progress: called on this thread with the share done, 0 to 1.

    Returns:
        What was done to each tensor.

    Raises:
        FileNotFoundError: no such file.
        ModelLoadError: `src` is not GGUF, truncated, corrupted or of an unknown architecture, or `imatrix` is no importance matrix.
        InvalidOptionError: an unknown type; a role or regular expression that matches nothing that can be quantised; `dst` is `src`;
            `src` is quantised already; an importance matrix is needed or is of another model.
        QuantizeError: a tensor has values that are not finite, or that its new format cannot hold.
        OSError: `dst` cannot be written; the disk has too little room, which is found out before anything is written.
    """
    _logging.sync_level()
    options = fill(
        _core.QuantizeOptions(),
        {
            "type": type,
            "experts": experts or "",
            "attention": attention or "",
            "output": output or "",
            "embedding": embedding or "",
            "rules": [tuple(pair) for pair in overrides],
            "requantize": requantize,
            "threads": _thread_count(threads),
        },
    )
    options.validate()
    if imatrix is not None:
        options.imatrix = _core.read_imatrix(os.fspath(imatrix))
    if dry_run:
        return _report(_core.plan_quantization(os.fspath(src), options))
    if dst is None:
        raise InvalidOptionError("dst is needed, unless it is a dry run")
    _check_target(src, dst)
    with written_whole(dst) as partial:
        return _report(_core.quantize(os.fspath(src), os.fspath(partial), options, on_progress))


def _thread_count(threads: int | None) -> int:
    if threads == 0:
        raise InvalidOptionError("threads must be 1 or more, not 0")
    return 0 if threads is None else threads


def _check_target(src: StrPath, dst: StrPath) -> None:
    target = Path(dst)
    if target.is_dir():
        raise IsADirectoryError(f"'{target}' is a directory; the name of a file is needed")
    for file in _core.read_gguf(os.fspath(src)).files:
        if target.exists() and target.samefile(file):
            raise InvalidOptionError(f"dst '{target}' is the source itself")


def _report(plan: _core.QuantizePlan) -> QuantizeReport:
    return QuantizeReport(
        tensors=tuple(
            QuantizedTensor(
                name=tensor.source.name,
                shape=tuple(tensor.source.shape),
                role=cast("TensorRole", tensor.source.role),
                type_before=tensor.source.type,
                type_after=tensor.type,
                bytes_before=tensor.source.bytes,
                bytes_after=tensor.bytes,
                wanted_type=tensor.wanted_type or None,
                needs_imatrix=tensor.needs_imatrix,
            )
            for tensor in plan.tensors
        ),
        file_bytes=plan.file_bytes,
    )
