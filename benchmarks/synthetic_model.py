"""Mixture-of-Experts models of realistic shapes and random weights, for measuring speed: what they write means nothing.

    python benchmarks/synthetic_model.py OUT [--shape NAME] [--mix Q4_K_M]

writes 1.9 GB in a few seconds. Which tensor gets which number format is what `llama_moe.quantize()` says it would do with the model; the
blocks are made directly in their quantised form, so that nothing has to be quantised and nothing is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import secrets
import string
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import os

__all__ = ["DEEPSEEK_16B", "PHI_35", "QWEN3MOE_2B", "QWEN3_30B", "SHAPES", "Shape", "synthetic_model_path", "write_synthetic_model"]

Bytes = npt.NDArray[np.uint8]

# Part of the cached file's name: raise it when the written model changes.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, in elements; of the ``qwen3moe`` architecture, or with shared experts of ``qwen2moe``."""

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
    shared_feed_forward: int = 0
    """Of all shared experts together: one block, as in every file of them."""
    context_length: int = 32768

    @property
    def architecture(self) -> str:
        return "qwen2moe" if self.shared_feed_forward else "qwen3moe"


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

# Four layers each of what people run. The vocabulary is cut like the layers, so that the output matrix has the share of a token's time
# that it has in the whole model. ik_llama.cpp does not know the architectures "deepseek" and "phimoe"; those above have the same products.
DEEPSEEK_16B = Shape(
    name="deepseek-moe-16b-4-layers",
    layers=4,
    embedding=2048,
    heads=16,
    kv_heads=16,
    head_size=128,
    experts=64,
    experts_used=6,
    expert_feed_forward=1408,
    shared_feed_forward=2 * 1408,
    vocab=14_592,
)
"""DeepSeek-MoE-16B: the experts' down projections are 1408 wide, no multiple of 256, so that K-quants fall back to other formats."""

PHI_35 = Shape(
    name="phimoe-4-layers",  # of a model whose name has "phi-3" in it llama.cpp expects certain tokens
    layers=4,
    embedding=4096,
    heads=32,
    kv_heads=8,
    head_size=128,
    experts=16,
    experts_used=2,
    expert_feed_forward=6400,
    vocab=4096,
)
"""Phi-3.5-MoE: few and large experts; 5.5 GB as Q8_0."""

QWEN3_30B = Shape(
    name="qwen3-30b-a3b-4-layers",
    layers=4,
    embedding=2048,
    heads=32,
    kv_heads=4,
    head_size=128,
    experts=128,
    experts_used=8,
    expert_feed_forward=768,
    vocab=12_800,
)
"""Qwen3-30B-A3B: many small experts."""

SHAPES = {shape.name: shape for shape in (QWEN3MOE_2B, DEEPSEEK_16B, PHI_35, QWEN3_30B)}


