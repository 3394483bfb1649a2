"""Models of the real sizes whose weights are a hole in the file: every header is true, and a file of 60 GB takes a few megabytes of disk.

They are for what reads headers only: placement, plans, memory estimates, and loads that allocate nothing.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

from llama_moe import _core
from tests.support.tiny_models import MODELS, TinyModel, add_header, tensors_of

__all__ = ["FULL_SIZE_MODELS", "write_full_size_model"]

_TABLE = (
    replace(
        MODELS["deepseek"],
        name="DeepSeek-MoE-16B",
        layers=28,
        dense_layers=1,
        experts=64,
        experts_used=6,
        embedding=2048,
        heads=16,
        kv_heads=16,
        head_size=128,
        feed_forward=10944,
        expert_feed_forward=1408,
        shared_feed_forward=2 * 1408,
        tokens=102_400,
        context_length=4096,
        metadata={
            "rope.dimension_count": 128,
            "expert_feed_forward_length": 1408,
            "expert_shared_count": 2,
            "expert_weights_scale": 1.0,
            "leading_dense_block_count": 1,
        },
    ),
    replace(
        MODELS["phimoe"],
        name="Phi-3.5-MoE",
        layers=32,
        experts=16,
        experts_used=2,
        embedding=4096,
        heads=32,
        kv_heads=8,
        head_size=128,
        expert_feed_forward=6400,
        tokens=32_064,
        context_length=131_072,
        metadata={"rope.dimension_count": 128, "rope.scaling.original_context_length": 4096},
    ),
    replace(
        MODELS["qwen3moe"],
        name="Qwen3-30B-A3B",
        layers=48,
        experts=128,
        experts_used=8,
        embedding=2048,
        heads=32,
        kv_heads=4,
        head_size=128,
        feed_forward=6144,
        expert_feed_forward=768,
        tokens=151_936,
        context_length=40_960,
        rope_base=1e6,
        metadata={"attention.key_length": 128, "attention.value_length": 128, "expert_feed_forward_length": 768},
    ),
)

FULL_SIZE_MODELS: Mapping[str, TinyModel] = MappingProxyType({model.name: model for model in _TABLE})
"""Every model by name."""


def write_full_size_model(path: str | os.PathLike[str], name: str, quantization: str = "F16") -> Path:
    """Writes one model.

    Args:
        path: File to write.
        name: A name in `FULL_SIZE_MODELS`.
        quantization: "F16", or a mix such as "Q4_K_M": the tensors have the types that llama.cpp's quantiser gives them.

    Returns:
        The path written.
    """
    target = Path(path)
    header, size = _header(name, quantization)
    _write_sparse(target, header, size)
    return target


def _write_sparse(path: Path, header: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


@functools.cache
def _header(name: str, quantization: str) -> tuple[bytes, int]:
    """The header of a model's file, and the size of the whole."""
    if quantization == "F16":
        return _f16_header(FULL_SIZE_MODELS[name])
    with tempfile.TemporaryDirectory() as folder:
        source = write_full_size_model(Path(folder, "f16.gguf"), name)
        options = _core.QuantizeOptions()
        options.type = quantization
        plan = _core.plan_quantization(str(source), options)
        return plan.header, plan.file_bytes


def _f16_header(model: TinyModel) -> tuple[bytes, int]:
    writer = gguf.GGUFWriter(None, model.architecture)
    add_header(writer, model)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    size = 0
    for tensor in tensors_of(model):
        quantization = gguf.GGMLQuantizationType[tensor.type]
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        bytes_ = math.prod(tensor.shape) // block * block_bytes
        # The shape is in elements: the writer would read it in bytes if it were told that the elements are bytes.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_, quantization)
        size += _padded(bytes_, writer.data_alignment)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "header.gguf")
        writer.open_output_file(file)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = file.read_bytes()
    header += bytes(-len(header) % writer.data_alignment)
    return header, len(header) + size


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
