"""Options of sampling as mappings, which rows of a dataset and configuration files have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from llama_moe.errors import InvalidOptionError
from llama_moe.sampling import SamplingParams

_FIELDS = {item.name: str(item.type) for item in fields(SamplingParams)}


def as_sampling(sampling: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
    """The options, given as such or as a mapping of their fields; None: the defaults.

    Raises:
        InvalidOptionError: there is no such field, or a value is outside its range.
        TypeError: it is neither, or a value has the wrong type.
    """
    if isinstance(sampling, SamplingParams):
        return sampling
    return with_fields(SamplingParams(), {} if sampling is None else sampling)


def with_fields(params: SamplingParams, values: Mapping[str, Any]) -> SamplingParams:
    """The options with other values of some fields.

    Numbers and keys may be in the forms that a column of mappings makes of them: Arrow writes an integer as 3.0 where other rows have a
    gap, and keys as text.

    Raises:
        InvalidOptionError: there is no such field, or a value is outside its range.
        TypeError: it is no mapping, or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"sampling must be a SamplingParams or a mapping of its fields, not {values!r}")
    for name in values:
        if name not in _FIELDS:
            raise InvalidOptionError(f"SamplingParams has no field {name!r}; it has {', '.join(_FIELDS)}")
    return replace(params, **{name: _of_field(name, value) for name, value in values.items()})


def _of_field(name: str, value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and _FIELDS[name] in ("int", "int | None"):
        return int(value)
    if name == "logit_bias" and isinstance(value, Mapping):
        return {int(token): bias for token, bias in value.items()}
    return value
