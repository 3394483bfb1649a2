"""What the benchmarks share: models, threads and the record of a comparison."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

import llama_moe
from benchmarks.synthetic_model import synthetic_model_path
from llama_moe.demo_model import demo_model_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
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
    target: str = "",
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
        target: what the ratio should be, for those that gate: ">= 0.97" or "<= 1.5".
    """
    figures: list[float] = []
    peer_figures: list[float] = []
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        lambda: figures.append(ours()), setup=lambda: peer_figures.append(theirs()), rounds=rounds
    )
    _record(benchmark, figures, model=model, threads=threads, unit=unit, target=target)
    _record_ratio(benchmark, figures, peer_figures, peer)


def compare_pairs(
    benchmark: BenchmarkFixture,
    measure: Callable[[], tuple[float, float]],
    *,
    model: str,
    threads: int,
    unit: str,
    peer: str,
    rounds: int = ROUNDS,
    target: str = "",
) -> None:
    """As `compare()`, for two figures that come of one measurement: `measure` returns ours and what it is compared with."""
    pairs: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: pairs.append(measure()), rounds=rounds)  # type: ignore[no-untyped-call]
    figures, others = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    _record(benchmark, figures, model=model, threads=threads, unit=unit, target=target)
    _record_ratio(benchmark, figures, others, peer)


def measure_alone(
    benchmark: BenchmarkFixture,
    measure: Callable[[], float],
    *,
    model: str,
    threads: int,
    unit: str,
    rounds: int = ROUNDS,
    target: str = "",
) -> None:
    """Puts the median of what `measure` returns, which has no peer, into the benchmark's record; the target is of the figure."""
    figures: list[float] = []
    benchmark.pedantic(lambda: figures.append(measure()), rounds=rounds)  # type: ignore[no-untyped-call]
    _record(benchmark, figures, model=model, threads=threads, unit=unit, target=target)


@dataclass
class BestModes:
    """A figure of ours, and the same of peers that have modes: each peer counts with the mode that is best by the median of all rounds.

    Attributes:
        name: of the figure.
        unit: of the figures.
        ours: a figure for each round.
        peers: for each peer and each of its modes the same.
        targets: for each peer what the ratio should be, ours over the peer's.
        lower_is_better: it is a time or a size.
        notes: what else there is to say, for people.
    """

    name: str
    unit: str
    ours: list[float] = field(default_factory=list)
    peers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    lower_is_better: bool = False
    notes: list[str] = field(default_factory=list)

    def add(self, peer: str, mode: str, figure: float) -> None:
        """Adds what a peer reached in a round."""
        self.peers.setdefault(peer, {}).setdefault(mode, []).append(figure)

    def best_mode(self, peer: str) -> str:
        """The peer's better mode."""
        modes = self.peers[peer]
        return (min if self.lower_is_better else max)(modes, key=lambda mode: statistics.median(modes[mode]))

    def to_dict(self) -> dict[str, Any]:
        """For the benchmark's record."""
        ours = statistics.median(self.ours)
        against = {}
        for peer, modes in self.peers.items():
            mode = self.best_mode(peer)
            theirs = statistics.median(modes[mode])
            pairs = [round(a / b, 4) for a, b in zip(self.ours, modes[mode], strict=True)]
            target = self.targets.get(peer, "")
            against[peer] = {"mode": mode, "theirs": theirs, "ratio": ours / theirs, "pair_ratios": pairs, "target": target, "modes": modes}
        return {"name": self.name, "unit": self.unit, "ours": ours, "figures": self.ours, "against": against, "notes": self.notes}


def record_best_modes(benchmark: BenchmarkFixture, figures: Sequence[BestModes], *, model: str, threads: int) -> None:
    """Puts figures that were measured together into the benchmark's record."""
    benchmark.extra_info.update({**_about(model, threads), "best_modes": [figure.to_dict() for figure in figures]})


def _record(benchmark: BenchmarkFixture, figures: list[float], *, model: str, threads: int, unit: str, target: str) -> None:
    ours = {"unit": unit, "target": target, "ours": statistics.median(figures), "figures": figures}
    benchmark.extra_info.update({**_about(model, threads), **ours})


def _about(model: str, threads: int) -> dict[str, Any]:
    """What figures are of."""
    info = llama_moe.build_info()
    return {
        "model": model,
        "threads": threads,
        "llama_moe": info["version"],
        "llama.cpp": info["llama_cpp_commit"],
        "compiler": info["compiler"],
        "cpu": platform.processor() or platform.machine(),
        "cpu_features": info["cpu_features"],
    }


def _record_ratio(benchmark: BenchmarkFixture, figures: list[float], peer_figures: list[float], peer: str) -> None:
    benchmark.extra_info.update(
        {
            "peer": peer,
            "theirs": statistics.median(peer_figures),
            "ratio": statistics.median(figures) / statistics.median(peer_figures),
            "pair_ratios": [round(a / b, 4) for a, b in zip(figures, peer_figures, strict=True)],
        }
    )


def _verdict(info: dict[str, Any]) -> str:
    return _judged(info.get("ratio", info["ours"]), info["target"])


def _judged(reached: float, target: str) -> str:
    if not target:
        return "informs"
    sign, bound = target.split()
    met = reached >= float(bound) if sign == ">=" else reached <= float(bound)
    return f"target {target} {'met' if met else 'MISSED'}"


def _best_modes_lines(info: dict[str, Any]) -> Iterator[str]:
    for figure in info["best_modes"]:
        unit = figure["unit"]
        spread = f"{min(figure['figures']):.4g} to {max(figure['figures']):.4g}"
        yield f"  {figure['name']}: {figure['ours']:.4g} {unit} ({spread}){''.join(f'; {note}' for note in figure['notes'])}"
        for peer, than in figure["against"].items():
            modes = ", ".join(f"{mode} {statistics.median(figures):.4g}" for mode, figures in than["modes"].items())
            pairs = f"pairs {min(than['pair_ratios']):.3f} to {max(than['pair_ratios']):.3f}"
            yield f"    {than['ratio']:.3f} of {peer} ({modes} {unit}; {pairs}): {_judged(than['ratio'], than['target'])}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the figures, which pytest-benchmark keeps in its JSON only."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [] if session is None else [bench for bench in session.benchmarks if {"ours", "best_modes"} & set(bench.extra_info)]
    if not benchmarks:
        return
    terminalreporter.section("what was measured")
    for bench in benchmarks:
        info = bench.extra_info
        if "best_modes" in info:
            terminalreporter.write_line(f"{bench.name} ({info['model']}, {info['threads']} threads):")
            for line in _best_modes_lines(info):
                terminalreporter.write_line(line)
            continue
        if "ratio" in info:
            pairs = sorted(info["pair_ratios"])
            figure = f"{info['ratio']:.3f} ({info['ours']:.4g} against {info['theirs']:.4g} {info['unit']} of {info['peer']}; "
            figure += f"pairs {pairs[0]:.3f} to {pairs[-1]:.3f}"
        else:
            figures = sorted(info["figures"])
            figure = f"{info['ours']:.4g} {info['unit']} ({figures[0]:.4g} to {figures[-1]:.4g}"
        note = f"; {info['note']}" if "note" in info else ""
        terminalreporter.write_line(f"{bench.name}: {figure}; {info['model']}, {info['threads']} threads): {_verdict(info)}{note}")
