"""llama.cpp's log as records of `logging.getLogger("llama_moe")`."""

from __future__ import annotations

import atexit
import logging

from . import _core

logger = logging.getLogger("llama_moe")


def sync_level() -> None:
    """Tells the native side which lines the logger would drop anyway; every entry point that may log calls it."""
    level = logger.getEffectiveLevel() if logger.isEnabledFor(logging.CRITICAL) else logging.CRITICAL + 1
    _core.set_log_level(level)


def _emit(lines: list[tuple[int, str]]) -> None:
    for level, line in lines:
        logger.log(level, "%s", line)


def connect() -> None:
    """Connects the native log, and closes what is still open when the interpreter ends."""
    logger.addHandler(logging.NullHandler())
    _core.set_log_sink(_emit)
    sync_level()
    # Threads of ours must have ended before Python takes its modules apart.
    atexit.register(_core.shutdown)
