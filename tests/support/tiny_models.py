"""Tiny random models, one for each Mixture-of-Experts architecture that is tested, each under 2 MB.

The weights mean nothing, but the numbers behave: activations keep about the same size from layer to layer, attention looks at more than one
token, the router spreads tokens over the experts, and the greedy continuation depends on the prompt. Control tokens have logits near zero
and are never chosen greedily, so that a test gets as many tokens as it asks for. The tokenizers are real ones: any text comes back from
its tokens.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import gguf
import numpy as np
import numpy.typing as npt

from tests.support.vocabularies import VOCABULARIES, Vocabulary, add_vocabulary

__all__ = ["ARCHITECTURES", "DENSE", "MODELS", "Tensor", "TinyModel", "add_header", "tensors_of", "write_tiny_model"]

Floats = npt.NDArray[np.float32]
Attention = Literal["grouped", "latent"]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """What one tiny model is like. Sizes are counted in elements."""

    name: str
    architecture: str
    """The GGUF architecture; variants of one architecture differ in their name only."""
    layers: int = 3
    dense_layers: int = 0
    """Leading layers with a dense feed-forward block."""
    experts: int = 8
    experts_used: int = 2
    embedding: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    feed_forward: int = 96
    """Width of dense feed-forward blocks."""
    expert_feed_forward: int = 64
    shared_feed_forward: int = 0
    """Width of the shared expert; 0: none."""
    shared_gate: bool = False
    chunk_experts: int = 0
    """Number of GroveMoE's adjugate experts; 0: none."""
    merged_gate_up: bool = False
    expert_bias: bool = False
    selection_bias: bool = False
    """DeepSeek-V3's bias on the choice of experts."""
    attention: Attention = "grouped"
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    norm_bias: bool = False
    """Bias of the norms and of the logits."""
    qk_norm: Literal["", "head", "all"] = ""
    sinks: bool = False
    rope_factors: bool = False
    tied_embedding: bool = False
    ffn_norm: str = "ffn_norm"
    weights: str = "F16"
    """ggml type of all matrices but the experts' and the router's (which is F32)."""
    expert_weights: str = "F16"
    vocabulary: Vocabulary = "bpe"
    tokens: int = 0
    """Size of the vocabulary; 0: as many as it takes to write any text."""
    pre_tokenizer: str = "default"
    chat_template: str | None = None
    context_length: int = 1024
    rope_base: float = 10000.0
    metadata: Mapping[str, int | float | bool] = field(default_factory=dict)
    """Further keys, without the architecture's prefix."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(range(self.dense_layers, self.layers)) if self.experts else ()

    @property
    def vocab_size(self) -> int:
        return self.tokens or len(VOCABULARIES[self.vocabulary])

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """Names of all tensors that belong to experts, biases included, layer by layer."""
        return tuple(tensor.name for tensor in tensors_of(self) if tensor.experts)


# ---- the models

_LATENT_RANK, _LATENT_QUERY_RANK, _LATENT_ROPE = 32, 32, 16
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_DEEPSEEK2 = TinyModel(
    name="deepseek2",
    architecture="deepseek2",
    dense_layers=1,
    kv_heads=1,
    shared_feed_forward=64,
    selection_bias=True,
    attention="latent",
    pre_tokenizer="deepseek-v3",
    metadata={
        "attention.q_lora_rank": _LATENT_QUERY_RANK,
        "attention.kv_lora_rank": _LATENT_RANK,
        # What the KV cache holds: the latent vector and the rotated part of the key, which all heads share.
        "attention.key_length": _LATENT_RANK + _LATENT_ROPE,
        "attention.value_length": _LATENT_RANK,
        "attention.key_length_mla": 16 + _LATENT_ROPE,
        "attention.value_length_mla": 16,
        "rope.dimension_count": _LATENT_ROPE,
        "expert_feed_forward_length": 64,
        "expert_shared_count": 1,
        "expert_gating_func": 2,  # sigmoid
        "expert_weights_norm": True,
        "expert_weights_scale": 1.5,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "leading_dense_block_count": 1,
    },
)

_TABLE = (
    TinyModel(
        name="deepseek",
        architecture="deepseek",
        dense_layers=1,
        kv_heads=4,
        shared_feed_forward=2 * 64,
        pre_tokenizer="deepseek-llm",
        metadata={
            "expert_feed_forward_length": 64,
            "expert_shared_count": 2,
            "expert_weights_scale": 1.0,
            "leading_dense_block_count": 1,
        },
    ),
    _DEEPSEEK2,
    # Some files hold an expert's gate and up projections in one tensor.
    replace(_DEEPSEEK2, name="deepseek2-merged", merged_gate_up=True, vocabulary="spm"),
    TinyModel(
        name="phimoe",
        architecture="phimoe",
        expert_feed_forward=96,
        qkv_bias=True,
        output_bias=True,
        norm_bias=True,
        rope_factors=True,
        vocabulary="spm",
        metadata={"rope.dimension_count": 16, "rope.scaling.original_context_length": 512},
    ),
    TinyModel(
        name="qwen2moe",
        architecture="qwen2moe",
        shared_feed_forward=96,
        shared_gate=True,
        qkv_bias=True,
        weights="Q8_0",
        expert_weights="Q8_0",
        pre_tokenizer="qwen2",
        chat_template=_CHATML,
        metadata={"expert_feed_forward_length": 64, "expert_shared_feed_forward_length": 96},
    ),
    TinyModel(
        name="qwen3moe",
        architecture="qwen3moe",
        layers=4,
        head_size=32,
        qk_norm="head",
        pre_tokenizer="qwen2",
        chat_template=_CHATML,
        metadata={"attention.key_length": 32, "attention.value_length": 32, "expert_feed_forward_length": 64},
    ),
    TinyModel(name="llama", architecture="llama", experts=4, expert_feed_forward=96, weights="F32", expert_weights="F32", vocabulary="spm"),
    TinyModel(
        name="olmoe",
        architecture="olmoe",
        layers=4,
        kv_heads=4,
        expert_feed_forward=96,
        qk_norm="all",
        expert_weights="Q4_0",
        pre_tokenizer="olmo",
    ),
    TinyModel(
        name="granitemoe",
        architecture="granitemoe",
        expert_feed_forward=96,
        tied_embedding=True,
        pre_tokenizer="refact",
        metadata={"logit_scale": 1.25, "residual_scale": 1.2, "embedding_scale": 0.5, "attention.scale": 0.25},
    ),
    TinyModel(
        name="gpt-oss",
        architecture="gpt-oss",
        layers=4,
        expert_bias=True,
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        ffn_norm="post_attention_norm",
        expert_weights="MXFP4",
        pre_tokenizer="gpt-4o",
        metadata={"expert_feed_forward_length": 64, "attention.sliding_window": 128},
    ),
    TinyModel(
        name="grovemoe",
        architecture="grovemoe",
        chunk_experts=4,
        qk_norm="head",
        pre_tokenizer="qwen2",
        metadata={
            "expert_feed_forward_length": 64,
            "expert_chunk_feed_forward_length": 32,
            "experts_per_group": 2,
            "expert_group_scale": 0.05,
        },
    ),
    TinyModel(name="llama-dense", architecture="llama", experts=0, experts_used=0, vocabulary="spm"),
)

MODELS: Mapping[str, TinyModel] = MappingProxyType({model.name: model for model in _TABLE})
"""Every tiny model by name."""
DENSE = "llama-dense"
"""The one model without experts, for what must be refused."""
ARCHITECTURES: tuple[str, ...] = tuple(name for name in MODELS if name != DENSE)
"""Names of the Mixture-of-Experts models."""


def write_tiny_model(path: str | os.PathLike[str], architecture: str | TinyModel, *, seed: int = 0) -> Path:
    """Writes one tiny model.

    Args:
        path: File to write.
        architecture: A name in `MODELS`, or a model of one's own.
        seed: Of the weights. The same seed gives the same file, byte for byte.

    Returns:
        The path written.
    """
    model = MODELS[architecture] if isinstance(architecture, str) else architecture
    target = Path(path)
    writer = gguf.GGUFWriter(None, model.architecture)
    try:
        add_header(writer, model)
        _add_tensors(writer, model, seed)
        writer.open_output_file(target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return target


# ---- metadata


def add_header(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    """Adds the metadata and the tokenizer of a model."""
    _add_metadata(writer, model)
    add_vocabulary(writer, model.vocabulary, size=model.tokens, pre_tokenizer=model.pre_tokenizer, chat_template=model.chat_template)


def _add_metadata(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    writer.add_name(model.name if model.tokens else f"tiny {model.name}")
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.embedding)
    writer.add_block_count(model.layers)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_vocab_size(model.vocab_size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(model.rope_base)
    # Architectures without a width of their own for experts take this one.
    own_width = "expert_feed_forward_length" in model.metadata or not model.experts
    writer.add_feed_forward_length(model.feed_forward if own_width else model.expert_feed_forward)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(model.experts_used)
    for key, value in model.metadata.items():
        name = f"{model.architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)


# ---- tensors


@dataclass(frozen=True)
class Tensor:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    """As numpy has it: the input dimension last."""
    type: str = "F32"
    gain: float = 1.0
    """Root mean square of the outputs for inputs of one; of the elements, if `is_vector`."""
    mean: float = 0.0
    experts: bool = False
    is_vector: bool = False


def tensors_of(model: TinyModel) -> Iterator[Tensor]:
    """The tensors of a model, in the order of its file."""
    vocab, width = model.vocab_size, model.embedding
    # With a tied embedding the logits are as large as the embedding's rows are long.
    yield Tensor("token_embd.weight", (vocab, width), model.weights, gain=math.sqrt(width) * (0.3 if model.tied_embedding else 1.0))
    if model.rope_factors:
        yield _vector("rope_factors_long.weight", model.head_size // 2, mean=4.0, gain=0.5)
        yield _vector("rope_factors_short.weight", model.head_size // 2, mean=1.0, gain=0.02)
    for layer in range(model.layers):
        prefix = f"blk.{layer}"
        yield from _norm(model, f"{prefix}.attn_norm", width)
        yield from _latent_attention(model, prefix) if model.attention == "latent" else _grouped_attention(model, prefix)
        yield from _norm(model, f"{prefix}.{model.ffn_norm}", width)
        yield from _expert_block(model, prefix) if layer in model.moe_layers else _feed_forward(model, prefix, "", model.feed_forward)
    yield from _norm(model, "output_norm", width)
    if not model.tied_embedding:
        yield Tensor("output.weight", (vocab, width), model.weights, gain=2.5)
    if model.norm_bias:
        yield _vector("output.bias", vocab)


def _vector(name: str, size: int, *, mean: float = 0.0, gain: float = 0.1) -> Tensor:
    return Tensor(name, (size,), mean=mean, gain=gain, is_vector=True)


def _norm(model: TinyModel, name: str, size: int) -> Iterator[Tensor]:
    yield _vector(f"{name}.weight", size, mean=1.0)
    if model.norm_bias:
        yield _vector(f"{name}.bias", size)


def _grouped_attention(model: TinyModel, prefix: str) -> Iterator[Tensor]:
    width = model.embedding
    sizes = {"q": model.heads * model.head_size, "k": model.kv_heads * model.head_size, "v": model.kv_heads * model.head_size}
    for part, size in sizes.items():
        yield Tensor(f"{prefix}.attn_{part}.weight", (size, width), model.weights, gain=1.5)
        if model.qkv_bias:
            yield _vector(f"{prefix}.attn_{part}.bias", size)
        if model.qk_norm and part != "v":
            yield _vector(f"{prefix}.attn_{part}_norm.weight", size if model.qk_norm == "all" else model.head_size, mean=1.2)
    yield Tensor(f"{prefix}.attn_output.weight", (width, sizes["q"]), model.weights)
    if model.output_bias:
        yield _vector(f"{prefix}.attn_output.bias", width)
    if model.sinks:
        yield _vector(f"{prefix}.attn_sinks.weight", model.heads, gain=1.0)


def _latent_attention(model: TinyModel, prefix: str) -> Iterator[Tensor]:
    """DeepSeek-V2's attention: keys and values of all heads come from one latent vector a token."""
    width, heads, head = model.embedding, model.heads, model.head_size
    yield Tensor(f"{prefix}.attn_q_a.weight", (_LATENT_QUERY_RANK, width), model.weights)
    yield _vector(f"{prefix}.attn_q_a_norm.weight", _LATENT_QUERY_RANK, mean=1.0)
    yield Tensor(f"{prefix}.attn_q_b.weight", (heads * (head + _LATENT_ROPE), _LATENT_QUERY_RANK), model.weights, gain=1.5)
    yield Tensor(f"{prefix}.attn_kv_a_mqa.weight", (_LATENT_RANK + _LATENT_ROPE, width), model.weights, gain=1.5)
    yield _vector(f"{prefix}.attn_kv_a_norm.weight", _LATENT_RANK, mean=1.0)
    yield Tensor(f"{prefix}.attn_k_b.weight", (heads, _LATENT_RANK, head), model.weights)
    yield Tensor(f"{prefix}.attn_v_b.weight", (heads, head, _LATENT_RANK), model.weights)
    yield Tensor(f"{prefix}.attn_output.weight", (width, heads * head), model.weights)


