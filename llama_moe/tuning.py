"""Finding the options with which a model is quickest on this machine."""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from . import _core
from ._options import fill_context
from ._placements import parse_placement, placement_name
from ._sizes import parse_size
from ._speed import check_test
from .benchmarking import accelerators, bytes_on
from .build import build_info
from .devices import add_rpc_device
from .errors import DoesNotFitError, InvalidOptionError, LlamaMoeError
from .inspection import inspect
from .model import resolve_placement
from .placement import ExpertPlacement
from .profiles import Objective, Profile, TunedOptions, profile_key
from .trials import Journal, OutOfTime, Trial, TrialTask, run_trial
from .tuning_report import TuningReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import SupportsIndex

    from .devices import Device
    from .inspection import ModelInfo
    from .model import StrPath
    from .profiles import ProfileKey

__all__ = ["tune"]

_LOG = logging.getLogger("llama_moe")

# A gain that is smaller may be chance: repeated measurements on a quiet machine differ by about as much.
_NOTICEABLE = 1.02
# Trials in search of the best begin in this share of the time; the rest is for repeating the best ones.
_SEARCH_SHARE = 0.7
_FINAL_ROUNDS = 2
_PASSES = 3
_MICRO_BATCHES = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class TuningProgress:
    """How far a sweep is.

    Attributes:
        options: what is being tried.
        number: of the trial, from 1, those of earlier sweeps that were kept included.
        share: of the time that may be used, 0 to 1.
    """

    options: TunedOptions
    number: int
    share: float


def tune(
    path: StrPath,
    *,
    minutes: float = 10.0,
    objective: Objective = "decode",
    context_size: int = 4096,
    max_sequences: int = 1,
    rpc: Sequence[str] = (),
    devices: Sequence[str] | None = None,
    vram: SupportsIndex | str | None = None,
    prompt_tokens: int = 512,
    generate_tokens: int = 64,
    repetitions: int = 3,
    restart: bool = False,
    on_progress: Callable[[TuningProgress], object] | None = None,
) -> TuningReport:
    """Tries options of `load()` in turn, and keeps the quickest as the profile that `load(..., profile="auto")` uses.

    What is varied: how many layers' experts are in host memory, repacking, how host memory holds weights, threads for single tokens and for
    prompts, and the micro-batch size. One option is varied at a time, from the best so far on, until a pass over all of them changes
    nothing (coordinate descent). Then the best ones and the defaults are measured again in turn, because machines are noisy, and the
    medians decide.

    Each trial is a process of its own, so that one that crashes or is killed loses nothing else. Finished trials are kept: a second sweep
    of the same model, use and versions goes on where an earlier one ended, also after Ctrl-C.

    Args:
        path: a GGUF file; the first one of a split model.
        minutes: time for all of it; a trial that still runs then is ended and not counted.
        objective: what to be quick at. "decode": single tokens, of all sequences together; options that are of no matter for them are
            chosen for prompts. "prompt": prompts. "mixed": both, by their geometric mean.
        context_size: as for `load()`; the profile is for loads with the same.
        max_sequences: as for `load()`; the profile is for loads with the same. As many texts are generated at once.
        rpc: endpoints of workers whose devices are used too.
        devices: names of the devices to use; None: all; (): the CPU alone.
        vram: most memory to use on each accelerator, as bytes or text such as "8GiB"; None: what is free.
        prompt_tokens: length of the prompts. Micro-batches are not larger.
        generate_tokens: tokens to generate for each sequence.
        repetitions: of both in each trial.
        restart: drop the trials that were kept.
        on_progress: called when each trial has begun.

    Raises:
        FileNotFoundError: no such file.
        InvalidOptionError: a number is out of range, or a device unknown.
        LlamaMoeError: no options worked, or no trial ended in time; the message says why.
    """
    deadline = time.monotonic() + 60 * _checked_minutes(minutes)
    limit = None if vram is None else parse_size(vram, "vram")
    task = TrialTask(
        path=os.path.abspath(path),  # noqa: PTH100 a trial's process reads it
        rpc=tuple(rpc),
        devices=None if devices is None else tuple(devices),
        context_size=context_size,
        max_sequences=max_sequences,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        repetitions=repetitions,
        seconds=20.0,
    )
    _check(objective, task)
    for endpoint in rpc:
        add_rpc_device(endpoint)
    # Workers that this process knows from elsewhere are unknown to the trials.
    found = [device for device in accelerators(devices) if device.backend != "RPC" or device.description in rpc]
    key = profile_key(path, accelerators=found, context_size=context_size, max_sequences=max_sequences)
    journal = Journal(key.path.with_suffix(".trials.json"), task, build_info(), restart=restart)
    sweep = _Sweep(inspect(path), task, journal, found, vram=limit, objective=objective, deadline=deadline, on_progress=on_progress)
    in_time = sweep.run(search_until=deadline - (1 - _SEARCH_SHARE) * 60 * minutes)
    return _report(sweep, key, in_time=in_time)


