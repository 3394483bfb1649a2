from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from llama_moe import SamplingParams, _core
from llama_moe.errors import InvalidOptionError


def as_plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_fields_and_defaults_are_those_of_the_native_options() -> None:
    native = _core.SamplingOptions()
    names = {name for name in dir(native) if not name.startswith("_") and name != "validate"}
    assert {item.name for item in fields(SamplingParams)} == names
    params = SamplingParams()
    for name in names:
        ours, theirs = as_plain(getattr(params, name)), getattr(native, name)
        # The native fields are 32-bit floats.
        assert ours == (pytest.approx(theirs, rel=1e-6) if isinstance(theirs, float) else theirs), name


OTHER_VALUES: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.0,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 2.0,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.25,
    "typical_p": 0.5,
    "top_n_sigma": 1.5,
    "min_keep": 3,
    "repeat_penalty": 1.25,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.75,
    "penalty_window": -1,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.25,
    "dry_multiplier": 0.5,
    "dry_base": 2.0,
    "dry_allowed_length": 4,
    "dry_penalty_window": 16,
    "dry_sequence_breakers": ("\t",),
    "mirostat": 2,
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.25,
    "adaptive_target": -2.0,
    "adaptive_decay": 0.5,
    "infill": True,
    "seed": 2**32 - 1,
    "stop": ("a", "b"),
    "logprobs": 5,
    "logit_bias": {3: -1.5},
    "ignore_eos": True,
    "grammar": 'root ::= "x"',
    "json_schema": None,
}


def test_every_field_reaches_the_native_options() -> None:
    assert OTHER_VALUES.keys() == {item.name for item in fields(SamplingParams)}
    native = SamplingParams(**OTHER_VALUES)._to_native()
    for name, value in OTHER_VALUES.items():
        assert getattr(native, name) == as_plain(value), name


def test_params_are_a_value() -> None:
    params = SamplingParams(**OTHER_VALUES)
    assert params == SamplingParams(**OTHER_VALUES)
    assert hash(params) == hash(SamplingParams(**OTHER_VALUES))
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert replace(params, seed=1) != params
    with pytest.raises(FrozenInstanceError):
        params.seed = 2  # type: ignore[misc]


def test_params_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(16)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_one_stop_string_is_a_sequence_of_one() -> None:
    assert SamplingParams(stop="END") == SamplingParams(stop=["END"])
    assert SamplingParams(stop="END").stop == ("END",)


def test_later_changes_of_what_was_given_do_not_matter() -> None:
    stop, bias = ["a"], {1: 0.5}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[2] = 1.0
    assert params == SamplingParams(stop=["a"], logit_bias={1: 0.5})


def test_numpy_numbers_are_numbers() -> None:
    values: dict[str, Any] = {"max_tokens": np.int64(3), "temperature": np.float32(0.5)}  # Any: to a type checker they are not
    native = SamplingParams(**values)._to_native()
    assert native.max_tokens == 3
    assert native.temperature == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("penalty_window", -2),
        ("mirostat", 3),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", [""]),
        ("logprobs", -1),
    ],
)
def test_a_value_out_of_range_is_refused_at_once_with_the_range(name: str, value: object) -> None:
    with pytest.raises(InvalidOptionError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", None),
        ("seed", "1"),
        ("stop", [3]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", [1, 2]),
        ("ignore_eos", 1),
        ("ignore_eos", None),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_name(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_json_schema_is_json_or_a_mapping() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    params = SamplingParams(json_schema=schema)
    assert params.json_schema == json.dumps(schema)
    assert params == SamplingParams(json_schema=json.dumps(schema))
    assert hash(params) == hash(SamplingParams(json_schema=MappingProxyType(schema)))
    schema["type"] = "array"
    assert "array" not in str(params.json_schema)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "not JSON"),
        ("3", "must be an object"),
        ({"type": "word"}, "word"),
        ({"$ref": "#/$defs/none"}, "cannot resolve"),
        ({"type": "string", "pattern": "a(?=b)"}, "cannot be enforced"),
        ({"enum": [float("nan")]}, "JSON"),
        ({"enum": [object()]}, "JSON"),
        ("[" * 100_000, "nested"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_at_once(schema: Any, reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=reason) as caught:
        SamplingParams(json_schema=schema)
    assert "json_schema" in str(caught.value)


def test_a_grammar_and_a_schema_exclude_each_other() -> None:
    with pytest.raises(InvalidOptionError, match="one of them"):
        SamplingParams(grammar='root ::= "x"', json_schema={})
    with pytest.raises(InvalidOptionError, match="grammar is empty"):
        SamplingParams(grammar=" ")
    for wrong in ({"grammar": 3}, {"json_schema": 3}, {"infill": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            SamplingParams(**wrong)  # type: ignore[arg-type]
