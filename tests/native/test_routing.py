"""Traces of expert routing: real numbers, whose they are, and that nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_moe import Context, Device, Engine, ExpertPlacement, Model, RoutingTrace, SamplingParams, Speculative
from llama_moe.errors import ClosedError, InvalidOptionError
from tests.support.numpy_router import route_first_layer
from tests.support.tiny_models import ARCHITECTURES, DENSE, MODELS

KERNELS = pytest.mark.parametrize("expert_kernels", ["ggml", "llama_moe"])
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = ["The experts of the router", "Hello", "A rather longer prompt than that, of more tokens than the others have"]


@pytest.fixture(scope="module")
def moe(tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    # Its weights are F32, so it computes the same whatever the batch.
    with Model(tiny_model("llama"), experts="gpu", devices=[], repack=False) as model:
        yield model


def engine_over(model: Model, **options: Any) -> Engine:
    return Engine(model, context_size=256, threads=1, kv_type="f32", flash_attention="off", **options)


def by_token(routing: RoutingTrace, request: int) -> dict[int, tuple[int, list[list[int]]]]:
    """Of a request, by position: the token and its choices in each layer, sorted, since equals may change places."""
    mine = routing.requests == request
    return {
        int(position): (int(token), np.sort(choices, axis=-1).tolist())
        for position, token, choices in zip(routing.positions[mine], routing.token_ids[mine], routing.choices[mine], strict=True)
    }


# ---- the numbers are the router's


@KERNELS
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_choices_and_weights_are_those_of_a_router_in_numpy(tiny_model: Callable[[str], Path], name: str, expert_kernels: Any) -> None:
    spec, path = MODELS[name], tiny_model(name)
    tokens = np.arange(20, 52)
    with (
        Model(path, experts="gpu", devices=[], expert_kernels=expert_kernels) as model,
        # Each token is the first of a sequence of its own: what it attends to is itself.
        Context(model, context_size=32, max_sequences=len(tokens), threads=1, kv_type="f32", flash_attention="off") as context,
        context.trace_routing(choices=True, weights=True) as routing,
    ):
        context.decode(tokens, sequence_ids=np.arange(len(tokens)), outputs="all")
    assert routing.layers == spec.moe_layers
    assert routing.token_ids.tolist() == tokens.tolist()
    assert routing.sequences.tolist() == list(range(len(tokens)))
    expected = route_first_layer(path, spec, tokens)
    choices, weights = routing.choices[:, 0], routing.weights[:, 0]
    # Where two experts are as good as equal, F16 products may take the other one: those tokens are few, and say nothing.
    ranked = np.sort(expected.scores, axis=-1)[:, ::-1]
    clear = (ranked[:, : spec.experts_used] - ranked[:, 1 : spec.experts_used + 1]).min(axis=-1) > 2e-3
    assert clear.sum() >= len(tokens) * 0.6
    assert choices[clear].tolist() == expected.choices[clear].tolist()
    np.testing.assert_allclose(weights[clear], expected.weights[clear], atol=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_are_those_of_the_choices_and_each_token_has_its_share_in_every_layer(tiny_model: Callable[[str], Path], name: str) -> None:
    spec = MODELS[name]
    with Model(tiny_model(name), experts="gpu", devices=[], repack=False) as model, engine_over(model) as engine:
        tokens = model.tokenize(PROMPTS[2])
        with engine.trace_routing(choices=True) as routing:
            engine.score(tokens)
    computed = len(tokens) - 1
    assert routing.tokens == computed
    assert routing.counts.shape == (spec.layers, spec.experts)
    assert routing.counts.sum(axis=1).tolist() == [
        computed * spec.experts_used if layer in spec.moe_layers else 0 for layer in range(spec.layers)
    ]
    for index, layer in enumerate(routing.layers):
        counted = np.bincount(routing.choices[:, index].reshape(-1), minlength=spec.experts)
        assert counted.tolist() == routing.counts[layer].tolist()
    assert all(len(set(experts)) == spec.experts_used for token in routing.choices.tolist() for experts in token)


def test_a_last_layer_has_choices_only_where_logits_were_wanted(moe: Model) -> None:
    tokens = moe.tokenize(PROMPTS[2])
    with (
        Context(moe, context_size=256, threads=1) as context,
        context.trace_routing(choices=True, weights=True) as routing,
    ):
        wanted = np.zeros(len(tokens), dtype=bool)
        wanted[[2, 5, len(tokens) - 1]] = True
        context.decode(tokens, outputs=wanted)
        with context.trace_routing(choices=True, weights=True) as whole:
            context.clear()
            context.decode(tokens, outputs="all")
    part = routing.snapshot()
    assert ((part.choices[: len(tokens), -1] >= 0).all(axis=-1) == wanted).all()
    assert ((part.choices[: len(tokens), -1] == -1).all(axis=-1) == ~wanted).all()
    assert (np.isnan(part.weights[: len(tokens), -1]).all(axis=-1) == ~wanted).all()
    assert (part.choices[: len(tokens), :-1] >= 0).all()
    assert part.choices[: len(tokens)][wanted].tolist() == whole.choices[wanted].tolist()
    assert whole.counts.sum(axis=1).tolist() == [len(tokens) * moe.experts_used] * moe.layer_count
    assert part.tokens == 2 * len(tokens)
    assert int(part.counts[-1].sum()) == (len(tokens) + 3) * moe.experts_used


# ---- whose they are


@pytest.mark.parametrize("options", [{}, {"context_pool": 1024}, {"micro_batch_size": 7}, {"context_pool": 1024, "micro_batch_size": 5}])
@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss", "deepseek2"])
def test_several_requests_get_the_choices_that_each_has_alone(
    tiny_model: Callable[[str], Path], name: str, options: dict[str, Any]
) -> None:
    with Model(tiny_model(name), experts="gpu", devices=[], repack=False) as model:
        with engine_over(model, max_sequences=3, **options) as engine, engine.trace_routing(choices=True) as together:
            completions = engine.generate(PROMPTS, GREEDY)
        assert sorted(set(together.requests.tolist())) == [0, 1, 2]
        reused = [completion.cached_tokens for completion in completions]  # from one another
        assert together.tokens == len(together.token_ids) == sum(len(model.tokenize(p)) + 11 for p in PROMPTS) - sum(reused)
        same = total = 0
        for number, prompt in enumerate(PROMPTS):
            expected = [*model.tokenize(prompt), *completions[number].tokens[:-1]]
            with engine_over(model) as engine, engine.trace_routing(choices=True) as alone:
                engine.generate(expected, SamplingParams(max_tokens=1))
            ours, theirs = by_token(together, number), by_token(alone, 0)
            assert list(ours) == list(theirs)[reused[number] :] == list(range(reused[number], len(expected)))
            assert [token for token, _ in ours.values()] == expected[reused[number] :]
            for position, (_, choices) in ours.items():
                for mine, its in zip(choices, theirs[position][1], strict=True):
                    # A last layer has choices for the tokens that were generated, not for those of a prompt.
                    same += mine == its or -1 in mine or -1 in its
                    total += 1
    # Sums in another order may turn a router that is undecided; a mistake about whose a row is turns most.
    assert same / total > 0.97


def test_interleaved_sequences_of_a_context_are_told_apart(moe: Model) -> None:
    chance = np.random.default_rng(3)
    tokens, owners = chance.integers(20, 200, size=60), np.array([0, 2, 1] * 20)
    options: dict[str, Any] = {"context_size": 128, "threads": 1, "kv_type": "f32", "flash_attention": "off"}
    with Context(moe, max_sequences=3, micro_batch_size=8, **options) as context, context.trace_routing(choices=True) as together:
        context.decode(tokens, sequence_ids=owners, outputs="all")
    assert (together.requests == -1).all()
    for owner in range(3):
        mine = together.sequences == owner
        with Context(moe, **options) as context, context.trace_routing(choices=True) as alone:
            context.decode(tokens[owners == owner], outputs="all")
        assert together.token_ids[mine].tolist() == alone.token_ids.tolist() == tokens[owners == owner].tolist()
        assert together.positions[mine].tolist() == alone.positions.tolist() == list(range(20))
        assert (np.sort(together.choices[mine]) == np.sort(alone.choices)).mean() > 0.97


def test_requests_are_numbered_from_the_start_of_the_trace(moe: Model) -> None:
    with engine_over(moe, max_sequences=2) as engine:
        engine.generate("before", GREEDY)
        with engine.stream(PROMPTS[0], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)) as stream:
            next(stream)
            with engine.trace_routing(choices=True) as routing:
                engine.generate(PROMPTS[1], GREEDY)
        assert set(routing.requests.tolist()) == {-1, 0}


def test_tokens_taken_from_the_cache_are_not_counted(moe: Model) -> None:
    with engine_over(moe) as engine, engine.trace_routing() as routing:
        engine.generate(PROMPTS[2], GREEDY)
        before = routing.tokens
        again = engine.generate(PROMPTS[2], GREEDY)
        assert again.cached_tokens > 0
        assert routing.tokens - before == len(moe.tokenize(PROMPTS[2])) - again.cached_tokens + len(again.tokens) - 1


def test_embeddings_are_counted_in_all_layers(moe: Model) -> None:
    with engine_over(moe) as engine, engine.trace_routing() as routing:
        engine.embed(PROMPTS[2])
    assert routing.counts.sum(axis=1).tolist() == [len(moe.tokenize(PROMPTS[2])) * moe.experts_used] * moe.layer_count


def test_a_draft_models_routing_is_not_counted(tiny_model: Callable[[str], Path], moe: Model) -> None:
    with (
        Model(tiny_model("llama"), experts="gpu", devices=[], repack=False) as draft,
        engine_over(moe, speculative=Speculative.draft(draft, draft_tokens=3)) as engine,
        engine.trace_routing(choices=True) as routing,
    ):
        completion = engine.generate(PROMPTS[0], GREEDY)
        stats = engine.stats()
    # The same model drafts, so all it drafts is accepted: each position is computed once, but for drafts past the end.
    assert stats["draft_tokens_accepted"] > 0
    positions = routing.positions.tolist()
    assert len(positions) == routing.tokens <= len(moe.tokenize(PROMPTS[0])) + len(completion.tokens) - 1 + stats["draft_tokens"]
    assert len(set(positions)) == len(moe.tokenize(PROMPTS[0])) + len(completion.tokens) - 1


# ---- where it is computed


@KERNELS
@pytest.mark.parametrize(
    "experts", [ExpertPlacement.gpu(), ExpertPlacement.cpu(), ExpertPlacement.cpu_first(2)], ids=["gpu", "cpu", "cpu_first"]
)
def test_with_experts_on_a_worker_and_on_the_cpu_the_routing_is_the_same(
    tiny_model: Callable[[str], Path], accelerator: Device, experts: ExpertPlacement, expert_kernels: Any
) -> None:
    path = tiny_model("qwen3moe")
    traces = []
    for devices, placement in (([], ExpertPlacement.gpu()), ([accelerator], experts)):
        with Model(path, experts=placement, devices=devices, expert_kernels=expert_kernels) as model, engine_over(model) as engine:
            plain = engine.generate(PROMPTS[2], GREEDY)
            with engine.trace_routing(choices=True, weights=True) as routing:
                engine.generate("x" + PROMPTS[2], GREEDY)
            # Without the trace again, on the graphs that it left.
            assert engine.generate(PROMPTS[2], GREEDY).tokens == plain.tokens
        traces.append(routing)
    here, there = traces
    assert there.tokens == here.tokens
    assert there.token_ids.tolist() == here.token_ids.tolist()
    assert (np.sort(there.choices) == np.sort(here.choices)).mean() > 0.97
    known = ~np.isnan(there.weights)
    assert (known == (there.choices >= 0)).all()
    np.testing.assert_allclose(np.nansum(there.weights, axis=-1)[known.all(axis=-1)], 1.0, atol=1e-3)  # normalised


# ---- nothing else changes


@KERNELS
@pytest.mark.parametrize("name", ["llama", "qwen3moe", "olmoe", "deepseek2-merged", "grovemoe"])
def test_a_trace_does_not_change_the_text(tiny_model: Callable[[str], Path], name: str, expert_kernels: Any) -> None:
    with Model(tiny_model(name), experts="gpu", devices=[], expert_kernels=expert_kernels) as model:
        # One after the other: which requests share a batch is a matter of time, and that may turn an undecided router.
        sequences = 3 if name == "llama" else 1
        with engine_over(model, max_sequences=sequences) as engine:
            plain = [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)]
        asked: list[dict[str, bool]] = [{}, {"choices": True}, {"choices": True, "weights": True}]
        for options in asked:
            with engine_over(model, max_sequences=sequences) as engine, engine.trace_routing(**options):
                assert [completion.tokens for completion in engine.generate(PROMPTS, GREEDY)] == plain


def test_a_trace_can_be_read_and_started_and_ended_while_a_stream_runs(moe: Model) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with engine_over(moe) as engine:
        plain = engine.generate(PROMPTS[0], params).tokens
    tokens, seen = [], []
    with engine_over(moe, max_sequences=2) as engine, engine.trace_routing() as outer, engine.stream(PROMPTS[0], params) as stream:
        for token in stream:
            tokens.append(token.id)
            seen.append((outer.tokens, int(outer.counts[0].sum())))
            if len(tokens) == 10:
                with engine.trace_routing(choices=True, weights=True) as inner:
                    other = engine.generate(PROMPTS[1], GREEDY)
    assert tuple(tokens) == plain
    assert seen == sorted(seen)
    prompt, beside = len(moe.tokenize(PROMPTS[0])), len(moe.tokenize(PROMPTS[1])) - other.cached_tokens + 11
    assert seen[0][0] >= prompt
    assert outer.tokens == prompt + 39 + beside
    assert beside <= inner.tokens <= outer.tokens
    assert not inner.active


# ---- several, from threads, and when things close


def test_traces_nest_and_each_has_what_it_asked_for(moe: Model) -> None:
    with engine_over(moe) as engine, engine.trace_routing() as counts:
        engine.generate(PROMPTS[0], GREEDY)
        with engine.trace_routing(choices=True) as choices, engine.trace_routing(weights=True) as weights:
            engine.generate(PROMPTS[2], GREEDY)
        engine.generate(PROMPTS[1], GREEDY)
    assert choices.tokens == weights.tokens < counts.tokens
    assert (choices.counts == weights.counts).all()
    assert choices.choices.shape == weights.weights.shape == (choices.tokens, len(choices.layers), choices.experts_used)
    for trace, name in ((counts, "choices"), (counts, "positions"), (choices, "weights"), (weights, "choices")):
        with pytest.raises(InvalidOptionError, match=name):
            getattr(trace, name)


def test_threads_trace_what_runs_in_their_blocks(moe: Model) -> None:
    traces: list[tuple[int, RoutingTrace]] = []

    def work(number: int) -> None:
        for round_ in range(3):
            with engine.trace_routing(choices=True) as routing:
                completion = engine.generate(f"{number} {round_} {PROMPTS[0]}", GREEDY)
            assert (routing.counts.sum(axis=1)[:-1] == routing.tokens * moe.experts_used).all()
            traces.append((len(completion.tokens) - 1, routing))

    with engine_over(moe, max_sequences=4) as engine, engine.trace_routing() as all_of_it:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(traces) == 12
    for generated, routing in traces:
        assert generated <= routing.tokens <= all_of_it.tokens


def test_a_dense_model_and_a_closed_engine_are_refused(moe: Model, tiny_model: Callable[[str], Path]) -> None:
    with (
        Model(tiny_model(DENSE), experts="gpu", devices=[]) as dense,
        engine_over(dense) as engine,
        pytest.raises(InvalidOptionError, match="no experts"),
        engine.trace_routing(),
    ):
        pass
    engine = engine_over(moe)
    context = Context(moe, context_size=64)
    with engine.trace_routing() as routing:
        engine.generate(PROMPTS[0], GREEDY)
        engine.close()
        assert routing.counts.sum() > 0
    assert routing.tokens == len(moe.tokenize(PROMPTS[0])) + 11
    context.close()
    for closed in (engine, context):
        with pytest.raises(ClosedError), closed.trace_routing():
            pass


def test_a_running_trace_does_not_keep_the_engine(moe: Model) -> None:
    engine = engine_over(moe)
    block = engine.trace_routing()
    routing = block.__enter__()
    engine.generate(PROMPTS[0], GREEDY)
    tokens = routing.tokens
    engine.close()
    block.__exit__(None, None, None)
    del engine, block
    assert routing.tokens == tokens


# ---- kept and shown


def test_a_saved_trace_is_the_same_again(moe: Model, tmp_path: Path) -> None:
    with engine_over(moe) as engine, engine.trace_routing(choices=True, weights=True) as routing:
        engine.generate(PROMPTS[0], GREEDY)
    routing.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(tmp_path / "trace.npz")
    assert again.to_dict() == routing.to_dict()
    for name in ("choices", "weights", "token_ids", "positions", "sequences", "requests", "counts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(routing, name))
    assert again.simulate_cache(5) == routing.simulate_cache(5)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
