"""The low level: tokens in, logits out, sequences kept apart, states saved and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llama_moe import Context, Model
from llama_moe.errors import ContextFullError, InvalidOptionError
from tests.support.processes import run_python

TOKENS = [5, 60, 70, 80, 90, 100, 110, 120]


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, context_size=256, max_sequences=3, threads=1) as context:
        yield context


def test_logits_are_float32_rows_of_the_vocabulary(context: Context, model: Model) -> None:
    logits = context.decode(TOKENS, outputs="all")
    assert logits.dtype == np.float32
    assert logits.shape == (len(TOKENS), model.vocab_size)
    assert np.isfinite(logits).all()
    assert logits.flags.c_contiguous


def test_last_and_masks_are_rows_of_all(context: Context) -> None:
    whole = context.decode(TOKENS, outputs="all")
    context.clear()
    np.testing.assert_allclose(context.decode(TOKENS), whole[-1:], atol=1e-4)
    context.clear()
    mask = np.arange(len(TOKENS)) % 3 == 1
    np.testing.assert_allclose(context.decode(TOKENS, outputs=mask), whole[mask], atol=1e-4)
    context.clear()
    assert context.decode(TOKENS, outputs=[False] * len(TOKENS)).shape == (0, whole.shape[1])


def test_tokens_one_by_one_equal_all_at_once(context: Context) -> None:
    whole = context.decode(TOKENS, outputs="all")
    context.clear()
    steps = np.concatenate([context.decode([token]) for token in TOKENS])
    np.testing.assert_allclose(steps, whole, atol=1e-4)
    assert context.sequence_length(0) == len(TOKENS)


def test_more_tokens_than_a_batch_equal_one_batch(model: Model) -> None:
    tokens = np.random.default_rng(0).integers(10, 250, size=100)
    # Flash attention rounds to 16 bits on its way, differently for each size of a micro-batch.
    large = Context(model, context_size=256, kv_type="f32", flash_attention="off", threads=1)
    small = Context(model, context_size=256, kv_type="f32", flash_attention="off", batch_size=16, micro_batch_size=8, threads=1)
    with large, small:
        np.testing.assert_allclose(small.decode(tokens, outputs="all"), large.decode(tokens, outputs="all"), atol=1e-4)


def test_sequences_do_not_see_each_other(context: Context) -> None:
    alone = context.decode(TOKENS, outputs="all")
    context.clear()
    other = [200, 201, 202, 203, 204, 205, 206, 207]
    mixed = np.array([TOKENS, other]).T.ravel()
    sequences = np.tile([0, 1], len(TOKENS))
    logits = context.decode(mixed, sequence_ids=sequences, outputs="all")
    np.testing.assert_allclose(logits[0::2], alone, atol=1e-4)
    assert np.abs(logits[1::2] - alone).max() > 0.1
    assert [context.sequence_length(i) for i in range(3)] == [len(TOKENS), len(TOKENS), 0]


def test_last_is_the_last_of_each_sequence(context: Context) -> None:
    logits = context.decode([5, 60, 5, 70, 80], sequence_ids=[0, 0, 1, 0, 1])
    assert logits.shape[0] == 2
    context.clear()
    np.testing.assert_allclose(logits[0], context.decode([5, 60, 70])[0], atol=1e-4)
    np.testing.assert_allclose(logits[1], context.decode([5, 80], sequence_ids=1)[0], atol=1e-4)


def test_removing_the_end_goes_back(context: Context) -> None:
    expected = context.decode(TOKENS)
    context.decode([200, 201])
    context.remove(0, start=len(TOKENS) - 1)
    assert context.sequence_length(0) == len(TOKENS) - 1
    np.testing.assert_allclose(context.decode(TOKENS[-1:], positions=[len(TOKENS) - 1]), expected, atol=1e-4)


def test_a_copy_goes_on_like_its_source(context: Context) -> None:
    context.decode(TOKENS)
    context.copy(0, 2)
    assert context.sequence_length(2) == len(TOKENS)
    np.testing.assert_allclose(context.decode([200], sequence_ids=2), context.decode([200]), atol=1e-4)


def test_keep_removes_the_others(context: Context) -> None:
    for sequence in range(3):
        context.decode(TOKENS, sequence_ids=sequence)
    context.keep(1)
    assert [context.sequence_length(i) for i in range(3)] == [0, len(TOKENS), 0]


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint64])
def test_any_integer_type_is_taken(context: Context, dtype: type) -> None:
    expected = context.decode(TOKENS)
    context.clear()
    np.testing.assert_array_equal(context.decode(np.array(TOKENS, dtype=dtype)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [1.5]}, "tokens"),
        ({"tokens": np.array([1.0])}, "float64"),
        ({"tokens": np.array([[1, 2]])}, "2 dimensions"),
        ({"tokens": [1, -1]}, r"tokens\[1\] is -1"),
        ({"tokens": [1, 10**6]}, r"tokens\[1\] is 1000000"),
        ({"tokens": np.array([2**40])}, "1099511627776"),
        ({"tokens": [1], "sequence_ids": [3]}, r"sequence_ids\[0\] is 3"),
        ({"tokens": [1, 2], "sequence_ids": [0]}, "sequence_ids has 1 entries for 2"),
        ({"tokens": [1, 2], "positions": [0]}, "positions has 1 entries for 2"),
        ({"tokens": [1, 2], "positions": [0, 5]}, r"positions\[1\] is 5"),
        ({"tokens": [1], "positions": [-1]}, r"positions\[0\] is -1"),
        ({"tokens": [1, 2], "outputs": [True]}, "outputs has 1 entries for 2"),
        ({"tokens": [1], "outputs": "first"}, "'first'"),
        ({"tokens": [1], "outputs": [1]}, "mask of bools"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_changes_nothing(context: Context, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        context.decode(**arguments)  # type: ignore[arg-type]
    assert context.sequence_length(0) == 0


def test_a_full_sequence_is_refused_and_the_others_go_on(context: Context) -> None:
    size = context.context_size
    context.decode([7] * (size - 1))
    with pytest.raises(ContextFullError, match=f"{size + 1} tokens.*holds {size}"):
        context.decode([7, 7])
    assert context.sequence_length(0) == size - 1
    context.decode([7])
    assert context.decode(TOKENS, sequence_ids=1).shape[0] == 1


@pytest.mark.parametrize("sequence", [-2, 3])
def test_unknown_sequences_are_refused(context: Context, sequence: int) -> None:
    for call in (context.sequence_length, context.keep, context.remove, context.save_state):
        with pytest.raises(InvalidOptionError, match=f"no sequence {sequence}"):
            call(sequence)


def test_a_saved_sequence_goes_on_in_another_context(context: Context, model: Model) -> None:
    context.decode(TOKENS)
    state = context.save_state(0)
    expected = context.decode([200])
    with Context(model, context_size=512, max_sequences=3, threads=1) as other:
        other.load_state(state, 1)
        assert other.sequence_length(1) == len(TOKENS)
        np.testing.assert_allclose(other.decode([200], sequence_ids=1), expected, atol=1e-4)


def test_a_saved_context_holds_all_sequences(context: Context, model: Model) -> None:
    context.decode(TOKENS)
    context.decode(TOKENS[:3], sequence_ids=2)
    state = context.save_state()
    with Context(model, context_size=256, max_sequences=3, threads=1) as other:
        other.load_state(state)
        assert [other.sequence_length(i) for i in range(3)] == [len(TOKENS), 0, 3]


def test_a_saved_sequence_goes_on_in_another_process(context: Context, model: Model, tmp_path: Path) -> None:
    context.decode(TOKENS)
    (tmp_path / "state").write_bytes(context.save_state(0))
    expected = context.decode([200])
    ran = run_python(
        """
        import sys, pathlib, numpy, llama_moe
        with llama_moe.Model(sys.argv[1], experts="gpu", devices=[], repack=False) as model:
            with llama_moe.Context(model, context_size=256, max_sequences=3, threads=1) as context:
                context.load_state(pathlib.Path(sys.argv[2], "state").read_bytes(), 0)
                numpy.save(pathlib.Path(sys.argv[2], "logits.npy"), context.decode([200]))
        """,
        model.path,
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


def test_states_that_do_not_belong_are_refused(context: Context, tiny_model: Callable[[str], Path]) -> None:
    context.decode(TOKENS)
    state = context.save_state(0)
    damaged = bytearray(state)
    damaged[-1] ^= 1
    for bad, message in (
        (b"", "0 bytes"),
        (b"not a state, but long enough for the header of one", "not a saved state"),
        (state[:-1], "truncated or damaged"),
        (bytes(damaged), "truncated or damaged"),
    ):
        with pytest.raises(InvalidOptionError, match=message):
            context.load_state(bad, 0)
    with pytest.raises(InvalidOptionError, match="of one sequence"):
        context.load_state(state)
    with pytest.raises(InvalidOptionError, match="whole context"):
        context.load_state(context.save_state(), 0)
    with Model(tiny_model("olmoe"), experts="gpu", devices=[]) as model:
        other = Context(model, context_size=256, threads=1)
        with pytest.raises(InvalidOptionError, match="another model"):
            other.load_state(state, 0)
    assert context.sequence_length(0) == len(TOKENS)


def test_a_state_of_another_kind_of_context_is_refused(context: Context, model: Model) -> None:
    context.decode(TOKENS)
    state = context.save_state(0)
    for other in (
        Context(model, context_size=256, max_sequences=3, kv_type="f32", threads=1),
        Context(model, context_size=256, max_sequences=2, threads=1),
    ):
        with other, pytest.raises(InvalidOptionError, match="does not fit"):
            other.load_state(state, 0)


def test_a_quantised_kv_cache_is_smaller_and_close(model: Model) -> None:
    with (
        Context(model, context_size=1024, threads=1) as half,
        Context(model, context_size=1024, threads=1, kv_type="f32") as full,
    ):
        sizes = [context.memory().by_role()["kv_cache"] for context in (half, full)]
        assert sizes[1] == 2 * sizes[0]
        np.testing.assert_allclose(half.decode(TOKENS), full.decode(TOKENS), atol=0.05)
