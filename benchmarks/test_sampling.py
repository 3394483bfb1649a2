"""Informs: what choosing tokens costs next to computing them, with 16 sequences and a vocabulary of 151,936.

The figures are the engine's own: seconds in which it samples and makes text, over seconds in llama.cpp's decode. Prompts are one token, so
that nearly all of the latter generates.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

import llama_moe
from benchmarks.conftest import compare_pairs
from benchmarks.streams import random_prompts
from benchmarks.synthetic_model import synthetic_model_path
from llama_moe import SamplingParams

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

STREAMS = 16
TOKENS = 32
ROUNDS = 3

PARAMS = {
    "greedy": SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0),
    "default": SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=0),
    "penalties": SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=0, repeat_penalty=1.1, frequency_penalty=0.1),
}


@pytest.mark.parametrize("sampling", PARAMS)
def test_sampling_against_decode(benchmark: BenchmarkFixture, threads: int, sampling: str) -> None:
    model = synthetic_model_path()
    seeds = itertools.count()
    with llama_moe.load(model, experts="gpu", devices=[], context_size=256, max_sequences=STREAMS, threads=threads) as llm:

        def seconds() -> tuple[float, float]:
            before = llm.stats()
            llm.generate(random_prompts(STREAMS, 1, vocab_size=llm.model.vocab_size, seed=next(seeds)), PARAMS[sampling])
            after = llm.stats()
            return after["sample_seconds"] - before["sample_seconds"], after["decode_seconds"] - before["decode_seconds"]

        compare_pairs(benchmark, seconds, model=model.name, threads=threads, unit="s", peer="llama.cpp's decode", rounds=ROUNDS)
