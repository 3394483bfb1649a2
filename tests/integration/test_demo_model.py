"""The demo model writes what the dense model it was made from writes, wherever its experts are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llama_moe import Context, Device, Engine, ExpertPlacement, Model, SamplingParams

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
)
TOKENS = 64


def greedy_texts(model: Model) -> list[str]:
    """The continuation of each prompt, all of them step by step together: so that every model computes the same batches."""
    prompts = [model.tokenize(prompt, parse_special=True) for prompt in PROMPTS]
    sequences = range(len(prompts))
    with Context(model, context_size=256, max_sequences=len(prompts), threads=1) as context:
        chosen = [np.concatenate([context.decode(prompt, sequence_ids=sequence) for sequence, prompt in enumerate(prompts)]).argmax(axis=1)]
        while len(chosen) < TOKENS:
            chosen.append(context.decode(chosen[-1], sequence_ids=sequences).argmax(axis=1))
    return [model.detokenize([int(step[sequence]) for step in chosen], special=True) for sequence in sequences]


@pytest.fixture(scope="module")
def dense_texts(dense_path: Path) -> Sequence[str]:
    """What the default kernels write."""
    with Model(dense_path, devices=[]) as dense:
        assert dense.expert_count == 0
        return greedy_texts(dense)


@pytest.fixture(scope="module")
def dense_texts_of_ggml(dense_path: Path) -> Sequence[str]:
    """What ggml's kernels write, which a device computes with too: others round differently, and a text can take another turn."""
    with Model(dense_path, devices=[], expert_kernels="ggml") as dense:
        return greedy_texts(dense)


def test_the_dense_model_says_something(dense_texts: Sequence[str]) -> None:
    assert dense_texts[0].startswith(" Paris")
    assert len(set(dense_texts)) == len(PROMPTS)


def test_the_cpu_alone_writes_the_dense_text(demo_model: Model, dense_texts: Sequence[str]) -> None:
    assert demo_model.expert_count == 8
    assert greedy_texts(demo_model) == dense_texts


@pytest.mark.parametrize(
    "experts",
    [
        ExpertPlacement.gpu(),
        ExpertPlacement.cpu(),
        ExpertPlacement.cpu_first(10),
        ExpertPlacement.match(r"blk\.[0-9]*[05]\.ffn_(up|down)_exps"),
    ],
    ids=repr,
)
def test_every_placement_writes_the_dense_text(
    experts: ExpertPlacement, demo_path: Path, accelerator: Device, dense_texts_of_ggml: Sequence[str]
) -> None:
    with Model(demo_path, experts=experts, devices=accelerator, expert_kernels="ggml") as model:
        assert set(model.placement.by_device()) == {"CPU", accelerator.name}
        assert greedy_texts(model) == dense_texts_of_ggml


def test_the_engine_writes_the_dense_text(demo_model: Model, dense_path: Path) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=0)
    with (
        Engine(demo_model, context_size=256, threads=1) as engine,
        Model(dense_path, devices=[]) as dense,
        Engine(dense, context_size=256, threads=1) as oracle,
    ):
        assert engine.generate(PROMPTS[0], params).text == oracle.generate(PROMPTS[0], params).text
