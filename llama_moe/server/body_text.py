"""Bodies of requests have to be text that can be written again, whatever a JSON parser makes of them."""

from __future__ import annotations

import json
import re

from .errors import ApiError

# The escape of a half of a character beyond U+FFFF; most are halves of a pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_text(body: bytes) -> None:
    """Refuses what is not UTF-8, and JSON with half of a character: neither tokens nor an answer could be made of it.

    Raises:
        ApiError: it is such a body.
    """
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        raise ApiError(400, f"the body looks like {encoding}; it must be UTF-8")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}, {error.reason}") from None
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
