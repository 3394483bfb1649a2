"""Ctrl-C in the middle of a call."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

__all__ = ["press_ctrl_c", "stops_at_ctrl_c"]

# What is promised. On a busy machine one try may be late, for no fault of ours; not each of several.
SOON = 0.2
TRIES = 5


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def stops_at_ctrl_c(work: Callable[[], object], *, after: float = 0.3) -> None:
    """Presses Ctrl-C `after` seconds in `work`, which must end with KeyboardInterrupt, and in the best of some tries within 200 ms."""
    took: list[float] = []
    while len(took) < TRIES:
        took.append(_seconds_to_stop(work, after))
        if took[-1] < SOON:
            return
    raise AssertionError(f"Ctrl-C came through after {took} seconds")


def _seconds_to_stop(work: Callable[[], object], after: float) -> float:
    pressed: list[float] = []

    def press() -> None:
        pressed.append(time.perf_counter())
        press_ctrl_c()

    timer = threading.Timer(after, press)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 also if the key is pressed just before or after the work
        timer.start()
        try:
            work()
        finally:
            timer.cancel()
    return time.perf_counter() - pressed[0]
