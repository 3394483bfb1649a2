"""Predicted against measured decode speed: tokens per second of one stream, 128 of them after a one-token prompt, all on the CPU.

Each prediction is made before the run that it is compared with, from a plan and from rates measured in this run, none of which is of the
model. The ratio is the predicted speed over the measured one; the target is that neither is more than 25 % above the other. What moe-fit
says of the same files is noted with it.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import llama_moe
from benchmarks.conftest import compare_pairs
from benchmarks.peers.moe_fit import moe_fit_estimate
from benchmarks.synthetic_model import synthetic_model_path
from llama_moe import SamplingParams
from llama_moe.bandwidth import bandwidths
from llama_moe.demo_model import demo_model_path, dense_model_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

    from llama_moe import Engine
    from llama_moe.prediction import Prediction

TOKENS = 128
MOST_OFF = 1.25

MODELS: dict[str, Callable[[], Path]] = {
    "demo": demo_model_path,  # Q4_1 and Q8_0, 30 thin layers, 8 experts
    "dense": dense_model_path,  # the same without experts
    "synthetic": synthetic_model_path,  # Q4_K and Q6_K, 8 wide layers, 64 experts
}


def predict(path: Path, threads: int) -> Prediction:
    """Predicts with freshly measured rates."""
    plan = llama_moe.plan(path, experts="gpu", devices=[], context_size=4096)
    rates = bandwidths(plan.info, devices=[], threads=threads, measure_again=True)
    return plan.predict(context_used=TOKENS // 2, bandwidths=rates)  # that many on average


def stream_rate(llm: Engine) -> float:
    times = [time.perf_counter() for _ in llm.stream([0], SamplingParams(max_tokens=TOKENS + 1, temperature=0, ignore_eos=True))]
    assert len(times) == TOKENS + 1
    return TOKENS / (times[-1] - times[0])


@pytest.mark.parametrize("name", MODELS)
def test_predicted_against_measured_decode(
    benchmark: BenchmarkFixture, name: str, threads: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = MODELS[name]()
    with llama_moe.load(path, experts="gpu", devices=[], context_size=4096, threads=threads) as llm:
        llm.generate([0], SamplingParams(max_tokens=4))  # what the first graph costs is not what is predicted
        predictions: list[Prediction] = []

        def pair() -> tuple[float, float]:
            predictions.append(predict(path, threads))
            return predictions[-1].decode_tokens_per_second, stream_rate(llm)

        compare_pairs(benchmark, pair, model=path.name, threads=threads, unit="tokens/s", peer="the measured speed")
    extra = benchmark.extra_info
    off = max(extra["ratio"], 1 / extra["ratio"])
    estimate = moe_fit_estimate(path, tmp_path_factory.getbasetemp() / "moe-fit")
    extra["off"], extra["moe-fit"] = off, estimate
    extra["predicted_seconds"] = {part: round(seconds, 6) for part, seconds in predictions[-1].seconds["CPU"].items()}
    extra["spread_of_predictions"] = statistics.pstdev(each.decode_tokens_per_second for each in predictions)
    extra["note"] = f"off by {off - 1:.0%}, target {MOST_OFF - 1:.0%} {'met' if off <= MOST_OFF else 'MISSED'}; moe-fit: {estimate}"