def write_synthetic_model(path: str | os.PathLike[str], shape: Shape = QWEN3MOE_2B, *, mix: str = "Q4_K_M", seed: int = 0) -> Path:
    """Writes a model with one of llama.cpp's mixes of types; the file appears under its name only when it is complete.

    Args:
        path: File to write; its folder is created if missing, an existing file is replaced.
        shape: Sizes of the model.
        mix: "Q4_K_M", "Q2_K" or "Q8_0".
        seed: Of the weights.

    Returns:
        The path written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        _write(partial, shape, mix, seed)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def synthetic_model_path(shape: Shape = QWEN3MOE_2B, *, mix: str = "Q4_K_M") -> Path:
    """Returns the model in the cache, written there the first time."""
    from llama_moe._machine import data_folder

    target = data_folder() / "benchmarks" / f"{shape.name}-{mix}-v{_VERSION}.gguf"
    return target if target.is_file() else write_synthetic_model(target, shape, mix=mix)


# ---- what is in the file


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    """As numpy has it: the input dimension last."""
    matrix: bool = True
    """Has a quantised type; else it stays F32, as norms, biases and routers do."""
    gain: float = 1.0
    """Root mean square of the outputs for inputs of one; for a vector, of the elements around `mean`."""
    mean: float = 0.0

    @property
    def deviation(self) -> float:
        return self.gain / math.sqrt(self.shape[-1])


def _tensors(shape: Shape) -> Iterator[_Tensor]:
    width, hidden, experts, shared = shape.embedding, shape.expert_feed_forward, shape.experts, shape.shared_feed_forward
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def norm(name: str, size: int) -> _Tensor:
        return _Tensor(name, (size,), matrix=False, gain=0.1, mean=1.0)

    yield _Tensor("token_embd.weight", (shape.vocab, width), gain=math.sqrt(width))
    yield norm("output_norm.weight", width)
    yield _Tensor("output.weight", (shape.vocab, width), gain=2.0)
    for layer in range(shape.layers):
        block = f"blk.{layer}"
        yield norm(f"{block}.attn_norm.weight", width)
        yield _Tensor(f"{block}.attn_q.weight", (queries, width))
        yield _Tensor(f"{block}.attn_k.weight", (keys, width))
        yield _Tensor(f"{block}.attn_v.weight", (keys, width))
        if shape.architecture == "qwen2moe":
            for name, size in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
                yield _Tensor(f"{block}.{name}.bias", (size,), matrix=False, gain=0.1)
        else:
            yield norm(f"{block}.attn_q_norm.weight", shape.head_size)
            yield norm(f"{block}.attn_k_norm.weight", shape.head_size)
        yield _Tensor(f"{block}.attn_output.weight", (width, queries))
        yield norm(f"{block}.ffn_norm.weight", width)
        yield _Tensor(f"{block}.ffn_gate_inp.weight", (experts, width), matrix=False)
        yield _Tensor(f"{block}.ffn_gate_exps.weight", (experts, hidden, width))
        yield _Tensor(f"{block}.ffn_up_exps.weight", (experts, hidden, width))
        yield _Tensor(f"{block}.ffn_down_exps.weight", (experts, width, hidden), gain=2.0)
        if shared:
            yield _Tensor(f"{block}.ffn_gate_inp_shexp.weight", (width,), matrix=False, gain=1 / math.sqrt(width))
            yield _Tensor(f"{block}.ffn_gate_shexp.weight", (shared, width))
            yield _Tensor(f"{block}.ffn_up_shexp.weight", (shared, width))
            yield _Tensor(f"{block}.ffn_down_shexp.weight", (width, shared), gain=2.0)


def _write(path: Path, shape: Shape, mix: str, seed: int) -> None:
    types = _types(shape, mix)
    with _header_written(path, shape, mix, types) as writer:
        for tensor in _tensors(shape):
            generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
            writer.write_tensor_data(_DATA[types[tensor.name]](tensor, generator))


def _types(shape: Shape, mix: str) -> dict[str, str]:
    """The type that each tensor gets in a mix: what quantising a file of 16-bit weights would do, of which only the header is written."""
    import llama_moe

    types = {tensor.name: "F16" if tensor.matrix else "F32" for tensor in _tensors(shape)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.gguf"
        with _header_written(source, shape, "F16", types):
            pass
        weights = sum(math.prod(tensor.shape) * (2 if tensor.matrix else 4) + 64 for tensor in _tensors(shape))
        with source.open("r+b") as file:
            file.truncate(source.stat().st_size + weights)  # a hole: it takes no room
        report = llama_moe.quantize(source, None, mix, dry_run=True)
    return {tensor.name: tensor.type_after for tensor in report.tensors}


@contextlib.contextmanager
def _header_written(path: Path, shape: Shape, mix: str, types: Mapping[str, str]) -> Iterator[gguf.GGUFWriter]:
    """Writes all but the weights, which the writer yielded takes in the order of `_tensors()`."""
    writer = gguf.GGUFWriter(None, shape.architecture)
    try:
        _add_metadata(writer, shape, mix)
        _add_vocabulary(writer, shape.vocab)
        for tensor in _tensors(shape):
            quantization = gguf.GGMLQuantizationType[types[tensor.name].upper()]
            block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
            nbytes = math.prod(tensor.shape) // block * block_bytes
            # The shape is in elements: the writer would read it in bytes if it were told that the elements are bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, quantization)
        writer.open_output_file(path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, mix: str) -> None:
    writer.add_name(f"synthetic {shape.name}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{mix}"])
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
    if shape.shared_feed_forward:
        writer.add_expert_shared_feed_forward_length(shape.shared_feed_forward)
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
        return np.float32(tensor.mean) + values * np.float32(tensor.gain)
    return values * np.float32(tensor.deviation)


def _random_blocks(tensor: _Tensor, block_bytes: int, generator: np.random.Generator, weights: int = 256) -> Bytes:
    size = math.prod(tensor.shape) // weights * block_bytes
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


def _q2_k(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """Blocks of 256 weights: 16 4-bit scales and minima, 256 2-bit q, d, dmin; a weight is d * scale * q - dmin * minimum.

    As in Q4_K each minimum is its scale, and dmin is 1.5 d.
    """
    blocks = _random_blocks(tensor, 84, generator)
    unit = tensor.deviation / (11.7 * 1.12)  # the root mean squares of scale, 8 to 15, and of q - 1.5
    scales = blocks[:, :16] & 7 | 8
    blocks[:, :16] = scales | scales << 4
    blocks[:, 80:82], blocks[:, 82:84] = _half(unit), _half(1.5 * unit)
    return blocks


def _q3_k(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """Blocks of 256 weights: 256 3-bit q in two parts, 16 packed 6-bit scales, d; a weight is d * (scale - 32) * (q - 4)."""
    blocks = _random_blocks(tensor, 110, generator)
    blocks[:, 108:110] = _half(tensor.deviation / (18.5 * 2.35))
    return blocks


def _q8_0(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """Blocks of 32 weights: d, 32 signed 8-bit q, of which quantising never makes -128; a weight is d * q."""
    blocks = _random_blocks(tensor, 34, generator, 32)
    values = blocks[:, 2:].view(np.int8)
    np.maximum(values, -127, out=values)
    blocks[:, :2] = _half(tensor.deviation / 73.6)
    return blocks


def _signed_blocks(tensor: _Tensor, block_bytes: int, generator: np.random.Generator, size_of_q: float) -> Bytes:
    """Blocks of 32 weights that begin with d, which has a random sign: what q is short of a mean of zero then does not add up."""
    blocks = _random_blocks(tensor, block_bytes, generator, 32)
    signs = blocks[:, 1] & 0x80
    blocks[:, :2] = _half(tensor.deviation / size_of_q)
    blocks[:, 1] |= signs
    return blocks


def _q4_0(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """A weight is d * (q - 8)."""
    return _signed_blocks(tensor, 18, generator, 4.64)


def _q5_0(tensor: _Tensor, generator: np.random.Generator) -> Bytes:
    """A weight is d * (q - 16)."""
    return _signed_blocks(tensor, 22, generator, 9.25)


_DATA: Mapping[str, Callable[[_Tensor, np.random.Generator], npt.NDArray[Any]]] = {
    "F32": _f32,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q5_0": _q5_0,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}


def main() -> None:
    """Writes the model to the path of the command line."""
    parser = argparse.ArgumentParser(description="Write a synthetic benchmark model.")
    parser.add_argument("out", type=Path, help="file to write (1.9 GB)")
    parser.add_argument("--shape", choices=SHAPES, default=QWEN3MOE_2B.name)
    parser.add_argument("--mix", default="Q4_K_M", help="Q4_K_M, Q2_K or Q8_0")
    arguments = parser.parse_args()
    out: Path = arguments.out
    start = time.monotonic()
    write_synthetic_model(out, SHAPES[arguments.shape], mix=arguments.mix)
    sys.stdout.write(f"{out}: {out.stat().st_size / 2**30:.2f} GiB in {time.monotonic() - start:.1f} s\n")


if __name__ == "__main__":
    main()
