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
from ._placements import placement_name
from ._sizes import parse_size
from ._speed import check_test
from .build import build_info
from .devices import add_rpc_device, chosen_accelerators
from .errors import InvalidOptionError, LlamaMoeError
from .inspection import inspect
from .lora import LoraAdapter, as_adapters
from .placement import ExpertPlacement
from .profiles import Objective, Profile, TunedOptions, profile_key
from .trials import Journal, OutOfTime, Trial, TrialTask, run_trial
from .tuning_report import TuningReport
from .tuning_space import Space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import SupportsIndex

    from .devices import Device
    from .inspection import ModelInfo
    from .lora import LoraLike
    from .model import DevicesLike, StrPath
    from .profiles import ProfileKey

__all__ = ["tune"]

_LOG = logging.getLogger("llama_moe")

# A gain that is smaller may be chance: repeated measurements on a quiet machine differ by about as much.
_NOTICEABLE = 1.02
_FINALISTS = 3
_FINAL_ROUNDS = 2
# The search leaves time to repeat the best ones: what that takes, with something to spare, but no more than this share of all.
_TO_SPARE = 1.25
_MOST_FOR_FINALS = 0.5
_PASSES = 3


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
    devices: DevicesLike | None = None,
    vram: SupportsIndex | str | None = None,
    lora: LoraLike = (),
    prompt_tokens: int = 512,
    generate_tokens: int = 64,
    repetitions: int = 3,
    restart: bool = False,
    on_progress: Callable[[TuningProgress], object] | None = None,
) -> TuningReport:
    """Tries options of `load()` in turn, and keeps the quickest as the profile that `load(..., profile="auto")` uses.

    What is varied: how many layers' experts are in host memory, what computes there and repacking for it, how host memory holds weights,
    threads for single tokens and for prompts, and the micro-batch size. One option is varied at a time, from the best so far on, until a
    pass over all of them changes nothing (coordinate descent). Then the best ones and the defaults are measured again in turn, because
    machines are noisy, and the medians decide.

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
        devices: accelerators to use, as for `load()`, where workers' are among those of `rpc`; None: all; []: the CPU alone.
        vram: most memory to use on each accelerator, as bytes or text such as "8GiB"; None: what is free.
        lora: as for `load()`; the profile is for loads with adapters of the same tensors, at whatever scales.
        prompt_tokens: length of the prompts. Micro-batches are not larger.
        generate_tokens: tokens to generate for each sequence.
        repetitions: of both in each trial.
        restart: drop the trials that were kept.
        on_progress: called when each trial has begun.

    Raises:
        FileNotFoundError: no such file.
        ModelLoadError: an adapter's header cannot be read.
        InvalidOptionError: a number is out of range, or a device is of a worker that is not in `rpc`.
        PlacementError: a device does not exist.
        LlamaMoeError: no options worked, or no trial ended in time; the message says why.
    """
    deadline = time.monotonic() + 60 * _checked_minutes(minutes)
    limit = None if vram is None else parse_size(vram, "vram")
    task = TrialTask(
        path=os.path.abspath(path),  # noqa: PTH100 a trial's process reads it
        rpc=tuple(rpc),
        devices=None,
        lora=tuple(LoraAdapter(os.path.abspath(each.path), each.scale) for each in as_adapters(lora)),  # noqa: PTH100 as the model's
        context_size=context_size,
        max_sequences=max_sequences,
        prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens,
        repetitions=repetitions,
        seconds=20.0,
    )
    _check(objective, task)
    found, names = _accelerators(devices, rpc)
    task = replace(task, devices=None if devices is None else names)
    key = profile_key(path, accelerators=found, context_size=context_size, max_sequences=max_sequences, lora=task.lora)
    journal = Journal(key.path.with_suffix(".trials.json"), task, build_info(), restart=restart)
    sweep = _Sweep(inspect(path), task, journal, found, vram=limit, objective=objective, deadline=deadline, on_progress=on_progress)
    in_time = sweep.run()
    return _report(sweep, key, in_time=in_time)


