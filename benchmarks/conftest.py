"""What the benchmarks share: models, threads and the record of a comparison."""

from __future__ import annotations

import platform
import statistics
from typing import TYPE_CHECKING

import pytest

import llama_moe
from benchmarks.synthetic_model import synthetic_model_path
from llama_moe.demo_model import demo_model_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 5


@pytest.fixture(scope="session")
def threads() -> int:
    """CPU threads, the same for us and for every peer."""
    with llama_moe.load(demo_model_path()) as llm:
        return llm.threads


@pytest.fixture(scope="session", params=["demo", "synthetic"])
def model(request: pytest.FixtureRequest) -> Path:
    """The demo model (135M, 8 experts) and a 1.9 GB model of qwen3moe's shape."""
    return demo_model_path() if request.param == "demo" else synthetic_model_path()


def compare(
    benchmark: BenchmarkFixture,
    ours: Callable[[], float],
    theirs: Callable[[], float],
    *,
    model: str,
    threads: int,
    unit: str,
    peer: str,
    rounds: int = ROUNDS,
) -> None:
    """Measures the peer and us in turn, and puts the medians and their ratio, ours over the peer's, into the benchmark's record.

    Args:
        benchmark: the fixture; its own times are those of `ours` as a whole.
        ours: measures us once and returns the figure, in `unit`.
        theirs: the same for the peer.
        model: the model's name.
        threads: CPU threads of both.
        unit: of the figures.
        peer: the peer's name.
        rounds: pairs of measurements.
    """
    figures: list[float] = []
    peer_figures: list[float] = []
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: figures.append(ours()), setup=lambda: peer_figures.append(theirs()), rounds=rounds
    )
    info = llama_moe.build_info()
    benchmark.extra_info.update(
        {
            "model": model,
            "threads": threads,
            "peer": peer,
            "unit": unit,
            "ours": statistics.median(figures),
            "theirs": statistics.median(peer_figures),
            "ratio": statistics.median(figures) / statistics.median(peer_figures),
            "pair_ratios": [round(a / b, 4) for a, b in zip(figures, peer_figures, strict=True)],
            "llama_moe": info["version"],
            "llama.cpp": info["llama_cpp_commit"],
            "compiler": info["compiler"],
            "cpu": platform.processor() or platform.machine(),
            "cpu_features": info["cpu_features"],
        }
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the comparisons, which pytest-benchmark keeps in its JSON only."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [] if session is None else [bench for bench in session.benchmarks if "ratio" in bench.extra_info]
    if not benchmarks:
        return
    terminalreporter.section("ratios to the peers")
    for bench in benchmarks:
        info = bench.extra_info
        pairs = sorted(info["pair_ratios"])
        terminalreporter.write_line(
            f"{bench.name}: {info['ratio']:.3f} ({info['ours']:.4g} against {info['theirs']:.4g} {info['unit']} of {info['peer']}; "
            f"pairs {pairs[0]:.3f} to {pairs[-1]:.3f}; {info['model']}, {info['threads']} threads)"
        )
