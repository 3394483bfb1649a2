"""Placements on a real accelerator of this process, with pinned host memory and buffers of its own: a Vulkan device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llama_moe
from llama_moe import Device, Engine, ExpertPlacement, Model, SamplingParams

if TYPE_CHECKING:
    from llama_moe.model import HostMemory

PROMPT = "The capital of France is"
GREEDY = SamplingParams(max_tokens=24, temperature=0)
LAYERS = 30
# Experts' layers in host memory.
PLACEMENTS = {
    "all experts on the CPU": (ExpertPlacement.cpu(), LAYERS),
    "ten layers' experts on the CPU": (ExpertPlacement.cpu_first(10), 10),
    "all on the device": (ExpertPlacement.gpu(), 0),
}


@pytest.fixture(scope="module")
def dense_text(vulkan: Device, dense_path: Path) -> str:
    """What the dense model that the demo model was made from generates there; a GPU's last digits are not those of the CPU."""
    with Model(dense_path, devices=vulkan) as model, Engine(model, context_size=256) as engine:
        text = engine.generate(PROMPT, GREEDY).text
    assert text.startswith(" Paris.")
    return text


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_text_is_the_same_and_the_bytes_are_where_the_placement_says(
    name: str, vulkan: Device, demo_path: Path, dense_text: str
) -> None:
    policy, host_layers = PLACEMENTS[name]
    with (
        Model(demo_path, experts=policy, devices=vulkan, host_memory="pageable", repack=False) as model,
        Engine(model, context_size=256) as engine,
    ):
        assert engine.generate(PROMPT, GREEDY).text == dense_text
        sizes = {(row.device, row.role): row.bytes for row in engine.memory().rows}
        experts = [tensor for tensor in model.placement if tensor.role == "experts"]
        layer = sum(tensor.bytes for tensor in experts if tensor.name.startswith("blk.0."))
        assert sum(tensor.bytes for tensor in experts) == LAYERS * layer
        assert sizes.get(("CPU", "experts"), 0) == host_layers * layer
        assert sizes.get((vulkan.name, "experts"), 0) == (LAYERS - host_layers) * layer
        for device in ("CPU", vulkan.name):
            placed = sum(tensor.bytes for tensor in model.placement if tensor.device == device)
            assert sizes.get((device, "experts"), 0) + sizes.get((device, "weights"), 0) == placed
        assert sizes[vulkan.name, "kv_cache"] > 0
        assert sizes[vulkan.name, "compute"] > 0


def test_the_devices_memory_shrinks_by_what_is_placed_on_it(vulkan: Device, demo_path: Path) -> None:
    placed = {}
    for experts in ("gpu", "cpu"):
        with Model(demo_path, experts=experts, devices=vulkan) as model:
            placed[experts] = model.memory().by_device()[vulkan.name]
            assert model.placement.by_role()["experts"] > 0
    assert placed["gpu"] - placed["cpu"] == sum(tensor.bytes for tensor in model.placement if tensor.role == "experts")


def test_pinned_host_memory_is_memory_of_the_host(vulkan: Device, demo_path: Path, dense_text: str) -> None:
    with (
        Model(demo_path, experts="cpu", devices=vulkan, host_memory="pinned", repack=False) as model,
        Engine(model, context_size=256) as engine,
    ):
        assert engine.generate(PROMPT, GREEDY).text == dense_text
        report = engine.memory()
        assert set(report.by_device()) == {"CPU", vulkan.name}
        experts = sum(tensor.bytes for tensor in model.placement if tensor.role == "experts")
        assert {(row.device, row.bytes) for row in report.rows if row.role == "experts"} == {("CPU", experts)}


@pytest.mark.parametrize("host_memory", ["mmap", "pageable", "pinned"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_plan_is_what_the_engine_then_reports(name: str, host_memory: HostMemory, vulkan: Device, demo_path: Path) -> None:
    policy, _ = PLACEMENTS[name]
    plan = llama_moe.plan(demo_path, experts=policy, devices=vulkan, host_memory=host_memory, context_size=1024)
    with llama_moe.load(demo_path, experts=policy, devices=vulkan, host_memory=host_memory, context_size=1024) as engine:
        reported = {(row.device, row.role): row.bytes for row in engine.memory().rows}
    planned = {(row.device, row.role): row.bytes for row in plan.rows}
    assert planned.keys() == reported.keys()
    for key, size in planned.items():
        assert size == pytest.approx(reported[key], rel=0.02), key
