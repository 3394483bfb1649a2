"""Bodies of requests: text that can be written again, and not more of it than can be read while others wait."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import Field, WrapValidator

from .errors import ApiError

if TYPE_CHECKING:
    from pydantic import ValidatorFunctionWrapHandler

T = TypeVar("T")

# While JSON becomes Python's objects nothing else can run, and so while these become a request. With so many either takes about a tenth of
# a second.
MAX_PARTS = 100_000
"""Most strings, names of fields included, lists and objects of a body."""
MAX_VALUES = 1 << 20
"""Most values of a body of any kind, most of which can only be numbers."""
MAX_TOOLS = 1024
"""Most tools of a request; the grammar of their calls takes seconds to make, and the more for each."""

# Looking through so much is quicker than asking another thread to.
_SMALL_BYTES = 1 << 16
# The escape of a half of a character beyond U+FFFF; most are halves of a pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def check_body(body: bytes) -> None:
    """Refuses what has too many parts, what is not UTF-8, and JSON with half of a character: no tokens and no answer could be made of it.

    Raises:
        ApiError: it is such a body.
    """
    if len(body) <= _SMALL_BYTES:
        _check(body)
    else:
        await asyncio.to_thread(_check, body)


def _check(body: bytes) -> None:
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise ApiError(400, f"the body looks like {encoding}; it must be UTF-8")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}, {error.reason}") from None
    _check_parts(body)
    if not _SURROGATE.search(body):
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ApiError(
            400, f"the body has {half}, which is half of a character; the escapes of both halves must follow each other"
        ) from None
    except (ValueError, RecursionError):  # who parses it next says what is wrong
        return


def _check_parts(body: bytes) -> None:
    """Counts what the body is made of, as far as it is JSON; a parser reads no further either."""
    if len(body) <= MAX_PARTS:
        return
    body = body.replace(rb"\\", b"").replace(rb"\"", b"")  # then every quotation mark begins or ends a string
    strings = body.count(b'"') // 2
    outside = b"" if strings > MAX_PARTS else b"".join(body.split(b'"')[::2])
    parts = strings + outside.count(b"[") + outside.count(b"{")
    values = outside.count(b",") + 1
    for number, limit, what in ((parts, MAX_PARTS, "strings, lists and objects"), (values, MAX_VALUES, "values")):
        if number > limit:
            raise ApiError(400, f"the body has {number} {what}; there can be up to {limit}")


# ---- how much is told of what is wrong: an error takes longer than a value that is right


def _piecewise(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, dict):
        return check(value)
    entries = iter(value.items())
    checked: dict[Any, Any] = {}
    while piece := dict(itertools.islice(entries, 100)):
        checked |= check(piece)
    return checked


Items: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
"""A list in a request; only the first item that is wrong is told of."""
Entries: TypeAlias = Annotated[dict[str, T], WrapValidator(_piecewise)]
"""An object in a request; only the first entries that are wrong are told of."""