def _feed_forward(model: TinyModel, prefix: str, suffix: str, hidden: int) -> Iterator[Tensor]:
    width = model.embedding
    yield Tensor(f"{prefix}.ffn_gate{suffix}.weight", (hidden, width), model.weights)
    yield Tensor(f"{prefix}.ffn_up{suffix}.weight", (hidden, width), model.weights)
    yield Tensor(f"{prefix}.ffn_down{suffix}.weight", (width, hidden), model.weights, gain=2.0)


def _expert_block(model: TinyModel, prefix: str) -> Iterator[Tensor]:
    width, experts = model.embedding, model.experts
    yield Tensor(f"{prefix}.ffn_gate_inp.weight", (experts, width))
    if model.expert_bias:
        yield _vector(f"{prefix}.ffn_gate_inp.bias", experts)
    if model.selection_bias:
        yield _vector(f"{prefix}.exp_probs_b.bias", experts)
    yield from _experts(model, prefix, "exps", experts, model.expert_feed_forward)
    if model.chunk_experts:
        yield from _experts(model, prefix, "chexps", model.chunk_experts, int(model.metadata["expert_chunk_feed_forward_length"]))
    if model.shared_feed_forward:
        if model.shared_gate:
            yield _vector(f"{prefix}.ffn_gate_inp_shexp.weight", width)
        yield from _feed_forward(model, prefix, "_shexp", model.shared_feed_forward)


