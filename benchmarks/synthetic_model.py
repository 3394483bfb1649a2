"""A Mixture-of-Experts model of realistic shape and random weights, for measuring speed: what it writes means nothing.

    python benchmarks/synthetic_model.py OUT

writes 1.9 GB in a few seconds. The blocks are made directly in their quantised form, so nothing is quantised and nothing is fetched.
"""

from __future__ import annotations

import argparse
import itertools
import math
import secrets
import string
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import os

__all__ = ["QWEN3MOE_2B", "Shape", "synthetic_model_path", "write_synthetic_model"]

Bytes = npt.NDArray[np.uint8]

# Part of the cached file's name: raise it when the written model changes.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model of the ``qwen3moe`` architecture, in elements."""

    name: str
    layers: int
    embedding: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    experts_used: int
    expert_feed_forward: int
    vocab: int
    context_length: int = 32768


QWEN3MOE_2B = Shape(
    name="qwen3moe-2b",
    layers=8,
    embedding=2048,
    heads=32,
    kv_heads=4,
    head_size=128,
    experts=64,
    experts_used=8,
    expert_feed_forward=768,
    vocab=151_936,
)
"""Eight layers of Qwen3-30B-A3B with half its experts: 3.2 billion parameters, 1.9 GB as Q4_K_M."""


def write_synthetic_model(path: str | os.PathLike[str], shape: Shape = QWEN3MOE_2B, *, seed: int = 0) -> Path:
    """Writes a model with llama.cpp's Q4_K_M mix of types; the file appears under its name only when it is complete.

    Args:
        path: File to write; its folder is created if missing, an existing file is replaced.
        shape: Sizes of the model.
        seed: Of the weights.

    Returns:
        The path written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        _write(partial, shape, seed)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def synthetic_model_path(shape: Shape = QWEN3MOE_2B) -> Path:
    """Returns the model in the cache, written there the first time."""
    from llama_moe._machine import data_folder

    target = data_folder() / "benchmarks" / f"{shape.name}-Q4_K_M-v{_VERSION}.gguf"
    return target if target.is_file() else write_synthetic_model(target, shape)


# ---- what is in the file


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    """As numpy has it: the input dimension last."""
    type: Literal["F32", "Q4_K", "Q6_K"]
    gain: float = 1.0
    """Root mean square of the outputs for inputs of one; for a norm (one dimension), of the elements around one."""

    @property
    def deviation(self) -> float:
        return self.gain / math.sqrt(self.shape[-1])


def _use_more_bits(layer: int, layers: int) -> bool:
    """Which layers Q4_K_M gives more bits: `use_more_bits` of llama.cpp's llama-quant.cpp."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _tensors(shape: Shape) -> Iterator[_Tensor]:
    width, hidden, experts = shape.embedding, shape.expert_feed_forward, shape.experts
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield _Tensor("token_embd.weight", (shape.vocab, width), "Q4_K", gain=math.sqrt(width))
    yield _Tensor("output_norm.weight", (width,), "F32", gain=0.1)
    yield _Tensor("output.weight", (shape.vocab, width), "Q6_K", gain=2.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        better: Literal["Q4_K", "Q6_K"] = "Q6_K" if _use_more_bits(layer, shape.layers) else "Q4_K"
        yield _Tensor(f"{block}.attn_norm.weight", (width,), "F32", gain=0.1)
        yield _Tensor(f"{block}.attn_q.weight", (queries, width), "Q4_K")
        yield _Tensor(f"{block}.attn_k.weight", (keys, width), "Q4_K")
        yield _Tensor(f"{block}.attn_v.weight", (keys, width), better)
        yield _Tensor(f"{block}.attn_q_norm.weight", (shape.head_size,), "F32", gain=0.1)
        yield _Tensor(f"{block}.attn_k_norm.weight", (shape.head_size,), "F32", gain=0.1)
        yield _Tensor(f"{block}.attn_output.weight", (width, queries), "Q4_K")
        yield _Tensor(f"{block}.ffn_norm.weight", (width,), "F32", gain=0.1)
        yield _Tensor(f"{block}.ffn_gate_inp.weight", (experts, width), "F32")
        yield _Tensor(f"{block}.ffn_gate_exps.weight", (experts, hidden, width), "Q4_K")
        yield _Tensor(f"{block}.ffn_up_exps.weight", (experts, hidden, width), "Q4_K")
        yield _Tensor(f"{block}.ffn_down_exps.weight", (experts, width, hidden), better, gain=2.0)


def _write(path: Path, shape: Shape, seed: int) -> None:
    tensors = list(_tensors(shape))
    writer = gguf.GGUFWriter(None, "qwen3moe")
    try:
        _add_metadata(writer, shape)
        _add_vocabulary(writer, shape.vocab)
        for tensor in tensors:
            quantization = gguf.GGMLQuantizationType[tensor.type]
            block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
            nbytes = math.prod(tensor.shape) // block * block_bytes
            # The shape is in elements: the writer would read it in bytes if it were told that the elements are bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, quantization)
        writer.open_output_file(path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
            writer.write_tensor_data(_DATA[tensor.type](tensor, generator))
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"synthetic {shape.name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_feed_forward_length(shape.expert_feed_forward * shape.experts_used)
    writer.add_expert_feed_forward_length(shape.expert_feed_forward)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.experts_used)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-pair vocabulary of every combination of two, three and four letters, as far as they go."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ("".join(letters) for length in (2, 3, 4) for letters in itertools.product(string.ascii_lowercase, repeat=length))
    merged = list(itertools.islice(words, size - 256 - len(control)))
    # GPT-2's characters for the 256 bytes.
    alphabet = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
    tokens = [*alphabet, *merged, *control]
    if len(tokens) != size:
        raise ValueError(f"vocab is {size}; 260 to {256 + len(control) + sum(26**length for length in (2, 3, 4))} can be made")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - len(control)) + [gguf.TokenType.CONTROL] * len(control))
    writer.add_token_merges([f"{word[:-1]} {word[-1]}" for word in merged])
    writer.add_bos_token_id(size - 3)
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


