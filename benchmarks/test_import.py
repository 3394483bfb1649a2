"""Informs, does not gate: how long `import llama_moe` takes, against `import llama_cpp`; each in a new interpreter."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.conftest import compare

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def import_seconds(module: str) -> float:
    script = f"import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(ran.stdout)


def test_import_against_llama_cpp_python(benchmark: BenchmarkFixture) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make bench` installs it")
    import_seconds("llama_moe")
    import_seconds("llama_cpp")
    compare(
        benchmark,
        lambda: import_seconds("llama_moe"),
        lambda: import_seconds("llama_cpp"),
        model="no model",
        threads=1,
        unit="s",
        peer="import llama_cpp",
        rounds=15,
    )