def _experts(model: TinyModel, prefix: str, suffix: str, experts: int, hidden: int) -> Iterator[Tensor]:
    width = model.embedding
    rows = {"gate_up": 2 * hidden} if model.merged_gate_up else {"gate": hidden, "up": hidden}
    for part, size in {**rows, "down": width}.items():
        columns, gain = (hidden, 2.0) if part == "down" else (width, 1.0)
        name = f"{prefix}.ffn_{part}_{suffix}"
        yield Tensor(f"{name}.weight", (experts, size, columns), model.expert_weights, gain=gain, experts=True)
        if model.expert_bias:
            yield Tensor(f"{name}.bias", (experts, size), gain=0.1, experts=True, is_vector=True)


def _add_tensors(writer: gguf.GGUFWriter, model: TinyModel, seed: int) -> None:
    generator = np.random.default_rng([seed, zlib.crc32(model.name.encode())])
    loudness = np.array([token.loudness for token in VOCABULARIES[model.vocabulary]], dtype=np.float32)
    for tensor in tensors_of(model):
        scale = tensor.gain if tensor.is_vector else tensor.gain / math.sqrt(tensor.shape[-1])
        values: Floats = generator.standard_normal(tensor.shape, dtype=np.float32) * np.float32(scale) + np.float32(tensor.mean)
        if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and model.tied_embedding):
            values *= loudness[:, None]
        elif tensor.name == "output.bias":
            values *= loudness
        quantization = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)