# ---- weights


def _f32(tensor: _Tensor, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    values = generator.standard_normal(tensor.shape, dtype=np.float32)
    if len(tensor.shape) == 1:
        return np.float32(1.0) + values * np.float32(tensor.gain)
    return values * np.float32(tensor.deviation)


def _random_blocks(tensor: _Tensor, block_bytes: int, generator: np.random.Generator) -> Bytes:
    size = math.prod(tensor.shape) // 256 * block_bytes
    words = generator.integers(0, 1 << 64, -(-size // 8), dtype=np.uint64)
    return words.view(np.uint8)[:size].reshape(-1, block_bytes)


def _half(value: float) -> Bytes:
    return np.array([value], dtype="<f2").view(np.uint8)


def _q4_k(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """Blocks of 256 weights: d, dmin, 8 packed 6-bit (scale, minimum) pairs, 256 4-bit q; a weight is d * scale * q - dmin * minimum.

    Each minimum is its scale and dmin is 7.5 d, so that a weight is d * scale * (q - 7.5): q is random, and the mean is zero.
    """
    blocks = _random_blocks(tensor, 144, generator)
    unit = tensor.deviation / (48.4 * 4.61)  # the root mean squares of scale, in 32 to 63, and of q - 7.5
    blocks[:, 0:2], blocks[:, 2:4] = _half(unit), _half(7.5 * unit)
    scales = blocks[:, 4:12] & 31 | 32
    low, high = scales[:, :4], scales[:, 4:]
    # get_scale_min_k4 in ggml-quants.c: the upper four scales lie in the top bits of the lower four and in the last four bytes.
    blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4) << 6
    blocks[:, 12:16] = (high & 15) | (high & 15) << 4
    return blocks


def _q6_k(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """Blocks of 256 weights: 256 6-bit q in two parts, 16 signed 8-bit scales, d; a weight is d * scale * (q - 32)."""
    blocks = _random_blocks(tensor, 210, generator)
    unit = tensor.deviation / (23.9 * 18.5)  # the root mean squares of scale, 16 to 31 of either sign, and of q - 32
    scales = blocks[:, 192:208]
    magnitude = (scales & 15 | 16).view(np.int8)
    scales[:] = np.where(scales & 128, -magnitude, magnitude).view(np.uint8)
    blocks[:, 208:210] = _half(unit)
    return blocks


_DATA: Mapping[str, Callable[[_Tensor, np.random.Generator], npt.NDArray[Any]]] = {"F32": _f32, "Q4_K": _q4_k, "Q6_K": _q6_k}


def main() -> None:
    """Writes the model to the path of the command line."""
    parser = argparse.ArgumentParser(description="Write the synthetic benchmark model.")
    parser.add_argument("out", type=Path, help="file to write (1.9 GB)")
    out: Path = parser.parse_args().out
    start = time.monotonic()
    write_synthetic_model(out)
    sys.stdout.write(f"{out}: {out.stat().st_size / 2**30:.2f} GiB in {time.monotonic() - start:.1f} s\n")


if __name__ == "__main__":
    main()
