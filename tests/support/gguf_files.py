"""Copies of model files with something changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf

__all__ = ["Value", "edited_copy", "sparse_copy"]

# A value with its GGUF type.
Value = tuple[object, gguf.GGUFValueType]


def edited_copy(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Value] | None = None,
    without: Collection[str] = (),
    without_tensors: Collection[str] = (),
) -> Path:
    """Copies a model file.

    Args:
        source: File to copy.
        target: File to write.
        metadata: Values to write in place of the file's, or besides them.
        without: Keys to leave out.
        without_tensors: Names of tensors to leave out.
    """
    reader, writer = _begin(source, metadata or {}, without)
    for tensor in reader.tensors:
        if tensor.name not in without_tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    _write_header(writer, target)
    writer.write_tensors_to_file()
    writer.close()
    return target


def sparse_copy(source: Path, target: Path, *, factor: int, metadata: Mapping[str, Value]) -> Path:
    """A copy whose experts are `factor` times as wide, and whose weights are a hole in the file: any size takes no room on the disk."""
    reader, writer = _begin(source, metadata, ())
    size = 0
    for tensor in reader.tensors:
        shape, grown = list(tensor.data.shape), tensor.data.nbytes
        if "_exps" in tensor.name:
            shape[2 if "down" in tensor.name else 1] *= factor
            grown *= factor
        writer.add_tensor_info(tensor.name, shape, tensor.data.dtype, grown, raw_dtype=tensor.tensor_type)
        size += _padded(grown, writer.data_alignment)
    _write_header(writer, target)
    writer.write_ti_data_to_file()
    writer.close()
    with target.open("r+b") as file:
        file.truncate(_padded(target.stat().st_size, writer.data_alignment) + size)
    return target


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _begin(source: Path, metadata: Mapping[str, Value], without: Collection[str]) -> tuple[Any, Any]:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(None, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in metadata or name in without:
            continue
        writer.add_key_value(
            name, field.contents(), field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        )
    for name, (value, kind) in metadata.items():
        writer.kv_data[0].pop(name, None)
        writer.add_key_value(name, value, kind)
    if "general.architecture" in without:
        del writer.kv_data[0]["general.architecture"]
    return reader, writer


def _write_header(writer: Any, target: Path) -> None:
    writer.open_output_file(target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
