"""What comes before and in the first router of a tiny model, in numpy, from the weights in its file.

A sequence of one token attends to itself alone, so its attention gives its own value, whatever the query, the key and the position
(but for attention sinks). The router's input is then a short chain of products, with no word of llama.cpp's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.support.tiny_models import TinyModel

__all__ = ["Routing", "route_first_layer"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Routing:
    """The choices of one layer for one token each."""

    scores: Floats
    """What the experts are chosen by, [n_tokens, experts]; -inf: not to choose from."""
    choices: npt.NDArray[np.int64]
    """[n_tokens, used], the first choice first."""
    weights: Floats
    """What their outputs are multiplied with, [n_tokens, used]."""


class _Weights:
    def __init__(self, path: Path) -> None:
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def __call__(self, name: str) -> Floats:
        tensor = self._tensors[name]
        values: Floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        return values

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


def route_first_layer(path: Path, model: TinyModel, tokens: npt.NDArray[np.int64]) -> Routing:
    """How the model's first layer, which must have experts or be dense with the first one after it, routes each token as a sequence."""
    weights = _Weights(path)
    hidden = weights("token_embd.weight")[tokens] * float(model.metadata.get("embedding_scale", 1.0))
    residual = float(model.metadata.get("residual_scale", 1.0))
    for layer in range(model.dense_layers):
        hidden = hidden + residual * _attention(weights, model, layer, hidden)
        hidden = hidden + residual * _feed_forward(weights, model, layer, _norm(weights, f"blk.{layer}.{model.ffn_norm}", hidden))
    layer = model.dense_layers
    hidden = hidden + residual * _attention(weights, model, layer, hidden)
    return _route(weights, model, layer, _norm(weights, f"blk.{layer}.{model.ffn_norm}", hidden))


def _norm(weights: _Weights, name: str, values: Floats) -> Floats:
    normed: Floats = values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + 1e-6) * weights(f"{name}.weight")
    return normed + weights(f"{name}.bias") if f"{name}.bias" in weights else normed


def _linear(weights: _Weights, name: str, values: Floats) -> Floats:
    product: Floats = values @ weights(f"{name}.weight").T
    return product + weights(f"{name}.bias") if f"{name}.bias" in weights else product


def _attention(weights: _Weights, model: TinyModel, layer: int, hidden: Floats) -> Floats:
    prefix = f"blk.{layer}"
    normed = _norm(weights, f"{prefix}.attn_norm", hidden)
    if model.attention == "latent":
        latent = _linear(weights, f"{prefix}.attn_kv_a_mqa", normed)[:, : weights(f"{prefix}.attn_kv_a_norm.weight").size]
        latent = _norm(weights, f"{prefix}.attn_kv_a_norm", latent)
        heads = np.einsum("tr,hvr->thv", latent, weights(f"{prefix}.attn_v_b.weight")).reshape(len(hidden), -1)
    else:
        value = _linear(weights, f"{prefix}.attn_v", normed).reshape(len(hidden), model.kv_heads, model.head_size)
        value = np.repeat(value, model.heads // model.kv_heads, axis=1)
        if model.sinks:  # they take a share of the attention; position 0 is not rotated
            query = _linear(weights, f"{prefix}.attn_q", normed).reshape(len(hidden), model.heads, model.head_size)
            key = _linear(weights, f"{prefix}.attn_k", normed).reshape(len(hidden), model.kv_heads, model.head_size)
            score = (query * np.repeat(key, model.heads // model.kv_heads, axis=1)).sum(axis=-1) / np.sqrt(model.head_size)
            value = value / (1 + np.exp(weights(f"{prefix}.attn_sinks.weight") - score))[:, :, None]
        heads = value.reshape(len(hidden), -1)
    return _linear(weights, f"{prefix}.attn_output", heads)


def _feed_forward(weights: _Weights, model: TinyModel, layer: int, values: Floats) -> Floats:
    gate = _linear(weights, f"blk.{layer}.ffn_gate", values)
    return _linear(weights, f"blk.{layer}.ffn_down", gate / (1 + np.exp(-gate)) * _linear(weights, f"blk.{layer}.ffn_up", values))


def _softmax(values: Floats) -> Floats:
    powers: Floats = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _route(weights: _Weights, model: TinyModel, layer: int, values: Floats) -> Routing:
    """The router of each architecture as its authors describe it."""
    logits = _linear(weights, f"blk.{layer}.ffn_gate_inp", values)
    sigmoid = model.metadata.get("expert_gating_func") == 2
    probabilities = 1 / (1 + np.exp(-logits)) if sigmoid else _softmax(logits)
    scores = probabilities.copy()
    if model.selection_bias:
        scores += weights(f"blk.{layer}.exp_probs_b.bias")
    groups = int(model.metadata.get("expert_group_count", 1))
    if groups > 1:
        # DeepSeek-V3: the groups whose best two experts are best.
        grouped = scores.reshape(len(scores), groups, -1)
        of_group = np.sort(grouped, axis=-1)[:, :, -2:].sum(axis=-1)
        kept = np.argsort(-of_group, axis=-1)[:, : int(model.metadata["expert_group_used_count"])]
        open_groups = np.zeros_like(of_group, dtype=bool)
        np.put_along_axis(open_groups, kept, True, axis=-1)
        scores = np.where(open_groups[:, :, None], grouped, -np.inf).reshape(scores.shape)
    choices = np.argsort(-scores, axis=-1)[:, : model.experts_used]
    chosen = np.take_along_axis(probabilities, choices, axis=-1)
    if model.architecture == "gpt-oss":  # a softmax over the chosen ones only
        chosen = _softmax(np.take_along_axis(logits, choices, axis=-1))
    elif model.architecture in ("qwen3moe", "llama", "granitemoe", "phimoe", "grovemoe") or model.metadata.get("expert_weights_norm"):
        chosen = chosen / chosen.sum(axis=-1, keepdims=True)
    return Routing(scores, choices, chosen * float(model.metadata.get("expert_weights_scale", 1.0)))
