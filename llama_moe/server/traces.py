"""Traces of the loaded models' expert routing: one for each, however many look at it."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_moe.routing import RoutingTrace

    from .pool import ServedModel


class RoutingTraces:
    """Begins and ends traces as models come and go, and as somebody wants to see them. All of it runs on one event loop.

    A trace costs speed, so a model without one is the rule. It keeps no model from being unloaded.

    Args:
        always: trace every model from its load on.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        self._watchers: Counter[str | None] = Counter()  # None: those who watch every model
        self._loaded: dict[str, ServedModel] = {}
        self._running: dict[str, tuple[RoutingTrace, contextlib.ExitStack]] = {}

    def of(self, model: str) -> RoutingTrace | None:
        """The trace of a model that runs now."""
        found = self._running.get(model)
        return None if found is None else found[0]

    @contextlib.contextmanager
    def watch(self, model: str | None) -> Iterator[None]:
        """Traces a model, loaded or not, or every one, inside of the `with` block; others may do so too, and see the same counts."""
        self._watchers[model] += 1
        self._update()
        try:
            yield
        finally:
            self._watchers[model] -= 1
            self._update()

    def on_load(self, served: ServedModel) -> None:
        """A model was loaded."""
        self._loaded[served.name] = served
        self._update()

    def on_unload(self, served: ServedModel) -> None:
        """A model is going to be closed."""
        self._loaded.pop(served.name, None)
        self._update()

    def _update(self) -> None:
        wanted = {name for name, served in self._loaded.items() if served.model.expert_count and self._is_wanted(name)}
        for name in self._running.keys() - wanted:
            self._running.pop(name)[1].close()
        for name in wanted - self._running.keys():
            stack = contextlib.ExitStack()
            self._running[name] = (stack.enter_context(self._loaded[name].engine.trace_routing()), stack)

    def _is_wanted(self, name: str) -> bool:
        return self._always or self._watchers[name] > 0 or self._watchers[None] > 0
