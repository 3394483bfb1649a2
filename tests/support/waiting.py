"""Waiting for a state that nothing announces."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["eventually"]


def eventually(condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    """Whether `condition` becomes true. Returns as soon as it is; the limit is there for what never becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
