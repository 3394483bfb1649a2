"""A Vulkan device for tests: a GPU, or Mesa's lavapipe, which computes on the CPU. `make test-vulkan` builds for it and runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama_moe
from llama_moe import Device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vulkan)


@pytest.fixture(scope="session")
def vulkan() -> Device:
    """The first Vulkan device."""
    if "Vulkan" not in str(llama_moe.build_info()["backends"]):
        pytest.skip("llama_moe was built without Vulkan: make test-vulkan builds it and runs this")
    found = [device for device in llama_moe.devices() if device.backend == "Vulkan"]
    if not found:
        pytest.skip("there is no Vulkan device: install a driver, such as Debian's mesa-vulkan-drivers")
    return found[0]
