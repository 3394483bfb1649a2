"""Informs, does not gate: how long `import llama_moe` takes, against `import llama_cpp`; each in a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import compare

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 15


def import_seconds(module: str) -> float:
    script = f"import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(ran.stdout)


def test_import_against_llama_cpp_python(benchmark: BenchmarkFixture) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make bench` installs it")
    import_seconds("llama_moe")
    import_seconds("llama_cpp")
    ours: list[float] = []
    theirs: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(import_seconds("llama_moe")), setup=lambda: theirs.append(import_seconds("llama_cpp")), rounds=ROUNDS
    )
    compare(benchmark, model=Path("none"), threads=1, unit="s", peer="import llama_cpp", ours=ours, theirs=theirs)
