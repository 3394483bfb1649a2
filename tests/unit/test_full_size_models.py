"""The models of full size have the sizes of the real ones, and take no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_moe import inspect
from tests.support.full_size_models import FULL_SIZE_MODELS, write_full_size_model

# Billions of parameters as their makers count them, which leaves out that some biases and factors are counted here.
PARAMETERS = {"DeepSeek-MoE-16B": 16.4, "Phi-3.5-MoE": 41.9, "Qwen3-30B-A3B": 30.5}


@pytest.mark.parametrize("name", FULL_SIZE_MODELS)
@pytest.mark.parametrize("quantization", ["F16", "Q4_K_M", "Q2_K", "Q8_0"])
def test_a_model_has_the_size_of_the_real_one_and_takes_no_room(name: str, quantization: str, tmp_path: Path) -> None:
    path = write_full_size_model(tmp_path / "model.gguf", name, quantization)
    info = inspect(path)
    assert round(info.parameter_count / 1e9, 1) == PARAMETERS[name]
    assert path.stat().st_size > info.size_bytes
    assert path.stat().st_blocks * 512 < 16 << 20
    model = FULL_SIZE_MODELS[name]
    assert (info.layer_count, info.expert_count, info.experts_used) == (model.layers, model.experts, model.experts_used)
    experts = [tensor for tensor in info.tensors if tensor.role == "experts"]
    assert {tensor.layer for tensor in experts} == set(model.moe_layers)
    assert {tensor.shape for tensor in experts if "down" in tensor.name} == {(model.expert_feed_forward, model.embedding, model.experts)}


def test_qwen3_has_the_sizes_of_its_published_files(tmp_path: Path) -> None:
    for quantization, gigabytes in (("Q4_K_M", 18.6), ("Q2_K", 11.3), ("Q8_0", 32.5)):
        path = write_full_size_model(tmp_path / "model.gguf", "Qwen3-30B-A3B", quantization)
        assert path.stat().st_size / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("DeepSeek-MoE-16B", {"Q4_K", "Q5_0", "Q8_0"}),  # rows of 1408 have no blocks of 256
        ("Phi-3.5-MoE", {"Q4_K", "Q6_K"}),
        ("Qwen3-30B-A3B", {"Q4_K", "Q6_K"}),
    ],
)
def test_experts_have_the_types_of_the_quantizer(name: str, types: set[str], tmp_path: Path) -> None:
    info = inspect(write_full_size_model(tmp_path / "model.gguf", name, "Q4_K_M"))
    assert {tensor.type for tensor in info.tensors if tensor.role == "experts"} == types
