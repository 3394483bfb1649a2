"""What engines and contexts have for tracing expert routing."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from . import _logging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import _core
    from .routing import RoutingTrace


class _Traced(Protocol):
    """A native engine or context."""

    def start_trace(self, choices: bool, weights: bool) -> _core.RoutingTrace: ...
    def end_trace(self, trace: _core.RoutingTrace) -> None: ...


class _Tracing(Protocol):
    """What has one."""

    @property
    def _native(self) -> _Traced: ...


class TracingMethods:
    """For an engine or a context: what can be seen of its experts."""

    @contextlib.contextmanager
    def trace_routing(self: _Tracing, *, choices: bool = False, weights: bool = False) -> Iterator[RoutingTrace]:
        """Counts which experts the model's routers choose, while the block of a `with` runs.

        Counting begins with the next batch, and its end leaves out a batch that is being computed. It can be read meanwhile, from any
        thread. Several traces may run at once, and none changes what is computed. Without one, nothing is slower. A draft model's routing
        is not counted.

        Args:
            choices: keep the experts of each token too, two bytes for each of them: 768 bytes a token with 48 layers and 8 experts used.
            weights: keep the weights of the chosen experts too, four bytes for each.

        Raises:
            ClosedError: it was closed.
            InvalidOptionError: the model has no experts.
        """
        from .routing import RoutingTrace  # late: not everybody needs numpy

        _logging.sync_level()
        native = self._native.start_trace(choices, weights)
        try:
            yield RoutingTrace(native)
        finally:
            self._native.end_trace(native)
