"""Simulated caches of experts, and what else a trace can tell without an engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_moe import RoutingTrace
from llama_moe.errors import InvalidOptionError
from llama_moe.routing import TraceData
from llama_moe.routing_cache import CachePolicy, _LeastFrequentlyUsed

EXPERTS = 6


def trace_of(choices: npt.ArrayLike, *, experts: int = EXPERTS, first_layer: int = 0) -> RoutingTrace:
    """A trace of these choices, [tokens, layers, used], -1 for none."""
    array = np.asarray(choices, dtype=np.int32)
    tokens, layers, used = array.shape
    counts = np.zeros((layers + first_layer, experts), dtype=np.int64)
    for layer in range(layers):
        chosen = array[:, layer].reshape(-1)
        counts[first_layer + layer] = np.bincount(chosen[chosen >= 0], minlength=experts)
    each = np.arange(tokens, dtype=np.int32)
    recorded: dict[str, npt.NDArray[np.generic]] = {
        "choices": array.astype(np.uint16),  # -1 is 0xFFFF
        "token_ids": each,
        "positions": each,
        "sequences": np.zeros_like(each),
        "requests": np.zeros(tokens, dtype=np.int64),
    }
    moe_layers = list(range(first_layer, first_layer + layers))
    return RoutingTrace(TraceData(layers + first_layer, experts, used, moe_layers, tokens, counts, recorded))


@st.composite
def traces(draw: st.DrawFn, used: int = 2, layers: int = 3) -> npt.NDArray[np.int32]:
    tokens = draw(st.integers(0, 25))
    one = st.permutations(range(EXPERTS)).map(lambda order: list(order[:used])) | st.just([-1] * used)
    rows = draw(st.lists(st.lists(one, min_size=layers, max_size=layers), min_size=tokens, max_size=tokens))
    return np.array(rows, dtype=np.int32).reshape(tokens, layers, used)


def victim(cache: list[tuple[int, int]], history: list[tuple[int, int]], policy: str) -> tuple[int, int]:
    def rank(key: tuple[int, int]) -> tuple[int, int]:
        last = max(i for i, past in enumerate(history) if past == key)
        return (0 if policy == "lru" else history.count(key), last)

    return min(cache, key=rank)


def naive(
    choices: npt.NDArray[np.int32], slots: int, policy: str, per_layer: bool, profile: npt.NDArray[np.int64]
) -> list[tuple[int, int]]:
    """(hits, uses) of each layer: lists that are searched from end to end, and all of history counted again at every step."""
    layers = choices.shape[1]
    history: list[tuple[int, int]] = []
    held: list[list[tuple[int, int]]] = [[] for _ in range(layers)]
    if policy == "static":
        ranked = sorted(((layer, expert) for layer in range(layers) for expert in range(EXPERTS)), key=lambda key: -profile[key])
        for layer in range(layers):
            mine = [key for key in ranked if key[0] == layer][:slots] if per_layer else ranked[:slots]
            held[layer] = mine
    elif not per_layer:
        held = [held[0]] * layers
    result = [(0, 0)] * layers
    for token in choices.tolist():
        for layer, experts in enumerate(token):
            for expert in experts:
                if expert < 0:
                    continue
                key = (layer, expert)
                cache = held[layer]
                hits, uses = result[layer]
                result[layer] = (hits + (key in cache), uses + 1)
                if policy != "static" and key not in cache:
                    if len(cache) == slots:
                        cache.remove(victim(cache, history, policy))
                    cache.append(key)
                history.append(key)
    return result


@given(choices=traces(), slots=st.integers(1, 20), policy=st.sampled_from(get_args(CachePolicy)), per_layer=st.booleans())
def test_a_simulated_cache_hits_exactly_when_a_naive_one_does(
    choices: npt.NDArray[np.int32], slots: int, policy: CachePolicy, per_layer: bool
) -> None:
    trace = trace_of(choices, first_layer=1)
    expected = naive(choices, slots, policy, per_layer, trace.counts[1:])
    found = trace.simulate_cache(slots, policy, per_layer=per_layer)
    assert (found.hits, found.hits + found.misses) == (sum(hits for hits, _ in expected), sum(uses for _, uses in expected))
    assert found.layer_hit_rates == {layer + 1: hits / max(uses, 1) for layer, (hits, uses) in enumerate(expected)}
    assert found.hit_rate == found.hits / max(found.hits + found.misses, 1)
    assert (found.slots, found.policy, found.per_layer) == (slots, policy, per_layer)


@given(choices=traces(), other=traces(), slots=st.integers(1, 18), per_layer=st.booleans())
def test_static_slots_may_be_chosen_from_another_trace_and_are_never_better_then(
    choices: npt.NDArray[np.int32], other: npt.NDArray[np.int32], slots: int, per_layer: bool
) -> None:
    profile = trace_of(other)
    found = trace_of(choices).simulate_cache(slots, "static", per_layer=per_layer, profile=profile)
    expected = naive(choices, slots, "static", per_layer, profile.counts)
    assert found.hits == sum(hits for hits, _ in expected)
    assert found.hits <= trace_of(choices).simulate_cache(slots, "static", per_layer=per_layer).hits


@given(choices=traces(), policy=st.sampled_from(["lru", "lfu"]))
def test_with_a_slot_for_every_expert_only_the_first_use_misses(choices: npt.NDArray[np.int32], policy: CachePolicy) -> None:
    trace = trace_of(choices)
    assert trace.simulate_cache(3 * EXPERTS, policy).misses == int((trace.counts > 0).sum())
    assert trace.simulate_cache(3 * EXPERTS, "static").misses == 0


def test_a_long_run_of_hits_needs_no_more_memory_than_the_cache() -> None:
    cache = _LeastFrequentlyUsed(8)
    for step in range(5000):
        assert cache.use(step % 7) is (step >= 7)
    assert len(cache._heap) <= 4 * 8 + 64
    # Ranks survive that: 8 and 9 are used least, so each drives out the other and none of those before them.
    assert [cache.use(expert) for expert in (8, 9, 8, 0, 6)] == [False, False, False, True, True]


def test_bad_simulations_are_refused() -> None:
    trace = trace_of([[[0, 1]]])
    with pytest.raises(InvalidOptionError, match="slots is 0"):
        trace.simulate_cache(0)
    with pytest.raises(InvalidOptionError, match="'fifo'"):
        trace.simulate_cache(1, "fifo")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="'static'"):
        trace.simulate_cache(1, "lru", profile=trace)
    with pytest.raises(InvalidOptionError, match="other layers"):
        trace.simulate_cache(1, "static", profile=trace_of([[[0, 1]]], experts=7))
    with pytest.raises(TypeError):
        trace.simulate_cache(1.5)  # type: ignore[arg-type]


def test_statistics_of_a_layer() -> None:
    trace = trace_of([[[0, 1], [0, 1]], [[2, 3], [0, 1]], [[4, 5], [0, 1]]])
    even, skewed = trace.by_layer(top=2)
    assert even.entropy == pytest.approx(1.0)
    assert (even.variation, even.unused) == (0.0, 0)
    assert skewed.entropy == pytest.approx(math.log(2) / math.log(EXPERTS))
    assert skewed.variation == pytest.approx(np.std([3, 3, 0, 0, 0, 0]) / 1.0)
    assert (skewed.top, skewed.unused, skewed.tokens) == (((0, 1.0), (1, 1.0)), 4, 3)
    assert trace.shares[0].tolist() == pytest.approx([1 / 3] * 6)
    described = json.loads(json.dumps(trace.to_dict()))
    assert described["layers"][1]["counts"] == [3, 3, 0, 0, 0, 0]
    assert described["tokens"] == 3


def test_a_trace_of_nothing_has_statistics_too() -> None:
    trace = trace_of(np.zeros((0, 2, 2)))
    assert [(layer.tokens, layer.top, layer.entropy, layer.variation) for layer in trace.by_layer()] == [(0, (), 0.0, 0.0)] * 2
    assert trace.simulate_cache(3).hit_rate == 0.0


def test_what_is_not_a_saved_trace_is_refused(tmp_path: Path) -> None:
    trace = trace_of([[[0, -1]]])
    trace.save(tmp_path / "good")
    assert RoutingTrace.load(tmp_path / "good").choices.tolist() == [[[0, -1]]]
    data = (tmp_path / "good").read_bytes()
    other = {"shape": np.array([1, 2, 3, 4])}
    np.savez(tmp_path / "other.npz", allow_pickle=False, **other)
    for name, content in {
        "empty": b"",
        "text": b"no archive",
        "cut": data[: len(data) // 2],
        "other": (tmp_path / "other.npz").read_bytes(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidOptionError, match="not a saved routing trace"):
            RoutingTrace.load(tmp_path / name)
    with np.load(tmp_path / "good") as archive:
        arrays = dict(archive)
    arrays["counts"] = arrays["counts"][:, 1:]
    np.savez(tmp_path / "bad.npz", allow_pickle=False, **arrays)
    with pytest.raises(InvalidOptionError, match="counts is int64 of shape"):
        RoutingTrace.load(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "none")


@pytest.mark.parametrize(("layers", "experts"), [(48, 128), (30, 8), (1, 2)])
def test_a_heatmap_shows_every_layer_and_expert(tmp_path: Path, layers: int, experts: int) -> None:
    figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    chance = np.random.default_rng(0)
    trace = trace_of(chance.integers(0, experts, size=(20, layers, 2)), experts=experts, first_layer=1)
    figure = trace.plot(tmp_path / "heatmap.png", title="A title")
    assert isinstance(figure, figure_module.Figure)
    axes, scale = figure.axes
    (image,) = axes.images
    np.testing.assert_allclose(np.asarray(image.get_array()), trace.shares[1:] * experts / 2)
    assert axes.get_title() == "A title"
    assert axes.get_yticklabels()[0].get_text() == "1"
    assert scale.get_ylabel().startswith("load")
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidOptionError, match=r"'\.xyz'.*png"):
        trace.plot(tmp_path / "heatmap.xyz")
    assert [file.name for file in tmp_path.iterdir()] == ["heatmap.png"]
