"""The models that other tests run are what their descriptions say."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.tiny_models import ARCHITECTURES, DENSE, MODELS, write_tiny_model

EXPERT = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")


def test_every_architecture_of_interest_has_a_model() -> None:
    architectures = {MODELS[name].architecture for name in ARCHITECTURES}
    assert architectures >= {
        "deepseek",
        "deepseek2",
        "phimoe",
        "qwen2moe",
        "qwen3moe",
        "llama",
        "olmoe",
        "granitemoe",
        "gpt-oss",
        "grovemoe",
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_small_and_the_same_for_the_same_seed(name: str, tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "first.gguf", name)
    assert first.stat().st_size < 2_000_000
    assert write_tiny_model(tmp_path / "again.gguf", name).read_bytes() == first.read_bytes()
    assert write_tiny_model(tmp_path / "other.gguf", name, seed=1).read_bytes() != first.read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_what_the_description_says(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    reader = gguf.GGUFReader(write_tiny_model(tmp_path / "model.gguf", name))

    def value(key: str) -> object:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    assert value("general.architecture") == model.architecture
    assert value(f"{model.architecture}.block_count") == model.layers
    assert (value(f"{model.architecture}.expert_count") or 0) == model.experts
    assert (value(f"{model.architecture}.expert_used_count") or 0) == model.experts_used
    tokens = value("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert len(tokens) == len(set(tokens)) == model.vocab_size
    experts = [tensor.name for tensor in reader.tensors if EXPERT.search(tensor.name)]
    assert tuple(experts) == model.expert_tensors
    assert {int(name.split(".")[1]) for name in experts} == set(model.moe_layers)
    for tensor in reader.tensors:
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all(), tensor.name


def test_the_models_differ_where_placement_has_to_tell_tensors_apart() -> None:
    assert any("gate_up_exps" in tensor for tensor in MODELS["deepseek2-merged"].expert_tensors)
    assert any("_chexps" in tensor for tensor in MODELS["grovemoe"].expert_tensors)
    assert any(tensor.endswith("exps.bias") for tensor in MODELS["gpt-oss"].expert_tensors)
    assert MODELS["deepseek"].moe_layers == (1, 2)
    assert MODELS[DENSE].expert_tensors == ()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gpt-9"):
        write_tiny_model(tmp_path / "model.gguf", "gpt-9")
    assert list(tmp_path.iterdir()) == []
