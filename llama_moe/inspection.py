"""What a model file's header says, without loading the model."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import _core, _logging, _table
from ._sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from .placement import TensorRole

    MetadataValue: TypeAlias = str | int | float | bool | list["MetadataValue"]
    Metadata: TypeAlias = dict[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model file.

    Attributes:
        name: its name.
        type: ggml's name of its number format, such as "Q4_K" or "F32".
        shape: its dimensions as GGUF has them, the fastest-changing first.
        bytes: its size in the file.
        role: "experts", "weights", "embedding" or "output".
        layer: the transformer block it belongs to, from 0; None: to none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    role: TensorRole
    layer: int | None


@dataclass(frozen=True, slots=True, repr=False)
class ModelInfo:
    """The header of a model file; made by `inspect()`.

    Attributes:
        path: the file.
        architecture: llama.cpp's name of the architecture, such as "qwen3moe".
        metadata: the file's metadata by key, without the vocabulary.
        tensors: every tensor, in the file's order.
        layer_count: transformer blocks.
        expert_count: routed experts in each MoE layer; 0 for a dense model.
        experts_used: routed experts that compute each token; 0 for a dense model.
        parameter_count: numbers in all tensors.
        size_bytes: bytes of all tensors.
    """

    path: str
    architecture: str
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    layer_count: int
    expert_count: int
    experts_used: int
    parameter_count: int
    size_bytes: int

    def by_role(self) -> dict[TensorRole, int]:
        """Bytes of each role."""
        return _table.totals((tensor.role, tensor.bytes) for tensor in self.tensors)

    def types_by_role(self) -> dict[TensorRole, dict[str, int]]:
        """Bytes of each number format within each role, the largest first."""
        sizes: dict[TensorRole, Counter[str]] = {}
        for tensor in self.tensors:
            sizes.setdefault(tensor.role, Counter())[tensor.type] += tensor.bytes
        return {role: dict(counter.most_common()) for role, counter in sizes.items()}

    def __repr__(self) -> str:
        experts = f", {self.expert_count} experts ({self.experts_used} used)" if self.expert_count else ""
        return f"<ModelInfo {self.path!r}: {self.architecture}, {self.layer_count} layers{experts}, {format_size(self.size_bytes)}>"


@contextlib.contextmanager
def header_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Gives a file of this machine with the header of `path`, which may be a file, a URL or a file on the Hugging Face hub."""
    if not isinstance(path, str) or Path(path).exists():
        yield os.fspath(path)
        return
    from .remote import local_header  # late: HTTP takes longer to import than this package

    with local_header(path) as header:
        yield os.fspath(header)


def inspect(path: str | os.PathLike[str]) -> ModelInfo:
    """Reads the header of a GGUF file; of all files of a split model, given the first.

    Args:
        path: a file; or the ``https://`` URL of one, or "owner/repository/file.gguf" on the Hugging Face hub, of which the header alone is
            fetched (`llama_moe.remote`).

    Raises:
        FileNotFoundError: no such file.
        ModelLoadError: not GGUF, truncated or corrupted; or a server does not let it be read.
    """
    _logging.sync_level()
    with header_file(path) as header:
        info = _core.read_gguf(header)
    return ModelInfo(
        path=os.fspath(path),
        architecture=info.architecture,
        metadata=info.metadata,
        tensors=tuple(
            TensorInfo(
                name=tensor.name,
                type=tensor.type,
                shape=tuple(tensor.shape),
                bytes=tensor.bytes,
                role=cast("TensorRole", tensor.role),
                layer=tensor.layer if tensor.layer >= 0 else None,
            )
            for tensor in info.tensors
        ),
        layer_count=info.layer_count,
        expert_count=info.expert_count,
        experts_used=info.experts_used,
        parameter_count=info.parameter_count,
        size_bytes=info.size_bytes,
    )
