"""LoRA adapters, and the models that they should be the same as: with the product of their matrices added to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tests.support.gguf_files import begin_copy, finish_copy

__all__ = ["merged_copy", "weights_of", "write_lora"]

Floats = npt.NDArray[np.float32]


def weights_of(model: Path, *, containing: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's matrices whose names contain one of these."""
    reader = gguf.GGUFReader(model)
    return {
        tensor.name: tuple(int(size) for size in reversed(tensor.shape))
        for tensor in reader.tensors
        if any(part in tensor.name for part in containing) and tensor.name.endswith(".weight")
    }


def write_lora(
    target: Path,
    weights: Mapping[str, tuple[int, ...]],
    *,
    architecture: str,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    size: float = 0.1,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Floats]:
    """Writes an adapter.

    Args:
        target: File to write.
        weights: Shapes of the weights to change, as numpy has them.
        architecture: Of the model.
        rank: Of the matrices.
        alpha: As adapters have it; 0: none.
        seed: Of the values.
        size: Of the values.
        metadata: Texts to write in place of the usual ones.

    Returns:
        What a scale of 1 adds to each weight.
    """
    generator = np.random.default_rng(seed)
    writer: Any = gguf.GGUFWriter(target, architecture)
    for key, text in ({"general.type": "adapter", "adapter.type": "lora"} | dict(metadata or {})).items():
        writer.add_string(key, text)
    writer.add_float32("adapter.lora.alpha", alpha)
    added = {}
    for name, (*experts, rows, columns) in weights.items():
        a = generator.standard_normal((*experts, rank, columns), dtype=np.float32) * np.float32(size)
        b = generator.standard_normal((*experts, rows, rank), dtype=np.float32) * np.float32(size)
        # Of an embedding, llama.cpp looks a row up in A and multiplies it with B.
        in_file = (b, a.T) if name == "token_embd.weight" else (a, b)
        for matrix, values in zip("ab", in_file, strict=True):
            writer.add_tensor(f"{name}.lora_{matrix}", np.ascontiguousarray(values))
        added[name] = (b @ a) * np.float32(alpha / rank if alpha else 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added


def merged_copy(source: Path, target: Path, added: Mapping[str, Floats], scale: float) -> Path:
    """A copy of a model in F32 whose weights have `scale` times what is to be added."""
    reader, writer = begin_copy(source)
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name in added:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            data = data + np.float32(scale) * added[tensor.name]
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    return finish_copy(writer, target)
