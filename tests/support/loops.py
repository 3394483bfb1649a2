"""What tests of asyncio call event loops and what runs on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Loops", "Run", "until"]

Loops = Callable[[], asyncio.AbstractEventLoop]
"""Makes an event loop."""
Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""`asyncio.run` with a loop of some kind."""


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what the engine's thread does without telling."""
    while not condition():
        await asyncio.sleep(0.005)
