"""`/v1/placement`: where the bytes of the loaded models are."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from llama_moe.placement import ExpertPlacement, as_placement

from .errors import ERROR_RESPONSES
from .pool import ServedModel
from .settings import ServerSettings
from .state import State

router = APIRouter(tags=["server"], responses=ERROR_RESPONSES)


class MemoryRow(BaseModel):
    """Bytes of one role on one device."""

    device: str
    role: str = Field(description='"experts", "weights" (all others), "adapters" (LoRA), "kv_cache", "compute" or "overhead".')
    bytes: int


class Memory(BaseModel):
    """All memory of a model and its context."""

    rows: list[MemoryRow]
    total_bytes: int


class PlacementRow(BaseModel):
    """Tensors of one role on one device."""

    device: str
    role: str = Field(description='"experts", "weights", "embedding" or "output".')
    tensors: int
    bytes: int


class TensorRow(BaseModel):
    """One tensor."""

    name: str
    device: str
    role: str
    bytes: int


class TensorPlacements(BaseModel):
    """Where a model's tensors are."""

    rows: list[PlacementRow]
    total_bytes: int
    tensors: list[TensorRow] | None = Field(default=None, description="Each of them, when asked for.")


class RequestsNow(BaseModel):
    """Requests of a model at this moment."""

    running: int
    waiting: int


class LoadedModel(BaseModel):
    """A model that is in memory."""

    model: str
    architecture: str
    loaded_at: float = Field(description="In seconds since 1970.")
    experts: str = Field(description='Where its experts were to go, such as "cpu_first(20)"; "none": it has none.')
    context_size: int = Field(description="Tokens for each request.")
    max_sequences: int = Field(description="Requests that are computed at once.")
    memory: Memory
    placement: TensorPlacements
    requests: RequestsNow
    generated_tokens: int = Field(description="Tokens generated since it was loaded.")


class Asked(BaseModel):
    """What the server's settings ask of every model."""

    experts: str
    context_size: int = Field(description="0: what a model was trained for.")
    context_pool: int | None
    parallel: int
    kv_type: str
    host_memory: str | None
    memory_budget: int | None = Field(description="Bytes of all models together.")
    ttl: float | None = Field(description="Seconds after which an unused model is unloaded.")
    trace_routing: bool


class PlacementReport(BaseModel):
    """The models in memory, and those on the way."""

    object: Literal["placement"] = "placement"
    models: list[LoadedModel]
    loading: dict[str, float] = Field(description="The share done, 0 to 1, of each model that is being loaded.")
    settings: Asked


@router.get("/v1/placement")
async def placement(
    state: State, tensors: Annotated[bool, Query(description="List every tensor with its device.")] = False
) -> PlacementReport:
    """Reports the memory of each loaded model by device and role, where its tensors are, and what was asked for."""
    experts = experts_text(state.settings)
    return PlacementReport(
        models=[_loaded(served, experts, tensors=tensors) for served in state.pool.loaded()],
        loading=state.pool.loading(),
        settings=_asked(state.settings, experts),
    )


def experts_text(settings: ServerSettings) -> str:
    """Where the experts are to go, for a person."""
    placement = as_placement(settings.experts)
    return "fit()" if placement == ExpertPlacement.fit() else repr(placement).removeprefix("ExpertPlacement.")


def _asked(settings: ServerSettings, experts: str) -> Asked:
    return Asked(
        experts=experts,
        context_size=settings.context_size,
        context_pool=settings.context_pool,
        parallel=settings.parallel,
        kv_type=settings.kv_type,
        host_memory=settings.host_memory,
        memory_budget=settings.memory_limit,
        ttl=settings.ttl,
        trace_routing=settings.trace_routing,
    )


def _loaded(served: ServedModel, experts: str, *, tensors: bool) -> LoadedModel:
    stats = served.engine.stats()
    return LoadedModel(
        model=served.name,
        architecture=served.model.architecture,
        loaded_at=served.loaded_at,
        experts=experts if served.model.expert_count else "none",
        context_size=served.engine.context_size,
        max_sequences=served.engine.max_sequences,
        memory=Memory.model_validate(served.memory.to_dict()),
        placement=_placements(served, tensors=tensors),
        requests=RequestsNow(running=int(stats["requests_running"]), waiting=int(stats["requests_waiting"])),
        generated_tokens=int(stats["generated_tokens"]),
    )


def _placements(served: ServedModel, *, tensors: bool) -> TensorPlacements:
    found = served.model.placement
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for tensor in found:
        groups[tensor.device, tensor.role].append(tensor.bytes)
    return TensorPlacements(
        rows=[PlacementRow(device=device, role=role, tensors=len(sizes), bytes=sum(sizes)) for (device, role), sizes in groups.items()],
        total_bytes=found.total_bytes,
        tensors=[TensorRow(name=each.name, device=each.device, role=each.role, bytes=each.bytes) for each in found] if tensors else None,
    )