def _checked_minutes(minutes: float) -> float:
    if not 0 < minutes < math.inf:
        raise InvalidOptionError(f"minutes is {minutes}; it must be above 0")
    return minutes


def _check(objective: str, task: TrialTask) -> None:
    if objective not in get_args(Objective):
        raise InvalidOptionError(f"objective is {objective!r}; it must be 'decode', 'prompt' or 'mixed'")
    for name, value in (("prompt_tokens", task.prompt_tokens), ("generate_tokens", task.generate_tokens)):
        if value < 1:
            raise InvalidOptionError(f"{name} is {value}; it must be 1 or more")
    check_test(
        prompt_tokens=task.prompt_tokens,
        generate_tokens=task.generate_tokens,
        repetitions=task.repetitions,
        context_size=task.context_size,
    )
    fill_context(_core.EngineOptions(), context_size=task.context_size, max_sequences=task.max_sequences).validate()


def _report(sweep: _Sweep, key: ProfileKey, *, in_time: bool) -> TuningReport:
    """Decides, and keeps what won."""
    winner = sweep.winner()
    default = sweep.median(sweep.default)
    name = Path(sweep.task.path).name
    gain = sweep.objective_of(winner) / sweep.objective_of(default) if sweep.usable(default) else None
    profile = Profile(
        key=key,
        options=winner.options,
        objective=sweep.objective,
        prompt_tokens_per_second=winner.prompt_tokens_per_second,
        decode_tokens_per_second=winner.decode_tokens_per_second,
        gain=gain,
        model=name,
        version=build_info()["version"],
    )
    profile.write()
    _LOG.info("profile of %s written to %s", name, key.path)
    return TuningReport(trials=sweep.trials, profile=profile, default=default, winner=winner, path=str(key.path), in_time=in_time)


