"""Copies of model files with something changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf

__all__ = ["Value", "begin_copy", "edited_copy", "finish_copy", "sparse_copy", "split_copy"]

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
    reader, writer = begin_copy(source, metadata or {}, without)
    for tensor in reader.tensors:
        if tensor.name not in without_tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return finish_copy(writer, target)


def split_copy(source: Path, folder: Path, parts: int, *, name: str = "model") -> list[Path]:
    """A model split as llama.cpp's gguf-split does it: the metadata in the first file, the tensors in all of them."""
    kind = gguf.GGUFValueType
    tensors = gguf.GGUFReader(source).tensors
    cuts = [len(tensors) * part // parts for part in range(parts + 1)]
    files = []
    for part in range(parts):
        counts: dict[str, Value] = {
            "split.no": (part, kind.UINT16),
            "split.count": (parts, kind.UINT16),
            "split.tensors.count": (len(tensors), kind.INT32),
        }
        reader, writer = begin_copy(source, counts) if part == 0 else (None, gguf.GGUFWriter(None, ""))
        if reader is None:
            writer.kv_data[0].clear()
            for key, (value, value_kind) in counts.items():
                writer.add_key_value(key, value, value_kind)
        for tensor in tensors[cuts[part] : cuts[part + 1]]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        files.append(finish_copy(writer, folder / f"{name}-{part + 1:05d}-of-{parts:05d}.gguf"))
    return files


def sparse_copy(source: Path, target: Path, *, factor: int, metadata: Mapping[str, Value]) -> Path:
    """A copy whose experts are `factor` times as wide, and whose weights are a hole in the file: any size takes no room on the disk."""
    reader, writer = begin_copy(source, metadata)
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


def begin_copy(source: Path, metadata: Mapping[str, Value] = MappingProxyType({}), without: Collection[str] = ()) -> tuple[Any, Any]:
    """A reader of a model, and a writer that has its metadata, with these changes, and no tensors yet."""
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


def finish_copy(writer: Any, target: Path) -> Path:
    """Writes what the writer was given."""
    _write_header(writer, target)
    writer.write_tensors_to_file()
    writer.close()
    return target


def _write_header(writer: Any, target: Path) -> None:
    writer.open_output_file(target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
