"""What tests of asyncio call event loops and what runs on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["Loops", "Run"]

Loops = Callable[[], asyncio.AbstractEventLoop]
"""Makes an event loop."""
Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""`asyncio.run` with a loop of some kind."""
