"""What a running application knows, and how its routes get at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

from fastapi import Depends, Request

from llama_moe import ChatCompletion, Completion

from .errors import shutting_down
from .figures import ServerMetrics
from .pool import ModelPool, ServedModel
from .settings import ServerSettings
from .traces import RoutingTraces

Observer: TypeAlias = Callable[[ServedModel, Completion | ChatCompletion], object]


@dataclass(slots=True, eq=False)
class ServerState:
    """Of one application; routes take it as a parameter of the type `State`.

    Attributes:
        settings: what is served, and how.
        pool: the models.
        traces: which experts they choose.
        metrics: what was counted.
        stopping: whether the server shuts down: new requests are refused.
        observers: called with each completion that a client was given, and its model.
    """

    settings: ServerSettings
    pool: ModelPool
    traces: RoutingTraces
    metrics: ServerMetrics
    stopping: bool = False
    observers: list[Observer] = field(default_factory=list)

    def completed(self, served: ServedModel, *completions: Completion | ChatCompletion) -> None:
        """Tells the observers of completions that a client is given now.

        Raises:
            ApiError: one of them was cut off by the end of its engine, so that none may be given as whole.
        """
        if any(completion.finish_reason == "cancelled" for completion in completions):
            raise shutting_down()
        for completion in completions:
            for observer in self.observers:
                observer(served, completion)


def _state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


State: TypeAlias = Annotated[ServerState, Depends(_state_of)]
