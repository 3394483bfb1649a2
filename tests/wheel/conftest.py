"""Tests of an installed wheel. `make test-wheel` installs one away from the tree and runs them there."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama_moe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in own:
        item.add_marker(pytest.mark.wheel)
    if own and llama_moe.build_info()["linkage"] != "dynamic":
        skip = pytest.mark.skip(reason="llama_moe is not installed from a wheel: make test-wheel does that and runs this")
        for item in own:
            item.add_marker(skip)
