"""Sizes in bytes: reading "8GiB" and writing "7.45 GiB"."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

from .errors import InvalidOptionError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE | re.ASCII)


def parse_size(value: SupportsIndex | str, name: str = "size") -> int:
    """Bytes of `value`: an integer, or a number with a unit ("8GiB", "512 MiB", "1.5GB").

    KiB, MiB, GiB and TiB are powers of 1024; kB, MB, GB and TB are powers of 1000.

    Raises:
        InvalidOptionError: the text is not a size, or the number is negative. `name` says which option it was.
        TypeError: neither text nor an integer.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise InvalidOptionError(f"{name}: {value!r} is not a size; expected bytes as an int, or text such as '8GiB' or '1.5GB'")
        return round(float(match[1]) * unit)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be bytes as an int, or text such as '8GiB', not {value!r}")
    number = operator.index(value)
    if number < 0:
        raise InvalidOptionError(f"{name}: {number} is negative; expected 0 bytes or more")
    return number


def parse_rate(value: float | str, name: str = "bandwidth") -> float:
    """Bytes per second of `value`: a number, or a size with "/s" ("448GB/s").

    Raises:
        InvalidOptionError: the text is not a rate, or the number is not positive. `name` says which option it was.
        TypeError: neither text nor a number.
    """
    if isinstance(value, str):
        size, slash, unit = value.rpartition("/")
        if slash and unit.strip() == "s" and _SIZE.fullmatch(size):
            return float(parse_size(size, name))
        raise InvalidOptionError(f"{name}: {value!r} is not a rate; expected bytes per second as a number, or text such as '448GB/s'")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be bytes per second as a number, or text such as '448GB/s', not {value!r}")
    if not value > 0:
        raise InvalidOptionError(f"{name}: {value} is not a rate; it must be more than 0")
    return float(value)


def format_size(size: int) -> str:
    """`size` bytes for a person, in the largest unit up to GiB that makes at least 1."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{size / KIB:.1f} KiB"
    return f"{size} B"
