"""`/v1/routing`: which experts the loaded models choose."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from .errors import ERROR_RESPONSES, ApiError
from .state import ServerState, State
from .streaming import StreamResponse, json_event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from sse_starlette import ServerSentEvent

router = APIRouter(tags=["server"], responses=ERROR_RESPONSES)

# How soon a stream ends when the server stops.
_STOP_SECONDS = 0.5


class LayerCounts(BaseModel):
    """One layer that has experts."""

    layer: int = Field(description="Its number.")
    tokens: int = Field(description="Tokens that it computed.")
    counts: list[int] = Field(description="How often each expert was chosen.")
    top: list[tuple[int, float]] = Field(description="The most used experts, each with its share of the tokens, 0 to 1.")
    unused: int = Field(description="Experts that no token chose.")
    entropy: float = Field(description="1 when all experts are used alike, 0 when one takes all.")
    variation: float = Field(description="Standard deviation of the counts over their mean.")


class ModelRouting(BaseModel):
    """One model; the counts are there while it is traced."""

    model: str
    loaded: bool
    tracing: bool = Field(description="Whether its choices are counted; never so for a model without experts.")
    tokens: int = Field(default=0, description="Tokens that were computed since the trace began.")
    layer_count: int = Field(default=0, description="Layers, those without experts included.")
    expert_count: int = Field(default=0, description="Experts of each layer that has any.")
    experts_used: int = Field(default=0, description="Experts that compute each token.")
    layers: list[LayerCounts] = Field(default=[], description="The layers that have experts.")


class RoutingReport(BaseModel):
    """The counts of some moment."""

    object: Literal["routing"] = "routing"
    models: list[ModelRouting]


_Model = Annotated[str | None, Query(description="A model, loaded or not; without it, every loaded one.")]


@router.get("/v1/routing")
async def routing(state: State, model: _Model = None) -> RoutingReport:
    """Gives the counts so far of models that are traced now: by `--trace-routing`, or because somebody reads their stream."""
    await _check(state, model)
    return await asyncio.to_thread(_report, state, model)


@router.get(
    "/v1/routing/stream",
    status_code=200,
    response_class=StreamResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Events with a `RoutingReport` each."}},
)
async def routing_stream(
    request: Request,
    state: State,
    model: _Model = None,
    interval: Annotated[float, Query(ge=0.1, le=60, description="Seconds between two events.")] = 1.0,
) -> StreamResponse:
    """Streams the counts as server-sent events, each a `RoutingReport`, whenever they have changed.

    Reading it is what switches the counting on: it begins with the stream, unless it runs already, and ends with the last one.
    """
    await _check(state, model)
    held = contextlib.AsyncExitStack()
    held.enter_context(state.traces.watch(model))
    return StreamResponse(_events(state, model, interval), request=request, state=state, held=held)


async def _check(state: ServerState, model: str | None) -> None:
    if model is not None and model not in await state.pool.files():
        raise ApiError(404, f"the model {model!r} does not exist", param="model", code="model_not_found")


async def _events(state: ServerState, model: str | None, interval: float) -> AsyncGenerator[ServerSentEvent, None]:
    last = None
    while not state.stopping:
        report = await asyncio.to_thread(_report, state, model)
        if report != last:
            yield json_event(report.model_dump())
        last = report
        await _sleep(state, interval)


async def _sleep(state: ServerState, seconds: float) -> None:
    """Waits, but not for long once the server stops."""
    while seconds > 0 and not state.stopping:
        await asyncio.sleep(min(seconds, _STOP_SECONDS))
        seconds -= _STOP_SECONDS


def _report(state: ServerState, model: str | None) -> RoutingReport:
    names = [served.name for served in state.pool.loaded()]
    return RoutingReport(models=[_of(state, name, name in names) for name in (names if model is None else [model])])


def _of(state: ServerState, name: str, loaded: bool) -> ModelRouting:
    trace = state.traces.of(name)
    if trace is None:
        return ModelRouting(model=name, loaded=loaded, tracing=False)
    return ModelRouting.model_validate({"model": name, "loaded": loaded, "tracing": True} | trace.to_dict())