def _accelerators(devices: DevicesLike | None, rpc: Sequence[str]) -> tuple[list[Device], list[str]]:
    """The accelerators to use, and what the trials' processes, which know no workers but these, call them."""
    workers = {device.name: device for endpoint in rpc for device in add_rpc_device(endpoint)}
    names = {name: f"RPC{index}" for index, name in enumerate(workers)}
    chosen = chosen_accelerators(devices)
    found = [device for device in chosen if device.backend != "RPC" or device.name in workers]
    if devices is not None and len(found) < len(chosen):
        unknown = next(device for device in chosen if device not in found)
        raise InvalidOptionError(f"devices has {unknown.name!r}, of the worker at {unknown.description}, which is not in rpc")
    return found, [names.get(device.name, device.name) for device in found]


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
        self._journal = journal
        self._space = Space(info, task, found, vram=vram, default=self.default)
        self._vram = vram
        self._begin = time.monotonic()
        self._deadline = deadline
        self._searching = True
        self._finished = False
        self._limit = math.inf
        self._on_progress = on_progress
        self._seen: dict[TunedOptions, dict[int, Trial]] = {}
        self._order: list[Trial] = []
        self._finalists: list[TunedOptions] = []

    @property
    def trials(self) -> tuple[Trial, ...]:
        """What was measured for this sweep, earlier sweeps' trials that it could use included."""
        return tuple(self._order)

    def run(self) -> bool:
        """Tries until nothing is left to try, or time is over; returns whether it came to the end."""
        try:
            best = self._search()
            self._finalists = self._choose_finalists(best)
            for number in range(1, _FINAL_ROUNDS + 1):
                for options in self._finalists:
                    self._try(options, number)
        except OutOfTime:
            return False
        return self._finished

    def winner(self) -> Trial:
        """The best options, with the medians of all their trials.

        Raises:
            LlamaMoeError: none worked.
        """
        # Finalists are compared by the rounds that two of them and more have: they were measured in turn.
        rounds = sorted((len(self._seen[options]) for options in self._finalists), reverse=True)[1:2]
        finalists = [options for options in self._finalists if len(self._seen[options]) >= rounds[0]]
        measured = map(self.median, finalists or self._seen)
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
            if time.monotonic() >= self._deadline - self._time_for_finals():
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

    def _time_for_finals(self) -> float:
        if not (self._searching and self._order):
            return 0.0
        mean = statistics.fmean(trial.seconds for trial in self._order)
        return min(_TO_SPARE * _FINALISTS * _FINAL_ROUNDS * mean, _MOST_FOR_FINALS * (self._deadline - self._begin))

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
                    break
                for objective, vary in self._space.dimensions(self.objective):
                    best = self._best_of(vary(best), best, objective) or best
                if best == before:
                    break
            self._finished = True
        except OutOfTime:
            if time.monotonic() >= self._deadline:
                raise
        self._searching = False
        return best

    def _place(self, best: TunedOptions | None) -> TunedOptions | None:
        """The best number of layers with their experts in host memory: some far apart, then halfway between the best and its neighbours."""
        if not self._space.has_placements:
            return best
        layers = self._space.layer_count
        fitting = self._space.layers_that_fit()
        base = best or self.default
        tried = {fitting} if best is not None and base.experts == self.default.experts else set()
        if base.experts.startswith("first:"):
            fitting = int(base.experts.partition(":")[2])
        counts = sorted({fitting, (fitting + layers) // 2, layers, max(fitting - 1, 0)})
        while counts:
            possible = [count for count in counts if count not in tried and self._space.may_fit(count)]
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

    def _choose_finalists(self, best: TunedOptions | None) -> list[TunedOptions]:
        """The best, who comes next at the objective, and the defaults; nobody where there is one of them only."""
        if best is None:
            return []
        others = [trial for trial in map(self.median, self._seen) if self.usable(trial) and trial.options not in (best, self.default)]
        others.sort(key=self.objective_of, reverse=True)
        finalists = list(dict.fromkeys([self.default, best, *(trial.options for trial in others[: _FINALISTS - 2])]))
        finalists = [options for options in finalists if self.usable(self._try(options))]
        return finalists if len(finalists) > 1 else []
