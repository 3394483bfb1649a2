"""What of an answer becomes a column."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llama_moe.errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pyarrow as pa

    from .rows import Answer

_VALUES: dict[str, Callable[[Any], object]] = {
    "text": lambda answer: answer.text,
    "finish_reason": lambda answer: answer.finish_reason,
    "tokens": lambda answer: list(answer.tokens),
    "logprobs": lambda answer: None if answer.logprobs is None else [token.logprob for token in answer.logprobs],
    "prompt_tokens": lambda answer: answer.prompt_tokens,
    "cached_tokens": lambda answer: answer.cached_tokens,
    "completion_tokens": lambda answer: len(answer.tokens),
    "reasoning": lambda answer: answer.reasoning,
    "tool_calls": lambda answer: [asdict(call) for call in answer.tool_calls],
}
_OF_CHATS = ("reasoning", "tool_calls")


def checked_outputs(outputs: str | Mapping[str, str], *, chat: bool) -> dict[str, str]:
    """The name of the column for each field of an answer.

    Raises:
        InvalidOptionError: an answer has no such field, or two of them have one column.
    """
    if isinstance(outputs, str):
        return {"text": outputs}
    known = [name for name in _VALUES if chat or name not in _OF_CHATS]
    for name in outputs:
        if name not in known:
            raise InvalidOptionError(f"output_columns has the field {name!r}; a {'chat' if chat else 'completion'} has {', '.join(known)}")
    names = list(outputs.values())
    if not names or len(set(names)) != len(names):
        raise InvalidOptionError(f"output_columns is {dict(outputs)!r}; it must name a different column for each of at least one field")
    return dict(outputs)


def text_column(values: Sequence[str | None]) -> pa.Array:
    """A column of texts, null where there is none, and of text also where all are null."""
    import pyarrow as pa

    return pa.array(values, type=pa.string())


def arrow_column(field: str, answers: Sequence[Answer | None]) -> pa.Array:
    """The field of each answer, null where there is none; always of the same type, so that batches fit together."""
    import pyarrow as pa

    types = {
        "text": pa.string(),
        "finish_reason": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float64()),
        "prompt_tokens": pa.int32(),
        "cached_tokens": pa.int32(),
        "completion_tokens": pa.int32(),
        "reasoning": pa.string(),
        "tool_calls": pa.list_(pa.struct([(name, pa.string()) for name in ("id", "name", "arguments")])),
    }
    value = _VALUES[field]
    return pa.array([None if answer is None else value(answer) for answer in answers], type=types[field])
