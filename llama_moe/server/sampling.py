"""How a request says that its tokens are chosen: the OpenAI API's fields, and those of llama.cpp's server for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from llama_moe import SamplingParams
from llama_moe.errors import InvalidOptionError

from .bodies import Entries, Items
from .errors import ApiError
from .settings import ServerSettings

MAX_TOP_LOGPROBS = 20
Probability = Annotated[float, Field(ge=0, le=1)]


class FurtherSampling(BaseModel):
    """What llama.cpp's server takes beside an API's own fields; one that is not given has the default of `llama_moe.SamplingParams`."""

    model_config = ConfigDict(allow_inf_nan=False, strict=True)

    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63, description="The same seed and prompt give the same text.")
    top_k: int | None = Field(default=None, ge=0, description="Keep this many of the most likely tokens; 0: all.")
    min_p: Probability | None = Field(default=None, description="Keep tokens with this share of the best one's probability; 0: all.")
    typical_p: float | None = Field(default=None, gt=0, le=1, description="Locally typical sampling; 1: off.")
    top_n_sigma: float | None = Field(default=None, description="Keep tokens within so many standard deviations of the best; -1: off.")
    repeat_penalty: float | None = Field(default=None, gt=0, description="Divides the logits of recent tokens; 1: off.")
    repeat_last_n: int | None = Field(default=None, ge=-1, description="How many recent tokens the penalties see; -1: the whole context.")
    dynatemp_range: float | None = Field(default=None, ge=0, description="How far the temperature follows the entropy; 0: off.")
    dynatemp_exponent: float | None = Field(default=None, description="How it does; 1: in proportion.")
    xtc_probability: Probability | None = Field(default=None, description="Chance of excluding the top choices; 0: off.")
    xtc_threshold: Probability | None = Field(default=None, description="Least probability of a top choice for that.")
    dry_multiplier: float | None = Field(default=None, ge=0, description="Strength of the penalty on repeated sequences; 0: off.")
    dry_base: float | None = Field(default=None, description="Its base.")
    dry_allowed_length: int | None = Field(default=None, ge=0, description="Tokens that may repeat without it.")
    dry_penalty_last_n: int | None = Field(default=None, ge=-1, description="Tokens it looks back; 0: off; -1: the whole context.")
    dry_sequence_breakers: Items[str] | None = Field(default=None, description="Strings across which no repetition is seen.")
    mirostat: int | None = Field(default=None, ge=0, le=2, description="1 or 2: Mirostat in place of other filters; 0: off.")
    mirostat_tau: float | None = Field(default=None, description="Its target surprise, in bits.")
    mirostat_eta: float | None = Field(default=None, description="Its learning rate.")
    ignore_eos: bool | None = Field(default=None, description="Never choose an end-of-generation token.")
    grammar: str | None = Field(default=None, description="A GBNF grammar that the text matches.")
    json_schema: dict[str, Any] | None = Field(default=None, description="A JSON schema that the text is JSON of.")


class StreamOptions(BaseModel):
    """Of an answer that is streamed."""

    include_usage: bool | None = Field(default=None, description="Send the usage, in an event of its own before the end.")


class SamplingFields(FurtherSampling):
    """What completions and chats have in common."""

    temperature: float | None = Field(default=None, ge=0, description="Divides the logits; 0: always the most likely token.")
    top_p: Probability | None = Field(default=None, description="Keep the most likely tokens up to this probability; 1: all.")
    stop: str | Annotated[Items[str], Field(max_length=64)] | None = Field(default=None, description="The text ends before any of these.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Subtracted from the logit of each recent token.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Subtracted once for each time it occurred.")
    logit_bias: Entries[float] | None = Field(default=None, description="Added to the logit of each token id.")
    n: int | None = Field(default=None, ge=1, description="How many completions; 1 if not given.")
    stream: bool | None = Field(default=None, description="Send the answer as it comes, as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with `stream`.")


# Fields that SamplingParams has by another name.
_RENAMED = {"repeat_last_n": "penalty_window", "dry_penalty_last_n": "dry_penalty_window"}
_SEEDS = 1 << 32
_LEAST_TOP_P = 1e-6
_NOT_SAMPLING = {"n", "stream", "stream_options", "logit_bias"}


def sampling_params(fields: FurtherSampling, settings: ServerSettings, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The request's sampling.

    Args:
        fields: the request; it may have any of the fields of `SamplingFields`.
        settings: of the server, whose `max_tokens` limits the request's.
        max_tokens: what the request says of it.
        logprobs: how many alternatives to each token it asks for; None: no log-probabilities.

    Raises:
        ApiError: a value is out of range, or above the server's limit (400).
    """
    values: dict[str, Any] = {
        _RENAMED.get(name, name): value
        for name in SamplingFields.model_fields
        if name not in _NOT_SAMPLING and (value := getattr(fields, name, None)) is not None
    }
    if "top_p" in values:  # OpenAI's may be 0, which is the most likely token
        values["top_p"] = max(values["top_p"], _LEAST_TOP_P)
    if "seed" in values:
        values["seed"] %= _SEEDS
    limit = settings.max_tokens
    if limit is not None and max_tokens is not None and max_tokens > limit:
        raise ApiError(400, f"max_tokens is {max_tokens}; this server allows up to {limit}", param="max_tokens")
    try:
        return SamplingParams(
            **values,
            max_tokens=limit if max_tokens is None else max_tokens,
            logprobs=logprobs,
            logit_bias={_token_id(key): bias for key, bias in (getattr(fields, "logit_bias", None) or {}).items()},
        )
    except InvalidOptionError as error:
        raise ApiError(400, str(error)) from None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ApiError(400, f"logit_bias: {key!r} is not the id of a token", param="logit_bias")
    return int(key)


def with_seed(params: SamplingParams, index: int) -> SamplingParams:
    """The sampling of one of several completions: with a seed, each has one of its own that follows from it."""
    return params if params.seed is None or index == 0 else replace(params, seed=(params.seed + index) % _SEEDS)


def wants_usage(fields: SamplingFields) -> bool:
    """Whether the answer is a stream that ends with its usage.

    Raises:
        ApiError: it has the options of a stream, and is none.
    """
    if fields.stream_options is None:
        return False
    if not fields.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return bool(fields.stream_options.include_usage)


def check_choices(choices: int, settings: ServerSettings) -> None:
    """Refuses a request for more completions than one may ask for."""
    if choices > settings.max_choices:
        raise ApiError(400, f"the request asks for {choices} completions; this server allows up to {settings.max_choices}", param="n")