class _Sweep:
    """The search."""

    def __init__(
        self,
        info: ModelInfo,
        task: TrialTask,
        journal: Journal,
        found: Sequence[Device],
        *,
        vram: int | None,
        objective: Objective,
        deadline: float,
        on_progress: Callable[[TuningProgress], object] | None,
    ) -> None:
        self.task = task
        self.objective = objective
        self.default = TunedOptions(experts="fit" if vram is None else placement_name(ExpertPlacement.fit(vram=vram)))
        self._info = info
        self._journal = journal
        self._accelerators = found
        self._vram = vram
        self._begin = time.monotonic()
        self._deadline = deadline
        self._search_until = deadline
        self._limit = math.inf
        self._on_progress = on_progress
        self._seen: dict[TunedOptions, dict[int, Trial]] = {}
        self._order: list[Trial] = []
        self._finalists: list[TunedOptions] = []

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What was measured for this sweep, earlier sweeps' trials that it could use included."""
        return tuple(self._order)

    def run(self, *, search_until: float) -> bool:
        """Tries until nothing is left to try, or time is over; returns whether it came to the end."""
        self._search_until = search_until
        try:
            best = self._search()
            self._search_until = self._deadline
            self._finalists = self._choose_finalists(best)
            self._repeat()
        except OutOfTime:
            return False
        return best is not None

    def winner(self) -> Trial:
        """The best options, with the medians of all their trials.

        Raises:
            LlamaMoeError: none worked.
        """
        measured = map(self.median, self._finalists or self._seen)
        fine = sorted(filter(self.usable, measured), key=self.objective_of, reverse=True)
        if not fine:
            reasons = "; ".join(dict.fromkeys(f"{trial.options}: {trial.error}" for trial in self._order[:3]))
            raise LlamaMoeError(f"no options worked: {reasons}" if reasons else "no trial ended in time; give more minutes")
        # The defaults stay unless something is noticeably better.
        best = next((trial for trial in fine if trial.options == self.default), fine[0])
        for trial in fine:
            if self._is_better(trial, best):
                best = trial
        return best

    def median(self, options: TunedOptions) -> Trial:
        """One trial for all those of some options; the error of one if they all failed."""
        trials = list(self._seen.get(options, {}).values())
        good = [trial for trial in trials if trial.error is None]
        if not good:
            return trials[0] if trials else Trial(options=options, error="it was not tried", device_bytes={}, seconds=0.0)
        return replace(
            good[0],
            prompt_tokens_per_second=statistics.median(trial.prompt_tokens_per_second for trial in good),
            decode_tokens_per_second=statistics.median(trial.decode_tokens_per_second for trial in good),
            seconds=sum(trial.seconds for trial in trials),
        )

    def usable(self, trial: Trial) -> bool:
        """Whether it worked, within the memory that may be used."""
        return trial.error is None and (self._vram is None or all(size <= self._vram for size in trial.device_bytes.values()))

    def objective_of(self, trial: Trial, objective: Objective | None = None) -> float:
        """How good it is, in tokens per second."""
        prompt, decode = trial.prompt_tokens_per_second, trial.decode_tokens_per_second
        return {"prompt": prompt, "decode": decode, "mixed": math.sqrt(prompt * decode)}[objective or self.objective]

    def _is_better(self, trial: Trial, other: Trial) -> bool:
        """Noticeably so; where they are alike at the objective, the other kind of speed decides."""
        ratio = self.objective_of(trial) / max(self.objective_of(other), 1e-9)
        if not 1 / _NOTICEABLE < ratio < _NOTICEABLE:
            return ratio > 1
        second: Objective = "decode" if self.objective == "prompt" else "prompt"
        return self.objective_of(trial, second) > _NOTICEABLE * self.objective_of(other, second)

    def _try(self, options: TunedOptions, number: int = 0) -> Trial:
        """The trial of some options in a round: kept from before, or run now."""
        done = self._seen.get(options, {}).get(number)
        if done is not None:
            return done
        trial = self._journal.find(options, number)
        if trial is None:
            if time.monotonic() >= self._search_until:
                raise OutOfTime
            trial = run_trial(
                self.task,
                options,
                number=number,
                limit=self._limit,
                deadline=self._deadline,
                on_start=lambda: self._tell(options),
            )
            self._journal.add(trial)
        if trial.error is None and math.isinf(self._limit):
            # Much slower than the first one that worked is slow enough.
            self._limit = 30 + 4 * trial.seconds
        self._seen.setdefault(options, {})[number] = trial
        self._order.append(trial)
        _LOG.info("trial of %s: %s", options, trial.error or f"{trial.decode_tokens_per_second:.2f} tokens/s")
        return trial

    def _tell(self, options: TunedOptions) -> None:
        if self._on_progress is not None:
            share = (time.monotonic() - self._begin) / (self._deadline - self._begin)
            self._on_progress(TuningProgress(options, len(self._order) + 1, min(share, 1.0)))

    def _best_of(self, options: Iterable[TunedOptions], best: TunedOptions | None, objective: Objective) -> TunedOptions | None:
        """The best of those that work, which must be noticeably better than the best so far."""
        for candidate in options:
            trial = self._try(candidate)
            if not self.usable(trial):
                continue
            least = 0.0 if best is None else _NOTICEABLE * self.objective_of(self._try(best), objective)
            if self.objective_of(trial, objective) > least:
                best = candidate
        return best

    def _search(self) -> TunedOptions | None:
        """Coordinate descent from the defaults; what it found when its time was over counts too."""
        best = self.default if self.usable(self._try(self.default)) else None
        try:
            for _ in range(_PASSES):
                before = best
                best = self._place(best)
                if best is None:
                    return None
                for objective, vary in self._dimensions():
                    best = self._best_of(vary(best), best, objective) or best
                if best == before:
                    break
        except OutOfTime:
            if time.monotonic() >= self._deadline:
                raise
        return best

    def _dimensions(self) -> list[tuple[Objective, Callable[[TunedOptions], list[TunedOptions]]]]:
        """What is varied, and the speed it is varied for: the objective, or the only one it has a part in."""
        of_all: Objective = self.objective
        decode: Objective = "mixed" if of_all == "mixed" else "decode"
        prompt: Objective = "mixed" if of_all == "mixed" else "prompt"
        return [
            (of_all, lambda best: [replace(best, repack=not best.repack)]),
            (of_all, self._host_memories),
            (decode, self._threads),
            (prompt, self._batch_threads),
            (prompt, self._micro_batches),
        ]

    def _host_memories(self, best: TunedOptions) -> list[TunedOptions]:
        local = any(device.backend != "RPC" for device in self._accelerators)
        return [replace(best, host_memory="mmap"), replace(best, host_memory="pageable")] + (
            [replace(best, host_memory="pinned")] if local else []
        )

    def _threads(self, best: TunedOptions) -> list[TunedOptions]:
        # Prompts keep what they have: by default it follows.
        batch = best.threads_batch or best.threads or _core.usable_cores()
        now = best.threads or _core.usable_cores()
        return [replace(best, threads=count, threads_batch=batch) for count in _thread_counts() if count != now]

    def _batch_threads(self, best: TunedOptions) -> list[TunedOptions]:
        now = best.threads_batch or best.threads or _core.usable_cores()
        return [replace(best, threads_batch=count) for count in _thread_counts() if count != now]

    def _micro_batches(self, best: TunedOptions) -> list[TunedOptions]:
        sizes = [size for size in _MICRO_BATCHES if size <= min(self.task.prompt_tokens, self.task.context_size or self.task.prompt_tokens)]
        return [replace(best, micro_batch_size=size) for size in sizes if size != best.micro_batch_size]

    def _place(self, best: TunedOptions | None) -> TunedOptions | None:
        """The best number of layers with their experts in host memory: some far apart, then halfway between the best and its neighbours."""
        if not (self._accelerators and self._info.expert_count):
            return best
        layers = self._info.layer_count
        fitting = self._layers_that_fit()
        base = best or self.default
        tried = {fitting} if best is not None and base.experts == self.default.experts else set()
        if base.experts.startswith("first:"):
            fitting = int(base.experts.partition(":")[2])
        counts = sorted({fitting, (fitting + layers) // 2, layers, max(fitting - 1, 0)})
        while counts:
            possible = [count for count in counts if count not in tried and self._may_fit(count)]
            tried |= set(counts)
            before = best
            best = self._best_of((replace(base, experts=f"first:{count}") for count in possible), best, self.objective)
            if best is None or best == before:
                return best
            now = int(best.experts.partition(":")[2])
            above = min((count for count in tried if count > now), default=layers)
            below = max((count for count in tried if count < now), default=None)
            # Fewer than ever tried: on in larger steps.
            further = max(now - 2 * (above - now), 0) if below is None else (below + now) // 2
            counts = sorted({further, (now + above) // 2} - tried)
        return best

    def _layers_that_fit(self) -> int:
        """How many layers' experts "fit" puts into host memory; all if it finds no way."""
        try:
            tokens = self.task.context_size * self.task.max_sequences
            placement = resolve_placement(
                self.task.path,
                experts=parse_placement(self.default.experts),
                devices=self._accelerators,
                fit_context_tokens=tokens,
            )
        except DoesNotFitError:
            return self._info.layer_count
        where = {tensor.name: tensor.device for tensor in placement}
        names = {device.name for device in self._accelerators}
        experts = [tensor for tensor in self._info.tensors if tensor.role == "experts" and where.get(tensor.name) not in names]
        return len({tensor.layer for tensor in experts})

    def _may_fit(self, count: int) -> bool:
        """Whether the weights alone are within the limit that was given."""
        if self._vram is None:
            return True
        placement = resolve_placement(self.task.path, experts=ExpertPlacement.cpu_first(count), devices=self._accelerators)
        return all(bytes_on([device], placement.by_device()) <= self._vram for device in self._accelerators)

    def _choose_finalists(self, best: TunedOptions | None) -> list[TunedOptions]:
        """The best, who comes next at the objective, and the defaults; nobody where there is one of them only."""
        if best is None:
            return []
        others = [trial for trial in map(self.median, self._seen) if self.usable(trial) and trial.options not in (best, self.default)]
        others.sort(key=self.objective_of, reverse=True)
        finalists = list(dict.fromkeys([self.default, best, *(trial.options for trial in others[:1])]))
        return [options for options in finalists if self.usable(self._try(options))] if len(finalists) > 1 else []

    def _repeat(self) -> None:
        for number in range(1, _FINAL_ROUNDS + 1):
            for options in self._finalists:
                self._try(options, number)


def _thread_counts() -> list[int]:
    """What is worth trying: cores, half of them, one less, and all that the system counts with several threads on a core."""
    cores = _core.usable_cores()
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or cores
    return sorted({cores, max(cores // 2, 1), max(cores - 1, 1), max(logical, cores)})
