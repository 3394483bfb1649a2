"""Loading a server's models, and whether there is memory for one more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import llama_moe
from llama_moe import ExpertPlacement, Model, Speculative
from llama_moe._sizes import format_size
from llama_moe.errors import DoesNotFitError
from llama_moe.placement import as_placement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from llama_moe import Engine, MemoryReport, Plan
    from llama_moe.placement import PlacementLike

    from .discovery import ModelFile
    from .settings import ServerSettings


def load_engine(settings: ServerSettings, path: Path, on_progress: Callable[[float], object]) -> Engine:
    """Loads a model as the settings say; the errors are those of `llama_moe.load`."""
    options = _planned_options(settings, path)
    # An argument that is not given is the profile's to fill.
    if as_placement(options["experts"]) == ExpertPlacement.fit():
        del options["experts"]
    for name in ("threads", "threads_batch", "profile"):
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    options["speculative"] = _speculative(settings)
    return llama_moe.load(path, **options, max_queue=settings.max_queue, on_progress=on_progress)


def _speculative(settings: ServerSettings) -> Speculative | None:
    if settings.draft is None:
        return None
    if settings.draft == "lookup":
        return Speculative.lookup()
    # Only the engine keeps it, and it goes with that.
    draft = Model(
        settings.draft, devices=settings.devices, repack=settings.repack is not False, expert_kernels=settings.expert_kernels or "auto"
    )
    return Speculative.draft(draft)


def _placement(settings: ServerSettings, path: Path) -> PlacementLike:
    """Where a model's experts go. What is asked for all models of a server asks of each what it has: layers, and experts."""
    placement = as_placement(settings.experts)
    if placement.kind in ("fit", "gpu", "rules"):
        return placement
    model = llama_moe.inspect(path)
    if not model.expert_count:
        return ExpertPlacement.fit()
    if placement.kind == "cpu_first":
        first = min(tensor.layer for tensor in model.tensors if tensor.role == "experts" and tensor.layer is not None)
        return replace(placement, count=min(placement.count, model.layer_count)) if placement.count > first else ExpertPlacement.gpu()
    return placement


def _planned_options(settings: ServerSettings, path: Path) -> dict[str, Any]:
    """The arguments of both `load` and `plan`."""
    options: dict[str, Any] = {
        "experts": _placement(settings, path),
        "context_size": settings.context_size,
        "context_pool": settings.context_pool,
        "max_sequences": settings.parallel,
        "kv_type": settings.kv_type,
        "devices": settings.devices,
        "lora": settings.lora,
    }
    for name in ("micro_batch_size", "host_memory", "repack", "expert_kernels"):
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    return options


class MemoryBudget:
    """What the models of a server may take together.

    That is `settings.memory_budget` in all, and on each device what it has free. Of host memory that is what was free before the first
    load: pages of mapped files count as free to the system, also while a model needs them.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._host_bytes: int | None = None

    def missing(self, file: ModelFile, loaded: Sequence[MemoryReport]) -> DoesNotFitError | None:
        """Why a model does not fit beside those that are loaded; None: it does.

        A model alone always does, unless `settings.memory_budget` is too small for it: its load tells more.
        """
        limit = self._settings.memory_limit
        if self._host_bytes is not None:
            left: int | None = max(self._host_bytes - sum(report.by_device().get("CPU", 0) for report in loaded), 0)
        else:
            left = None
        try:
            plan = self._plan(file, left if loaded else None)
        except DoesNotFitError as error:
            return error if loaded else None
        if self._host_bytes is None:
            self._host_bytes = plan.capacity["CPU"]
        if limit is not None:
            rest = max(limit - sum(report.total_bytes for report in loaded), 0)
            if plan.memory.total_bytes > rest:
                return DoesNotFitError(
                    f"it takes {format_size(plan.memory.total_bytes)}, and {format_size(rest)} of the memory budget of "
                    f"{format_size(limit)} is left"
                )
        if plan.fits or not loaded:
            return None
        missing = ", ".join(f"{device} lacks {format_size(size)}" for device, size in plan.shortfall.items())
        return DoesNotFitError(f"it does not fit beside the loaded models: {missing}", shortfall=plan.shortfall)

    def _plan(self, file: ModelFile, ram: int | None) -> Plan:
        return llama_moe.plan(file.path, **_planned_options(self._settings, file.path), ram=ram)
