"""What `tune()` varies, and which values of it are worth a trial."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from . import _core
from ._placements import parse_placement
from .errors import DoesNotFitError
from .placement import ExpertPlacement
from .planning import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .devices import Device
    from .inspection import ModelInfo
    from .planning import Plan
    from .profiles import Objective, TunedOptions
    from .trials import TrialTask

_MICRO_BATCHES = (64, 128, 256, 512, 1024, 2048)


class Space:
    """The options of one model with these accelerators.

    Args:
        info: the model's header.
        task: how it is used.
        accelerators: the devices with memory of their own.
        vram: most bytes on each of them; None: what is free.
        default: the defaults of a load.
    """

    def __init__(
        self, info: ModelInfo, task: TrialTask, accelerators: Sequence[Device], *, vram: int | None, default: TunedOptions
    ) -> None:
        self._info = info
        self._task = task
        self._accelerators = accelerators
        self._vram = vram
        self._default = default

    @property
    def has_placements(self) -> bool:
        """Whether there are experts, and an accelerator to have them or not."""
        return bool(self._accelerators and self._info.expert_count)

    @property
    def layer_count(self) -> int:
        """Transformer blocks."""
        return self._info.layer_count

    def dimensions(self, of_all: Objective) -> list[tuple[Objective, Callable[[TunedOptions], list[TunedOptions]]]]:
        """What is varied, and the speed it is varied for: the objective, or the only one it has a part in."""
        decode: Objective = "mixed" if of_all == "mixed" else "decode"
        prompt: Objective = "mixed" if of_all == "mixed" else "prompt"
        return [
            (of_all, self._layouts),
            (of_all, self._host_memories),
            (decode, self._threads),
            (prompt, self._batch_threads),
            (prompt, self._micro_batches),
        ]

    def _layouts(self, best: TunedOptions) -> list[TunedOptions]:
        # How weights lie in host memory, and with that what computes with them.
        layouts = [replace(best, repack=True, expert_kernels="auto"), replace(best, repack=True, expert_kernels="ggml")]
        return [each for each in (*layouts, replace(best, repack=False, expert_kernels="auto")) if each != best]

    def _host_memories(self, best: TunedOptions) -> list[TunedOptions]:
        local = any(device.backend != "RPC" for device in self._accelerators)
        return [replace(best, host_memory="mmap"), replace(best, host_memory="pageable")] + (
            [replace(best, host_memory="pinned")] if local else []
        )

    def _threads(self, best: TunedOptions) -> list[TunedOptions]:
        # Prompts keep what they have: by default it follows.
        threads, batch = _threads_of(best)
        return [_with_threads(best, count, batch) for count in _thread_counts() if count != threads]

    def _batch_threads(self, best: TunedOptions) -> list[TunedOptions]:
        threads, batch = _threads_of(best)
        return [_with_threads(best, threads, count) for count in _thread_counts() if count != batch]

    def _micro_batches(self, best: TunedOptions) -> list[TunedOptions]:
        sizes = [size for size in _MICRO_BATCHES if size <= self._task.prompt_tokens]
        return [replace(best, micro_batch_size=size) for size in sizes if size != best.micro_batch_size]

    def layers_that_fit(self) -> int:
        """The N of the "first:N" that moves all experts that "fit" puts into host memory, in whole or in part; all if it finds no way."""
        try:
            placement = self._plan(parse_placement(self._default.experts)).placement
        except DoesNotFitError:
            return self._info.layer_count
        where = {tensor.name: tensor.device for tensor in placement}
        names = {device.name for device in self._accelerators}
        experts = [tensor for tensor in self._info.tensors if tensor.role == "experts" and where.get(tensor.name) not in names]
        return max((tensor.layer + 1 for tensor in experts if tensor.layer is not None), default=0)

    def may_fit(self, count: int) -> bool:
        """Whether the experts of so many layers in host memory leave what is within the limit that was given; not if they have none."""
        if count and not any(
            tensor.role == "experts" and tensor.layer is not None and tensor.layer < count for tensor in self._info.tensors
        ):
            return False  # layers before the first one with experts: no load takes that
        if self._vram is None:
            return True
        used = self._plan(ExpertPlacement.cpu_first(count)).memory.by_device()
        return all(used.get(device.name, 0) <= self._vram for device in self._accelerators)

    def _plan(self, experts: ExpertPlacement) -> Plan:
        task = self._task
        return plan(
            task.path,
            experts=experts,
            devices=self._accelerators,
            context_size=task.context_size,
            max_sequences=task.max_sequences,
            lora=task.lora,
        )


def _threads_of(options: TunedOptions) -> tuple[int, int]:
    threads = options.threads or _core.usable_cores()
    return threads, options.threads_batch or threads


def _with_threads(options: TunedOptions, threads: int, batch: int) -> TunedOptions:
    """The options with these numbers, None where that is the same, so that nothing is tried twice under two names."""
    return replace(
        options,
        threads=None if threads == _core.usable_cores() else threads,
        threads_batch=None if batch == threads else batch,
    )


def _thread_counts() -> list[int]:
    """What is worth trying: cores, half of them, one less, and all that the system counts with several threads on a core."""
    cores = _core.usable_cores()
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or cores
    return sorted({cores, max(cores // 2, 1), max(cores - 1, 1), max(logical, cores)})
