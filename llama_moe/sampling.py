"""How a request chooses its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from . import _core
from ._options import fill
from .errors import InvalidOptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request; every field has a default.

    Attributes:
        max_tokens: most tokens to generate; None: until the model stops or the context is full.
        temperature: divides the logits; 0: always the most likely token (greedy), whatever the other fields say about chance.
        dynatemp_range: the temperature follows the entropy of the candidates, up to this far below and above `temperature`; 0: off.
        dynatemp_exponent: how it does: 1: in proportion.
        top_k: keep the `top_k` most likely tokens; 0: all.
        top_p: keep the smallest set of most likely tokens with at least this probability, 0 to 1; 1: all.
        min_p: keep tokens with at least this share of the best one's probability, 0 to 1; 0: all.
        typical_p: locally typical sampling (Meister et al. 2022, arXiv:2202.00666), 0 to 1; 1: off.
        top_n_sigma: keep tokens whose logit is at most this many standard deviations below the best; 0 or less: off.
        min_keep: candidates that top_p, min_p, typical_p and xtc leave at least.
        repeat_penalty: divides the logits of recent tokens; 1: off.
        presence_penalty: subtracted from the logit of each recent token; 0: off.
        frequency_penalty: subtracted from it once for each time it occurred; 0: off.
        penalty_window: how many recent tokens the penalties look at; 0: none; -1: the whole context.
        xtc_probability: chance of excluding the top choices at a token, 0 to 1; 0: off.
        xtc_threshold: least probability of a top choice for that, 0 to 1; above 0.5: off.
        dry_multiplier: strength of the "don't repeat yourself" penalty on repeated sequences; 0: off.
        dry_base: its base: the penalty is `dry_multiplier * dry_base ** (length - dry_allowed_length)`.
        dry_allowed_length: tokens a sequence may repeat without penalty.
        dry_penalty_window: tokens it looks back; 0: off; -1: the whole context.
        dry_sequence_breakers: strings across which no repetition is seen.
        mirostat: 1 or 2: version of Mirostat (Basu et al. 2020, arXiv:2007.14966), which replaces the other filters; 0: off.
        mirostat_tau: its target surprise, in bits.
        mirostat_eta: its learning rate.
        adaptive_target: prefer tokens near this probability, 0 to 1, aiming at it over time; best with min_p as the only filter. Negative:
            off.
        adaptive_decay: how much of earlier tokens it remembers, 0 to 0.99.
        infill: merge candidates of which one begins the other, and end early: for text between a prefix and a suffix.
        seed: 0 to 2**32 - 1; None: a random one. The same seed, prompt and placement give the same text.
        stop: a string or several; the first of them to appear ends the text, which does not include it.
        logprobs: None: none; n: the log-probability of each token and of the n most likely ones in its place.
        logit_bias: added to the logit of each token id.
        ignore_eos: never choose an end-of-generation token; a grammar that has come to its end still ends the text.
        grammar: a grammar in llama.cpp's GBNF with a rule `root` that the text must match. A text cut off by `max_tokens`, a stop string or
            the context's end is the beginning of one.
        json_schema: the text must be JSON of this JSON schema, given as JSON or as a mapping; {} is any JSON. What llama.cpp's
            conversion cannot express, such as `multipleOf`, `uniqueItems` or limits of numbers that are not integers, is not enforced;
            properties come in the order of the schema. Not together with `grammar`.

    Raises:
        InvalidOptionError: a value is outside its range, or the schema cannot be used. A bad grammar is found when it is used.
        TypeError: a value has the wrong type.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    min_keep: int = 1
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_window: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    adaptive_target: float = -1.0
    adaptive_decay: float = 0.9
    infill: bool = False
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    grammar: str | None = None
    json_schema: str | Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        # Copies, so that what the caller does to a list or dict of theirs changes nothing here.
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "dry_sequence_breakers", _strings("dry_sequence_breakers", self.dry_sequence_breakers))
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        object.__setattr__(self, "json_schema", schema_text("json_schema", self.json_schema))
        self._to_native().validate()

    def _to_native(self) -> _core.SamplingOptions:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["stop"] = list(self.stop)
        values["dry_sequence_breakers"] = list(self.dry_sequence_breakers)
        return fill(_core.SamplingOptions(), values)


def schema_text(name: str, schema: object) -> str | None:
    """A JSON schema as JSON; True is the schema of everything.

    Raises:
        InvalidOptionError: it cannot be written as JSON.
        TypeError: neither JSON nor a mapping.
    """
    if schema is None or isinstance(schema, str):
        return schema
    if schema is not True and not isinstance(schema, Mapping):
        raise TypeError(f"{name} must be JSON, as a str or a mapping, not {schema!r}")
    return to_json(name, schema)


def to_json(name: str, value: object) -> str:
    """The value as JSON.

    Raises:
        InvalidOptionError: it has what JSON does not.
    """
    import json

    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOptionError(f"{name} cannot be written as JSON: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def _strings(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a str or several, not {value!r}")
    strings = tuple(value)
    for item in strings:
        if not isinstance(item, str):
            raise TypeError(f"{name} must be a str or several, not {item!r}")
    return strings
