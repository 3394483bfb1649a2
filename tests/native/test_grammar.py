"""What a grammar or a schema promises holds for every seed and temperature."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from llama_moe import Engine, Model, SamplingParams
from llama_moe.errors import InvalidOptionError
from tests.support.processes import run_python


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    with Engine(model, context_size=512, max_sequences=2, threads=1) as engine:
        yield engine


# A grammar, and the same language as a regular expression.
GRAMMARS = [
    ('root ::= ("yes" | "no") ("," [0-9]{1,3})?', r"(yes|no)(,[0-9]{1,3})?"),
    ('root ::= word (" " word){0,3} "."\nword ::= [a-z]{1,5}', r"[a-z]{1,5}( [a-z]{1,5}){0,3}\."),
    ('root ::= "é" [\u0430-\u0434]{2} "🦙"', "é[\u0430-\u0434]{2}🦙"),
    ('root ::= nested\nnested ::= "(" nested? ")"', r"\(+\)+"),
    ("root ::= [^a-y \\n]{3}", r"[^a-y \n]{3}"),
]

sampling = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 4.0]),
        "top_k": st.sampled_from([0, 1, 40, 200]),
        "repeat_penalty": st.sampled_from([1.0, 1.3]),
        "ignore_eos": st.booleans(),
    }
)


@pytest.mark.parametrize(("grammar", "pattern"), GRAMMARS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=sampling)
def test_a_finished_text_is_of_the_grammar(engine: Engine, grammar: str, pattern: str, options: dict[str, Any]) -> None:
    completion = engine.generate("Say:", SamplingParams(grammar=grammar, max_tokens=120, **options))
    if completion.finish_reason == "stop":
        assert re.fullmatch(pattern, completion.text), completion.text
    else:
        assert "nested" in grammar  # the only one without an end of its own


def conforms(value: object, schema: dict[str, Any]) -> bool:
    """A JSON Schema check of what these tests use."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema.get("type"):
        case "object":
            names = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema.get("required", ())) <= set(value) <= set(names)
                and all(conforms(value[name], names[name]) for name in value)
            )
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
                and all(conforms(item, schema["items"]) for item in value)
            )
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool) and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case other:
            raise AssertionError(other)


leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, st.integers(-50, 50), st.integers(0, 200)),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(1, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none()), min_size=1, max_size=3)),
)
names = st.sampled_from(["a", "b", "long name", 'quote"', "ü"])
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
            inner,
            st.integers(0, 2),
            st.integers(1, 2),
        ),
        st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
            lambda properties: st.builds(
                lambda required: {"type": "object", "properties": properties, "required": sorted(required), "additionalProperties": False},
                st.sets(st.sampled_from(sorted(properties))),
            )
        ),
    ),
    max_leaves=4,
)


def longest(schema: dict[str, Any]) -> int:
    """Bytes of the longest JSON of a schema, without white space and with every character escaped."""
    if "enum" in schema:
        return max(len(json.dumps(value)) for value in schema["enum"])
    match schema["type"]:
        case "object":
            return 2 + sum(len(json.dumps(name)) + 2 + longest(inner) for name, inner in schema["properties"].items())
        case "array":
            return 2 + int(schema["maxItems"]) * (longest(schema["items"]) + 1)
        case "string":
            return 2 + 12 * int(schema["maxLength"])
        case _:
            return 8


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas, options=sampling)
def test_a_finished_text_is_json_of_the_schema(engine: Engine, schema: dict[str, Any], options: dict[str, Any]) -> None:
    assume(longest(schema) < 400)
    # The grammar lets white space go on for long, but has to come to its end: no token is only that.
    spaces = dict.fromkeys({token for text in " \n\t" for token in engine.model.tokenize(text)} - {engine.model.bos_token}, -100.0)
    completion = engine.generate("JSON:", SamplingParams(json_schema=schema, max_tokens=450, logit_bias=spaces, **options))
    assert completion.finish_reason == "stop", completion.text
    assert conforms(json.loads(completion.text), schema), completion.text


def test_requests_with_and_without_a_grammar_share_a_batch(engine: Engine) -> None:
    params = [SamplingParams(grammar="root ::= [0-9]{20}", seed=1), SamplingParams(max_tokens=20, seed=1)]
    digits, plain = engine.generate(["One", "Two"], params)
    assert re.fullmatch("[0-9]{20}", digits.text)
    assert plain.text == engine.generate("Two", params[1]).text


