"""Prompts that begin alike are computed once, and the text stays what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_moe import Engine, Model, SamplingParams
from llama_moe.errors import InvalidOptionError
from tests.support.processes import run_python

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SHARED = list(range(20, 220))
TAILS = ([7, 8, 9], [11], [50, 40, 30, 20], [7, 8, 10])


@pytest.fixture(scope="module")
def alone(model: Model) -> list[tuple[int, ...]]:
    """Each prompt by itself, in an engine that knows no other."""
    results = []
    for tail in TAILS:
        with Engine(model, context_size=512, threads=1) as engine:
            results.append(engine.generate(SHARED + tail, GREEDY).tokens)
    return results


@pytest.fixture(params=[None, 2048], ids=["own", "pool"])
def engine(model: Model, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(model, context_size=512, context_pool=request.param, max_sequences=4, threads=1) as engine:
        yield engine


def test_prompts_one_after_the_other(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    for number, (tail, tokens) in enumerate(zip(TAILS, alone, strict=True)):
        completion = engine.generate(SHARED + tail, GREEDY)
        assert completion.tokens == tokens
        assert completion.cached_tokens >= (len(SHARED) if number else 0)


def test_prompts_at_once_compute_what_they_share_once(engine: Engine, alone: list[tuple[int, ...]]) -> None:
    completions = engine.generate([SHARED + tail for tail in TAILS], GREEDY)
    assert [completion.tokens for completion in completions] == alone
    assert engine.stats()["prompt_tokens"] <= len(SHARED) + sum(map(len, TAILS))
    assert engine.stats()["cached_tokens"] >= (len(TAILS) - 1) * len(SHARED)


def test_a_conversation_goes_on_where_it_was(engine: Engine) -> None:
    first = engine.generate(SHARED, GREEDY)
    conversation = [*SHARED, *first.tokens, 5, 6]
    # The last token was never computed.
    assert engine.generate(conversation, GREEDY).cached_tokens == len(SHARED) + len(first.tokens) - 1


def test_more_conversations_than_sequences(model: Model) -> None:
    prompts = [[token, *SHARED[:60]] for token in range(3, 9)]
    with Engine(model, context_size=512, threads=1) as fresh:
        expected = [fresh.generate(prompt, GREEDY).tokens for prompt in prompts]
    with Engine(model, context_size=512, max_sequences=2, threads=1) as engine:
        for _ in range(2):
            assert [completion.tokens for completion in engine.generate(prompts, GREEDY)] == expected


def test_a_saved_prefix_is_used_by_another_process(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    with Engine(model, context_size=512, threads=1) as engine:
        assert engine.save_prefix(SHARED, path) == len(SHARED)
        expected = engine.generate(SHARED + TAILS[0], GREEDY).tokens
    ran = run_python(
        """
        import json, sys, llama_moe
        path, prefix, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
        params = llama_moe.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        with llama_moe.load(path, experts="gpu", devices=[], repack=False, context_size=512, threads=1) as engine:
            length = engine.load_prefix(prefix)
            completion = engine.generate(prompt, params)
            print(json.dumps([length, completion.cached_tokens, completion.tokens]))
        """,
        model.path,
        path,
        json.dumps(SHARED + TAILS[0]),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout) == [len(SHARED), len(SHARED), list(expected)]


def test_prefixes_can_be_forgotten(model: Model, tmp_path: Path) -> None:
    with Engine(model, context_size=512, threads=1) as engine:
        engine.save_prefix(SHARED, tmp_path / "prefix")
    with Engine(model, context_size=512, threads=1) as engine:
        engine.load_prefix(tmp_path / "prefix")
        engine.clear_prefixes()
        assert engine.generate(SHARED + TAILS[0], GREEDY).cached_tokens == 0


def test_prefixes_that_do_not_belong_are_refused(model: Model, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "prefix"
    with Engine(model, context_size=512, threads=1) as engine:
        engine.save_prefix(SHARED, path)
        data = path.read_bytes()
        for bad, message in ((data[:-1], "truncated or damaged"), (b"no prefix at all, but as long as a header", "not a saved state")):
            (tmp_path / "bad").write_bytes(bad)
            with pytest.raises(InvalidOptionError, match=message):
                engine.load_prefix(tmp_path / "bad")
        with pytest.raises(FileNotFoundError):
            engine.load_prefix(tmp_path / "missing")
        with pytest.raises(FileNotFoundError):
            engine.save_prefix(SHARED, tmp_path / "no such folder" / "prefix")
    for options, message in (({"kv_type": "f32"}, "kv_type 'f16'; this engine has 'f32'"), ({"max_sequences": 2}, "1 buffers.*has 2")):
        with Engine(model, context_size=512, threads=1, **options) as other, pytest.raises(InvalidOptionError, match=message):
            other.load_prefix(path)
    with (
        Model(tiny_model("olmoe"), experts="gpu", devices=[]) as stranger,
        Engine(stranger, context_size=512, threads=1) as other,
        pytest.raises(InvalidOptionError, match="another model"),
    ):
        other.load_prefix(path)
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".partial")] == []


def test_a_full_pool_lets_every_request_end_with_its_text(model: Model) -> None:
    prompts = [[token, *SHARED[:100]] for token in range(3, 9)]
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)  # so long that all are there together on a busy machine too
    exact: dict[str, Any] = {"kv_type": "f32", "flash_attention": "off"}
    with Engine(model, context_size=512, threads=1, **exact) as engine:
        expected = [engine.generate(prompt, params).tokens for prompt in prompts]
    with Engine(model, context_size=512, context_pool=512, max_sequences=6, threads=1, **exact) as engine:
        completions = engine.generate(prompts, params)
        assert [completion.tokens for completion in completions] == expected
        assert {completion.finish_reason for completion in completions} == {"length"}
        assert engine.stats()["requests_preempted"] > 0
        with pytest.raises(InvalidOptionError, match="context_pool is 100"):
            Engine(model, context_size=512, context_pool=100)
