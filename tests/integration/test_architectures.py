"""Every Mixture-of-Experts architecture computes the same wherever its experts are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from llama_moe import Context, Device, Engine, ExpertPlacement, Model, Placement, SamplingParams
from llama_moe.errors import PlacementError
from llama_moe.model import resolve_placement
from tests.support.tiny_models import ARCHITECTURES, MODELS, TinyModel

if TYPE_CHECKING:
    from llama_moe.model import ExpertKernels

PROMPT = "The experts of the router, and those of the attention"
GREEDY = SamplingParams(max_tokens=24, temperature=0)
# Of logits as large as 10; float32 keeps six or seven digits.
TOLERANCE = 1e-4

Floats = npt.NDArray[np.float32]


def first_moe_layers(spec: TinyModel) -> ExpertPlacement:
    """The fewest leading layers that have any experts."""
    return ExpertPlacement.cpu_first(spec.dense_layers + 1)


def regex_of_last_layer(spec: TinyModel) -> ExpertPlacement:
    return ExpertPlacement.match(rf"blk\.{spec.layers - 1}\.ffn_(gate|gate_up|down)_(ch)?exps")


PLACEMENTS: dict[str, Callable[[TinyModel], ExpertPlacement]] = {
    "gpu": lambda _: ExpertPlacement.gpu(),
    "cpu": lambda _: ExpertPlacement.cpu(),
    "cpu_first": first_moe_layers,
    "match": regex_of_last_layer,
}


@dataclass(frozen=True)
class Outcome:
    placement: Placement
    prompt_logits: Floats  # of every prompt token, computed together
    step_logits: Floats  # of tokens computed one by one
    tokens: tuple[int, ...]


def compute(
    path: Path, experts: ExpertPlacement, *, devices: list[str] | None, repack: bool, expert_kernels: ExpertKernels = "auto"
) -> Outcome:
    with Model(path, experts=experts, devices=devices, repack=repack, expert_kernels=expert_kernels) as model:
        with Engine(model, context_size=256, threads=1) as engine:
            tokens = engine.generate(PROMPT, GREEDY).tokens
        with Context(model, context_size=256, threads=1) as context:
            prompt = context.decode(model.tokenize(PROMPT), outputs="all")
            # The same tokens whatever the placement, so that the first difference is seen for what it is.
            steps = np.concatenate([context.decode([token]) for token in range(40, 52)])
        return Outcome(model.placement, prompt, steps, tokens)


@pytest.fixture(scope="module")
def on_the_cpu(tiny_model: Callable[[str], Path]) -> Callable[[str], Outcome]:
    """What the CPU alone computes, without a device or a placement."""
    return functools.cache(lambda name: compute(tiny_model(name), ExpertPlacement.gpu(), devices=[], repack=False))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_what_its_file_says(name: str, tiny_model: Callable[[str], Path]) -> None:
    spec = MODELS[name]
    with Model(tiny_model(name), experts="gpu", devices=[]) as model:
        assert model.architecture == spec.architecture
        assert model.layer_count == spec.layers
        assert (model.expert_count, model.experts_used) == (spec.experts, spec.experts_used)
        assert (model.vocab_size, model.embedding_length) == (spec.vocab_size, spec.embedding)
        assert model.context_length == spec.context_length
        assert model.metadata[f"{spec.architecture}.expert_count"] == spec.experts
        assert model.detokenize(model.tokenize(PROMPT, add_special=False)).strip() == PROMPT


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_computes_the_same_under_every_placement(
    name: str, placement: str, tiny_model: Callable[[str], Path], on_the_cpu: Callable[[str], Outcome], accelerator: Device
) -> None:
    path, experts = tiny_model(name), PLACEMENTS[placement](MODELS[name])
    resolved = resolve_placement(path, experts=experts, devices=accelerator)
    # Repacked weights are multiplied by other kernels, which round differently: see the next test.
    placed, reference = compute(path, experts, devices=[accelerator.name], repack=False), on_the_cpu(name)
    assert placed.placement == resolved
    assert set(resolved.by_device()) == {"CPU", accelerator.name}
    assert placed.tokens == reference.tokens
    assert len(placed.tokens) == GREEDY.max_tokens
    np.testing.assert_allclose(placed.prompt_logits, reference.prompt_logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(placed.step_logits, reference.step_logits, rtol=0, atol=TOLERANCE)


# Of most tokens: for some, a different rounding can choose another expert. ggml's kernels round activations alike in all layouts; ours keep
# the scale of a block in 32 bits, ggml's in 16.
@pytest.mark.parametrize(("expert_kernels", "most"), [("ggml", 0.05), ("llama_moe", 0.2)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rearranged_experts_compute_the_same_but_for_rounding(
    name: str, expert_kernels: ExpertKernels, most: float, tiny_model: Callable[[str], Path], accelerator: Device
) -> None:
    outcomes = [
        compute(tiny_model(name), placement(MODELS[name]), devices=[accelerator.name], repack=True, expert_kernels=expert_kernels)
        for placement in PLACEMENTS.values()
    ]
    for outcome in outcomes[1:]:
        difference = np.abs(outcome.prompt_logits - outcomes[0].prompt_logits).max(axis=1)
        assert np.median(difference) < most


@pytest.mark.parametrize("expert_kernels", ["ggml", "llama_moe"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cpu_alone_can_rearrange_and_compute_it(name: str, expert_kernels: ExpertKernels, tiny_model: Callable[[str], Path]) -> None:
    # Not compared: a different rounding can choose other experts, and the weights of these models are random.
    outcome = compute(tiny_model(name), ExpertPlacement.gpu(), devices=[], repack=True, expert_kernels=expert_kernels)
    assert np.isfinite(outcome.prompt_logits).all()
    assert len(outcome.tokens) == GREEDY.max_tokens


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if MODELS[name].dense_layers])
def test_leading_layers_without_experts_are_not_matched(name: str, tiny_model: Callable[[str], Path], accelerator: Device) -> None:
    with pytest.raises(PlacementError, match=r"no tensor matches .*; the model has blocks 0-2, with experts in 1-2"):
        Model(tiny_model(name), experts=ExpertPlacement.cpu_first(1), devices=accelerator)
