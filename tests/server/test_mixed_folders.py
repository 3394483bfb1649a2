"""One placement for all models of a folder: of each model it asks what that has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_moe import Device, ExpertPlacement, Model
from llama_moe.errors import PlacementError
from llama_moe.server import ServerSettings
from llama_moe.server.pool import ModelPool
from tests.support.tiny_models import DENSE, MODELS

NAMES = ["llama", "qwen3moe", "deepseek2", DENSE]  # of 3, 4 and 3 layers, the first one of the last without experts; and without any


@pytest.fixture
def settings(tiny_model: Callable[[str], Path], accelerator: Device) -> Callable[[ExpertPlacement], ServerSettings]:
    folders = {tiny_model(name).parent for name in NAMES}
    return lambda experts: ServerSettings(
        model_dirs=list(folders), experts=experts, devices=[accelerator], context_size=256, parallel=1, threads=1, repack=False
    )


def layers_in_host_memory(settings: ServerSettings) -> dict[str, set[int]]:
    """By the name of each model; those whose experts are there."""

    async def main() -> dict[str, set[int]]:
        pool = ModelPool(settings)
        await pool.start()
        try:
            found = {}
            for name in NAMES:
                async with pool.use(name) as served:
                    experts = [tensor for tensor in served.model.placement if tensor.role == "experts"]
                    assert bool(experts) == (name != DENSE)
                    found[name] = {int(tensor.name.split(".")[1]) for tensor in experts if tensor.device == "CPU"}
            return found
        finally:
            await pool.close()

    return asyncio.run(main())


@pytest.mark.parametrize("count", [0, 1, 2, 4, 99])
def test_the_first_layers_of_each_model(settings: Callable[[ExpertPlacement], ServerSettings], count: int) -> None:
    found = layers_in_host_memory(settings(ExpertPlacement.cpu_first(count)))
    assert found == {name: {layer for layer in MODELS[name].moe_layers if layer < count} for name in NAMES}


def test_all_layers_of_each_model(settings: Callable[[ExpertPlacement], ServerSettings]) -> None:
    found = layers_in_host_memory(settings(ExpertPlacement.cpu()))
    assert found == {name: set(MODELS[name].moe_layers) for name in NAMES}


def test_elsewhere_a_placement_must_be_of_the_model(tiny_model: Callable[[str], Path], accelerator: Device) -> None:
    for name, count in (("llama", 4), ("deepseek2", 1), (DENSE, 1)):
        with pytest.raises(PlacementError):
            Model(tiny_model(name), experts=ExpertPlacement.cpu_first(count), devices=[accelerator])
