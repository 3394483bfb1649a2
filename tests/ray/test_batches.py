"""What an actor makes of batches, in the forms that Ray Data gives them; no process of Ray is needed for that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.data.block import BlockAccessor

from llama_moe import Engine, SamplingParams
from llama_moe.errors import CancelledError, ClosedError, ContextFullError, InvalidOptionError
from llama_moe.ray import LlamaMoe
from llama_moe.ray.resources import share_of_cores
from tests.support import chat_templates as templates
from tests.support.conversations import ADD, BEGUN_CALL
from tests.support.processes import run_python
from tests.support.waiting import eventually

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")

FORMATS = ("pyarrow", "pandas", "numpy")
# Sums in F32 throughout: the text is the same whatever is computed beside it.
EXACT: dict[str, Any] = {
    "experts": "gpu", "devices": [], "repack": False, "context_size": 256, "kv_type": "f32", "flash_attention": "off", "threads": 1,
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPTS = [f"Count from {number * 7}:" for number in range(6)]
TOO_LONG = "z" * 4000

Actors = Callable[..., Any]  # batches come and go in the form that a test chose


@pytest.fixture
def actor(tiny_model: Callable[[str], Path]) -> Iterator[Actors]:
    """Makes what Ray would make in its actors."""
    made: list[LlamaMoe] = []

    def make(name: str = "llama", *, load: Mapping[str, Any] | None = None, **options: Any) -> LlamaMoe:
        made.append(LlamaMoe(tiny_model(name), load_options={**EXACT, **(load or {})}, **({"sampling": GREEDY} | options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def batch(form: str, **columns: Any) -> Any:
    """The columns as Ray Data gives them in this `batch_format`."""
    return BlockAccessor.for_block(pa.table(columns)).to_batch_format(form)


def table(answered: Any) -> pa.Table:
    """A batch that was returned, as Ray Data stores it."""
    return BlockAccessor.for_block(BlockAccessor.batch_to_block(answered)).to_arrow()


def alone(engine: Engine, prompts: list[Any], params: SamplingParams | list[SamplingParams] = GREEDY) -> list[str]:
    return [answer.text for answer in engine.generate(prompts, params)]


# ---- columns


@pytest.mark.parametrize("form", FORMATS)
def test_rows_keep_their_order_and_columns(actor: Actors, form: str) -> None:
    many = actor(
        output_columns={"text": "answer", "tokens": "ids", "logprobs": "chances", "completion_tokens": "count", "finish_reason": "why"}
    )
    answered = table(many(batch(form, id=list(range(6)), prompt=PROMPTS, kept=[0.5, 1.5, 2.5, 3.5, 4.5, 5.5])))
    expected = many.engine.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=0))
    assert answered.column_names == ["id", "prompt", "kept", "answer", "ids", "chances", "count", "why"]
    assert answered["id"].to_pylist() == list(range(6))
    assert answered["prompt"].to_pylist() == PROMPTS
    assert answered["kept"].to_pylist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    assert answered["answer"].to_pylist() == [each.text for each in expected]
    assert answered["ids"].to_pylist() == [list(each.tokens) for each in expected]
    assert answered["count"].to_pylist() == [8] * 6
    assert answered["why"].to_pylist() == ["length"] * 6
    for chances, each in zip(answered["chances"].to_pylist(), expected, strict=True):
        assert chances == pytest.approx([token.logprob for token in each.logprobs or ()], abs=1e-3)


@pytest.mark.parametrize("form", FORMATS)
def test_prompts_may_be_token_ids(actor: Actors, form: str) -> None:
    many = actor(prompt_column="ids")
    for ids in ([[5, 6, 7], [8, 9, 10]], [[5, 6], [7], [8, 9, 10]]):  # numpy makes a tensor of those of one length
        assert table(many(batch(form, ids=ids)))["completion"].to_pylist() == alone(many.engine, ids)


def test_a_column_of_that_name_is_replaced(actor: Actors) -> None:
    many = actor(output_columns="prompt")
    answered = many(batch("pyarrow", prompt=PROMPTS, id=list(range(6))))
    assert answered.column_names == ["prompt", "id"]
    assert answered["prompt"].to_pylist() == alone(many.engine, PROMPTS)


def test_columns_have_one_type_whatever_is_in_them(actor: Actors) -> None:
    outputs = {name: name for name in ("text", "tokens", "logprobs", "prompt_tokens", "cached_tokens", "finish_reason")}
    many = actor(output_columns=outputs, on_error="column")
    good, bad = (many(batch("pyarrow", prompt=[prompt])) for prompt in ("One", TOO_LONG))
    assert good.schema == bad.schema
    assert pa.types.is_string(good.schema.field("error").type)


def test_a_missing_column_names_those_there_are(actor: Actors) -> None:
    with pytest.raises(InvalidOptionError, match=r"no column 'prompt'; it has 'text', 'id'"):
        actor()(batch("numpy", text=["One"], id=[1]))


# ---- sampling


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_may_have_options_of_its_own(actor: Actors, form: str) -> None:
    many = actor(sampling_column="options")
    options = [{"max_tokens": 3}, {"temperature": 1.0, "seed": 7}, None, {"logit_bias": {"261": 90.0}}]
    answered = table(many(batch(form, prompt=PROMPTS[:4], options=options)))
    each = [
        SamplingParams(max_tokens=3, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=1.0, seed=7, ignore_eos=True),
        GREEDY,
        SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logit_bias={261: 90.0}),
    ]
    assert answered["completion"].to_pylist() == alone(many.engine, PROMPTS[:4], each)


def test_options_may_be_a_mapping(actor: Actors) -> None:
    many = actor(sampling={"max_tokens": 5, "temperature": 0, "ignore_eos": True})
    expected = alone(many.engine, PROMPTS, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert many(batch("pyarrow", prompt=PROMPTS))["completion"].to_pylist() == expected


# ---- what is wrong with a row


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_wrong_with_a_row_is_in_its_column(actor: Actors, form: str) -> None:
    many = actor(on_error="column", sampling_column="options")
    prompts = ["One", TOO_LONG, None, "Four", "Five"]
    answered = table(many(batch(form, prompt=prompts, options=[None, None, None, {"max_tokens": -5}, None])))
    errors = answered["error"].to_pylist()
    assert (errors[0], errors[4]) == (None, None)
    assert "ContextFullError: the prompt has 4002 tokens" in errors[1]
    assert "TypeError: a prompt must be text or token ids, not None" in errors[2]
    assert "InvalidOptionError: max_tokens" in errors[3]
    one, five = alone(many.engine, ["One", "Five"])
    assert answered["completion"].to_pylist() == [one, None, None, None, five]


def test_what_is_wrong_with_a_row_is_raised(actor: Actors) -> None:
    many = actor()
    with pytest.raises(ContextFullError, match=r"^row 1 of a batch, 'zzz.*\.\.\.: the prompt has 4002 tokens"):
        many(batch("pyarrow", prompt=["One", TOO_LONG, "Three"]))
    assert eventually(lambda: many.engine.stats()["requests_running"] == 0)  # nobody waits for the others
    unknown = actor(sampling_column="options")
    with pytest.raises(InvalidOptionError, match=r"row 0 .*no field 'max_token'; it has max_tokens"):
        unknown(batch("pyarrow", prompt=["One"], options=[{"max_token": 3}]))


# ---- the engine


def test_more_rows_than_the_queue_has_room_for(actor: Actors) -> None:
    many = actor(load={"max_sequences": 2, "max_queue": 1})
    prompts = PROMPTS * 4
    assert many(batch("pyarrow", prompt=prompts))["completion"].to_pylist() == alone(many.engine, prompts)


def test_batches_of_several_threads_share_the_engine(actor: Actors) -> None:
    many = actor(load={"max_sequences": 4})
    answered: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda at=at: answered.update({at: many(batch("pyarrow", prompt=PROMPTS[at:]))})) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = alone(many.engine, PROMPTS)
    assert {at: each["completion"].to_pylist() for at, each in answered.items()} == {at: expected[at:] for at in range(4)}


def test_rows_of_a_batch_are_computed_together(actor: Actors) -> None:
    many = actor()
    assert many.engine.max_sequences == 8
    before = many.engine.stats()["decode_calls"]
    many(batch("pyarrow", prompt=PROMPTS))
    assert many.engine.stats()["decode_calls"] - before < 6 * 8  # one for each token, if they were computed alone


def test_closing_ends_a_batch_and_no_other_begins(actor: Actors) -> None:
    many = actor(sampling=SamplingParams(temperature=0, ignore_eos=True), load={"context_size": 32768})

    def close_when_it_generates() -> None:
        eventually(lambda: many.engine.stats()["generated_tokens"] > 0)
        many.close()

    closer = threading.Thread(target=close_when_it_generates)
    closer.start()
    with pytest.raises(CancelledError, match="closed while"):
        many(batch("pyarrow", prompt=PROMPTS))
    closer.join()
    assert many.closed
    with pytest.raises(ClosedError):
        many(batch("pyarrow", prompt=PROMPTS))


def test_an_actor_that_nobody_has_any_more_frees_its_model(tiny_model: Callable[[str], Path]) -> None:
    many = LlamaMoe(tiny_model("llama"), load_options=EXACT)
    engine = many.engine
    del many
    assert engine.closed
    assert engine.model.closed


# ---- chats


@pytest.mark.parametrize("form", FORMATS)
def test_conversations_are_answered(actor: Actors, form: str) -> None:
    many = actor(
        "qwen3moe", task="chat", system="Be brief.", prompt_column="messages", output_columns={"text": "answer", "reasoning": "why"}
    )
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Hello"}],
        [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two.", "reasoning_content": "Hm."},
            {"role": "user", "content": "Three?", "name": "Ann"},
        ],
    ]
    answered = table(many(batch(form, messages=conversations)))
    system = {"role": "system", "content": "Be brief."}
    assert answered["answer"].to_pylist() == [many.engine.chat([system, *each], GREEDY).text for each in conversations]
    assert answered["why"].to_pylist() == ["", ""]


def test_a_text_is_a_conversation_of_one_message(actor: Actors) -> None:
    many = actor("qwen3moe", task="chat")
    expected = [many.engine.chat([{"role": "user", "content": prompt}], GREEDY).text for prompt in PROMPTS]
    assert many(batch("pyarrow", prompt=PROMPTS))["completion"].to_pylist() == expected


def test_tool_calls_are_a_column(actor: Actors) -> None:
    tools = {"tools": [ADD], "tool_choice": "required", "continue_final_message": True, "template": templates.HERMES}
    many = actor(
        "qwen3moe", load={"context_size": 1024}, task="chat", chat_options=tools, prompt_column="messages", sampling_column="options",
        output_columns={"tool_calls": "calls", "finish_reason": "why"},
    )  # fmt: skip
    options = [{"seed": seed, "max_tokens": 300, "temperature": 0.8, "ignore_eos": False} for seed in range(6)]
    answered = many(batch("pyarrow", messages=[BEGUN_CALL] * 6, options=options))
    called = [calls for calls, why in zip(answered["calls"].to_pylist(), answered["why"].to_pylist(), strict=True) if why == "tool_calls"]
    assert called
    assert all(call["name"] == "add" and call["id"] and "a" in call["arguments"] for calls in called for call in calls)


def test_bad_conversations_are_errors_of_their_rows(actor: Actors) -> None:
    many = actor("qwen3moe", task="chat", prompt_column="messages", on_error="column")
    messages = [[{"role": "user", "content": "Hello"}], [{"role": "robot", "content": "x"}], [], None]
    errors = many(batch("pyarrow", messages=messages))["error"].to_pylist()
    assert errors[0] is None
    assert "the role 'robot'" in errors[1]
    assert "messages is empty" in errors[2]
    assert "text or a list of messages, not None" in errors[3]


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "embed"}, "task is 'embed'; expected 'completion' or 'chat'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; expected 'raise' or 'column'"),
        ({"system": "Be brief."}, "set task='chat'"),
        ({"task": "chat", "chat_options": {"tool": []}}, r"chat_options has 'tool'; Engine.chat has tools, tool_choice"),
        ({"output_columns": {"reasoning": "why"}}, "has the field 'reasoning'; a completion has text, finish_reason"),
        ({"output_columns": {"text": "a", "tokens": "a"}}, "different column for each"),
        ({"output_columns": {}}, "at least one field"),
        ({"output_columns": "error", "on_error": "column"}, "error_column is 'error', which output_columns has already"),
        ({"sampling": {"temprature": 1}}, "no field 'temprature'; it has max_tokens"),
        ({"sampling": {"top_p": 3.0}}, "top_p"),
        ({"task": "chat"}, "chat template"),  # the model has none
    ],
)
def test_wrong_options_are_said_at_once(actor: Actors, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        actor(**options)


def test_unknown_options_of_a_load_are_refused(actor: Actors) -> None:
    with pytest.raises(TypeError, match="n_ctx"):
        actor(load={"n_ctx": 512})


@pytest.mark.parametrize(
    ("reserved", "machine", "cores", "threads"),
    [
        ({"CPU": 1.0}, {"CPU": 2.0}, 2, 1),
        ({"CPU": 16.0}, {"CPU": 32.0}, 16, 8),  # two logical CPUs for each core
        ({"CPU": 4.0}, {"CPU": 4.0}, 64, 4),  # Ray may use a part of the machine
        ({"CPU": 0.5}, {"CPU": 2.0}, 2, 1),
        ({"GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0}, 16, 4),
        ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 32.0, "GPU": 4.0}, 32, 2),
        ({}, {"CPU": 2.0}, 2, None),
    ],
)
def test_threads_follow_what_ray_reserved(reserved: dict[str, float], machine: dict[str, float], cores: int, threads: int | None) -> None:
    assert share_of_cores(reserved, machine, cores) == threads


def test_without_ray_an_error_says_what_to_install() -> None:
    ran = run_python("""
        import sys
        sys.modules["ray"] = None  # as if it were not there
        from llama_moe.ray import LlamaMoe
        try:
            LlamaMoe("model.gguf")
        except ImportError as error:
            print(error)
    """)
    assert ran.stdout.strip() == 'llama_moe.ray.LlamaMoe needs Ray: pip install "llama-moe[ray]"', ran.stderr