def test_log_probabilities_are_those_before_the_grammar(engine: Engine) -> None:
    params = SamplingParams(temperature=0, grammar='root ::= "z" "q"', logprobs=2)
    completion = engine.generate("Hello", params)
    assert completion.text == "zq"
    assert completion.logprobs is not None
    first = completion.logprobs[0]
    assert first.top_logprobs is not None
    assert first.logprob is not None
    assert first.logprob < first.top_logprobs[0].logprob  # type: ignore[operator]
    assert first.top_logprobs[0].id == engine.generate("Hello", SamplingParams(temperature=0, max_tokens=1)).tokens[0]


BAD_GRAMMARS = [
    ("root := 1", "expecting ::="),
    ("root ::= missing", "missing"),
    ('start ::= "x"', "root"),
    ('root ::= root "x" | "y"', "left recursion"),
    ('root ::= "x', "unexpected end"),
    ("root ::= " + "(" * 3000, "3000"),
    ("root ::= [a-z]{100000}", "repetitions"),
]


@pytest.mark.parametrize(("grammar", "reason"), BAD_GRAMMARS)
def test_a_bad_grammar_is_refused_with_the_reason(engine: Engine, grammar: str, reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason):
        engine.stream("x", SamplingParams(grammar=grammar))
    assert engine.generate("x", SamplingParams(grammar='root ::= "fine"')).text == "fine"


NESTED = 'a ::= "a"{0,40}\nb ::= a{0,40}\nc ::= b{0,40}\nd ::= c{0,40}\ne ::= d{0,40}\n'
AMBIGUOUS = [
    ({"grammar": 'root ::= (("a"?){100}){100}'}, "a{8}"),
    ({"grammar": 'a ::= "a"{0,40}\nb ::= a{0,40}\nroot ::= b{0,40}'}, "a{8}"),
    ({"grammar": 'root ::= ([ ]? [ ]?)* "x"'}, " {8}| {0,7}x"),
    ({"json_schema": {"type": "string", "pattern": "^((a{0,30}){0,30})*b$"}}, r'"a{7}|"a{0,6}b("\s*)?'),
    ({"grammar": NESTED + "root ::= e"}, None),
    ({"grammar": NESTED + 'root ::= "x" e'}, None),
    ({"json_schema": {"type": "string", "pattern": "^(((((a{0,30}){0,30}){0,30}){0,30}){0,30})*b$"}}, None),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("options", "pattern"), AMBIGUOUS)
def test_what_can_be_read_in_very_many_ways_is_followed_or_refused_and_disturbs_nobody(
    engine: Engine, options: dict[str, Any], pattern: str | None
) -> None:
    plain = SamplingParams(temperature=0, max_tokens=30)
    alone = engine.generate("Hello", plain).text
    with engine.stream("Hello", plain) as beside:
        begun = str(next(beside))
        letters = {engine.model.tokenize(letter, add_special=False)[-1]: 20.0 for letter in "a "}
        params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True, logit_bias=letters, **options)
        if pattern is None:
            with pytest.raises(InvalidOptionError, match="too ambiguous"):
                engine.generate("Say:", params)
        else:
            text = engine.generate("Say:", params).text
            assert re.fullmatch(pattern, text), text
        assert begun + "".join(map(str, beside)) == alone


def test_a_reason_that_quotes_a_part_of_a_character_can_be_read(engine: Engine) -> None:
    """llama.cpp and we cut long quotations by bytes."""
    for length in range(60, 64):
        with pytest.raises(InvalidOptionError, match="grammar: parse: error"):
            engine.generate("x", SamplingParams(grammar="root ::= " + "a" * length + "€" * 100))


def test_nothing_is_printed_about_bad_grammars(tiny_model: Callable[[str], Path]) -> None:
    script = f"""
import contextlib
from llama_moe import Engine, Model, SamplingParams
with contextlib.suppress(ValueError):
    SamplingParams(json_schema={{"pattern": "(?=a)"}})
engine = Engine(Model({str(tiny_model("llama"))!r}, devices=[]), context_size=64, threads=1)
for options in ({{"grammar": "root := 1"}}, {{"grammar": "root ::= a"}}, {{"json_schema": {{"pattern": "(?=a)"}}}}):
    with contextlib.suppress(ValueError):
        engine.generate("x", SamplingParams(**options))
"""
    ran = run_python(script)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
