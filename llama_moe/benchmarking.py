"""Measuring a model on this machine: memory, speed and quality under each placement."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, _table
from ._machine import cpu_name, machine_id
from ._options import fill_context
from ._placements import parse_placement, placement_name
from ._speed import check_test, measure_speed, tokens_needed
from .benchmark_report import BenchmarkReport, BenchmarkRow, ModelFacts
from .build import build_info
from .devices import chosen_accelerators
from .devices import devices as all_devices
from .engine import Engine
from .errors import InvalidOptionError, LlamaMoeError, PlacementError
from .inspection import inspect
from .lora import as_adapters
from .model import Model, model_options, resolve_placement
from .quality import QualityMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .devices import Device
    from .inspection import ModelInfo
    from .lora import LoraLike
    from .model import DevicesLike, ExpertKernels, HostMemory, StrPath
    from .placement import ExpertPlacement, PlacementLike

__all__ = ["benchmark", "bytes_on"]

_CONTEXT = 4096  # as of `load()`


def benchmark(
    path: StrPath,
    *,
    placements: Sequence[PlacementLike | str] | None = None,
    prompt_tokens: int = 512,
    generate_tokens: int = 128,
    repetitions: int = 3,
    context_size: int | None = None,
    micro_batch_size: int = 512,
    threads: int | None = None,
    threads_batch: int | None = None,
    devices: DevicesLike | None = None,
    host_memory: HostMemory = "mmap",
    repack: bool = True,
    expert_kernels: ExpertKernels = "auto",
    lora: LoraLike = (),
    quality: str | None = None,
    quality_tokens: int | None = 1024,
    against: StrPath | None = None,
    on_progress: Callable[[str], object] | None = None,
) -> BenchmarkReport:
    """Measures memory and speed of a model under several placements, and what each makes of a text if one is given.

    The speeds can be compared with llama-bench's: prompts of random tokens into an empty cache, tokens one after the other from an empty
    context, one run before each test to warm up, mean and standard deviation of the repetitions. They are an engine's as its users get
    them, sampling included, which llama-bench leaves out. Each placement is loaded once and all its repetitions are made in that load. A
    placement that fails is a row with its error, and the others are measured all the same.

    Args:
        path: a GGUF file; the first one of a split model.
        placements: an `ExpertPlacement`, or "gpu", "cpu", "fit", "fit:8GiB", "first:12" or "last:4", for each row. None: "gpu", "cpu" and
            "fit"; only "gpu" where that makes no difference, without an accelerator or without experts.
        prompt_tokens: length of the prompts; 0: no such test.
        generate_tokens: tokens to generate; 0: no such test.
        repetitions: of each test.
        context_size: as for `load()`, 0 included; None: 4096, or more if the tests need more.
        micro_batch_size: as for `load()`.
        threads: as for `load()`.
        threads_batch: as for `load()`.
        devices: as for `load()`.
        host_memory: as for `load()`.
        repack: as for `load()`.
        expert_kernels: as for `load()`.
        lora: as for `load()`; with `against`, for both files.
        quality: a text to read under each placement, as `compare()` does it; the first row that could be loaded is the reference.
        quality_tokens: how much of the text to use; None: all.
        against: another file, such as another quantisation, to measure under each of the placements too.
        on_progress: called with what is done next.

    Raises:
        FileNotFoundError: no such file.
        ModelLoadError: a file's header cannot be read.
        InvalidOptionError: a number is out of range, or `placements` is empty.
        PlacementError: a device does not exist.
    """
    context = max(_CONTEXT, tokens_needed(prompt_tokens, generate_tokens)) if context_size is None else context_size
    check_test(prompt_tokens=prompt_tokens, generate_tokens=generate_tokens, repetitions=repetitions, context_size=context)
    files = [inspect(file) for file in (path, against) if file is not None]
    found = chosen_accelerators(devices)
    chosen = _default_placements(files, found) if placements is None else placements
    if not chosen:
        raise InvalidOptionError("placements is empty; it must have one placement or more")
    session = _Session(
        accelerators=found,
        model_options={
            "devices": devices,
            "host_memory": host_memory,
            "repack": repack,
            "expert_kernels": expert_kernels,
            "lora": lora,
        },
        engine_options={
            "context_size": context,
            "micro_batch_size": micro_batch_size,
            "batch_size": max(2048, micro_batch_size),
            "threads": threads,
            "threads_batch": threads_batch,
        },
        test={"prompt_tokens": prompt_tokens, "generate_tokens": generate_tokens, "repetitions": repetitions},
        on_progress=on_progress or (lambda _: None),
    )
    with contextlib.ExitStack() as stack:
        if quality is not None:
            session.meter = stack.enter_context(QualityMeter(quality, max_tokens=quality_tokens, threads=threads))
        measured = [session.measure(info, placement) for placement in chosen for info in files]
    rows = tuple(session.compare_memory(row, measured) for row in measured)
    return BenchmarkReport(
        rows=rows,
        models=tuple(session.facts(info) for info in files),
        accelerators=tuple(found),
        machine={"cpu": cpu_name(), "id": machine_id()},
        build=build_info(),
        threads=session.threads[0] if session.threads else None,
        threads_batch=session.threads[1] if session.threads else None,
        context_size=session.context_size,
        micro_batch_size=micro_batch_size,
        host_memory=host_memory,
        repack=repack,
        expert_kernels=expert_kernels,
        notes=(*_notes(rows, files, found), *(f"with the LoRA adapter {each.path} x {each.scale:g}" for each in as_adapters(lora))),
    )


def bytes_on(devices: Sequence[Device], by_device: dict[str, int]) -> int:
    """The bytes that a report by device has on these."""
    return sum(by_device.get(device.name, 0) for device in devices)


def _default_placements(files: Sequence[ModelInfo], found: Sequence[Device]) -> tuple[str, ...]:
    return ("gpu", "cpu", "fit") if found and all(info.expert_count for info in files) else ("gpu",)


class _Session:
    """The loads of one report."""

    def __init__(
        self,
        *,
        accelerators: Sequence[Device],
        model_options: dict[str, Any],
        engine_options: dict[str, Any],
        test: dict[str, int],
        on_progress: Callable[[str], object],
    ) -> None:
        self.meter: QualityMeter | None = None
        self.threads: tuple[int, int] | None = None
        self.context_size: int = engine_options["context_size"]
        self._accelerators = accelerators
        self._model_options = model_options
        self._engine_options = engine_options
        self._test = test
        self._on_progress = on_progress
        self._descriptions: dict[str, str] = {}

    def measure(self, info: ModelInfo, placement: PlacementLike | str) -> BenchmarkRow:
        """Loads a file under a placement and measures it; a failure of this placement becomes the row's error."""
        name = placement_name(placement)
        try:
            policy = parse_placement(placement)
        except (InvalidOptionError, PlacementError) as error:
            return BenchmarkRow(model=info.path, placement=name, error=_line(error))
        try:
            return self._measure(info, name, policy)
        except InvalidOptionError:
            raise  # an option of all placements
        except (LlamaMoeError, OSError) as error:
            return BenchmarkRow(model=info.path, placement=name, error=_line(error))

    def _load(self, info: ModelInfo, policy: ExpertPlacement) -> Model:
        """The model, with which "fit" leaves room for the engine that is measured."""
        options = model_options(**self._model_options, fit_for=fill_context(_core.EngineOptions(), **self._engine_options))
        return Model._load_for(info.path, policy, options, None)

    def _measure(self, info: ModelInfo, name: str, policy: ExpertPlacement) -> BenchmarkRow:
        where = f"{name}, {Path(info.path).name}"
        self._on_progress(f"{where}: loading")
        free_before = self._free_memory()
        begin = time.perf_counter()
        with self._load(info, policy) as model:
            with Engine(model, **self._engine_options) as engine:
                load_seconds = time.perf_counter() - begin
                free_after = self._free_memory()
                self.threads = (engine.threads, engine.threads_batch)
                self.context_size = engine.context_size
                self._descriptions[info.path] = model.description
                memory = engine.memory()
                self._on_progress(f"{where}: measuring the speed")
                speed = measure_speed(engine, **self._test)
            quality, failure = None, None
            if self.meter is not None:
                self._on_progress(f"{where}: reading the text")
                try:
                    quality = self.meter.measure(model)
                except (LlamaMoeError, OSError) as error:
                    failure = _line(error)
        return BenchmarkRow(
            model=info.path,
            placement=name,
            error=failure,
            memory=memory,
            device_bytes=bytes_on(self._accelerators, memory.by_device()),
            free_memory_drop={device: free - free_after[device] for device, free in free_before.items()},
            load_seconds=load_seconds,
            speed=speed,
            quality=quality,
        )

    def compare_memory(self, row: BenchmarkRow, rows: Sequence[BenchmarkRow]) -> BenchmarkRow:
        """The row with what it saves against "gpu"."""
        if row.memory is None or row.device_bytes is None or not self._accelerators:
            return row
        same_file = (other for other in rows if other.model == row.model and other.placement == "gpu")
        measured = next((other.device_bytes for other in same_file if other.device_bytes is not None), None)
        if measured is not None:
            everything, kept = measured, row.device_bytes
        else:
            by_role = (cell for cell in row.memory.rows if cell.role in ("experts", "weights"))
            kept = bytes_on(self._accelerators, _table.totals((cell.device, cell.bytes) for cell in by_role))
            placement = resolve_placement(row.model, experts="gpu", devices=self._model_options["devices"])
            everything = bytes_on(self._accelerators, placement.by_device())
        return replace(
            row,
            saved_bytes=everything - kept,
            reduction=(everything - kept) / everything if everything else 0.0,
            baseline="weights" if measured is None else "measured",
        )

    def facts(self, info: ModelInfo) -> ModelFacts:
        """What a report says of a file."""
        return ModelFacts(
            path=info.path,
            description=self._descriptions.get(info.path, ""),
            size_bytes=info.size_bytes,
            parameter_count=info.parameter_count,
        )

    def _free_memory(self) -> dict[str, int]:
        names = {device.name for device in self._accelerators if device.backend != "RPC"}
        return {device.name: device.memory_free for device in all_devices() if device.name in names}


def _line(error: LlamaMoeError | OSError) -> str:
    return "; ".join(str(error).splitlines())


def _notes(rows: Sequence[BenchmarkRow], files: Sequence[ModelInfo], found: Sequence[Device]) -> list[str]:
    notes = []
    if not found:
        notes.append("there is no accelerator: under every placement all of the model is in host memory, and none saves anything")
    elif not all(info.expert_count for info in files):
        notes.append("a model without experts has one placement only, which is that of its layers")
    if any(row.baseline == "weights" for row in rows):
        notes.append('"gpu" was not measured: what is saved against it is that of the weights alone, known from their placement')
    if any(row.speed is not None and (row.speed.prompt or row.speed.decode) for row in rows):
        notes.append("speeds are mean ± standard deviation of the repetitions within one load, as of llama-bench, but with sampling")
    if len(files) > 1:
        notes.append(f"model 1 is {files[0].path}, model 2 is {files[1].path}")
    return notes
