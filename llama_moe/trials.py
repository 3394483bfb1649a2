"""Trials of `tune()`: each runs in a process of its own, and what came of it is kept, so that an interrupted sweep goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import written_whole
from .profiles import TunedOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .lora import LoraAdapter

_LOG = logging.getLogger("llama_moe")
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measurement of some options.

    Attributes:
        options: what was tried.
        round: 0: in search of the best; 1 and more: repetitions of the best ones, in turn.
        error: why it failed: what the load said, that its process crashed or was killed, or that it took too long; None: it did not.
        prompt_tokens_per_second: median of the prompts; 0 if it failed.
        decode_tokens_per_second: median of the generations, all sequences together; 0 if it failed.
        device_bytes: memory on each accelerator, by its name.
        seconds: how long it took, the load included.
    """

    options: TunedOptions
    round: int = 0
    error: str | None = None
    prompt_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    device_bytes: Mapping[str, int]
    seconds: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """What `dataclasses.asdict` made of one."""
        return cls(**{**data, "options": TunedOptions.from_dict(data["options"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTask:
    """What all trials of a sweep have in common.

    Attributes:
        path: the model's file.
        rpc: endpoints of workers.
        devices: names of the devices to use; None: all.
        lora: adapters that are loaded too.
        context_size: as for `load()`.
        max_sequences: as for `load()`.
        prompt_tokens: length of the prompts.
        generate_tokens: tokens to generate for each sequence.
        repetitions: of both in one trial, at most.
        seconds: no further repetition begins after this.
    """

    path: str
    rpc: Sequence[str]
    devices: Sequence[str] | None
    lora: Sequence[LoraAdapter]
    context_size: int
    max_sequences: int
    prompt_tokens: int
    generate_tokens: int
    repetitions: int
    seconds: float


class OutOfTime(Exception):  # noqa: N818 no error: the sweep ends and keeps what it has
    """The time for the whole sweep is over."""


def run_trial(
    task: TrialTask,
    options: TunedOptions,
    *,
    number: int = 0,
    limit: float,
    deadline: float,
    on_start: Callable[[], object] | None = None,
) -> Trial:
    """Measures in a new process, which has ended when this returns or raises.

    Args:
        task: what to measure.
        options: how to load it.
        number: of the round.
        limit: seconds that it may take; past them the trial has failed.
        deadline: on the clock of `time.monotonic()`; past it the trial is no trial.
        on_start: called when the process runs.

    Raises:
        OutOfTime: the deadline came first.
    """
    begin = time.monotonic()
    left = deadline - begin
    if left <= 0:
        raise OutOfTime
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "llama_moe._trial_process"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for us, who end it
        )
        assert process.stdin is not None  # noqa: S101 it was asked for
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead already; the status says so
                process.stdin.write(json.dumps({**asdict(task), "options": asdict(options)}).encode() + b"\n")
                process.stdin.flush()
            if on_start is not None:
                on_start()
            status = process.wait(min(limit, max(deadline - time.monotonic(), 0.0)))
        except subprocess.TimeoutExpired:
            if limit >= left:
                raise OutOfTime from None
            status = None
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        output.seek(0)
        errors.seek(0)
        result = _result(status, output.read(), errors.read(), limit)
    return Trial(
        options=options,
        round=number,
        error=result.get("error"),
        prompt_tokens_per_second=result.get("prompt", 0.0),
        decode_tokens_per_second=result.get("decode", 0.0),
        device_bytes=result.get("device_bytes", {}),
        seconds=time.monotonic() - begin,
    )


def _result(status: int | None, output: bytes, errors: bytes, limit: float) -> dict[str, Any]:
    if status is None:
        return {"error": f"it took longer than {limit:.0f} s"}
    if status == 0:
        with contextlib.suppress(ValueError):
            result = json.loads(output)
            if isinstance(result, dict):
                return result
    written = errors.decode(errors="replace").strip().splitlines()
    reason = f": {written[-1]}" if written else ""
    if status == -signal.SIGKILL:
        return {"error": f"its process was killed, as the system does when memory runs out{reason}"}
    if status < 0:
        return {"error": f"its process crashed with signal {-status} ({signal.strsignal(-status)}){reason}"}
    return {"error": f"its process ended with status {status}{reason}"}


class Journal:
    """The finished trials of a sweep, in a file that is complete at every moment.

    Args:
        path: the file.
        task: what the trials measure; those of another task are of no use.
        build: the versions that measured them.
        restart: begin anew, whatever the file has.
    """

    def __init__(self, path: Path, task: TrialTask, build: Mapping[str, str], *, restart: bool = False) -> None:
        self._path = path
        # Files may have been moved, or be copies: the name of the journal says which model and adapters it is of.
        settings = {name: value for name, value in asdict(task).items() if name not in ("path", "lora")}
        self._settings = json.loads(json.dumps([settings, dict(build)]))
        self._trials = {} if restart else self._read()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """In the order in which they were made."""
        return tuple(self._trials.values())

    def find(self, options: TunedOptions, number: int) -> Trial | None:
        """The trial of these options in this round."""
        return self._trials.get((options, number))

    def add(self, trial: Trial) -> None:
        """Keeps a trial."""
        self._trials[trial.options, trial.round] = trial
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as partial:
            data = {"format": _FORMAT, "settings": self._settings, "trials": [asdict(each) for each in self.trials]}
            partial.write_text(json.dumps(data, indent=1), encoding="utf-8")

    def _read(self) -> dict[tuple[TunedOptions, int], Trial]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            if (data["format"], data["settings"]) != (_FORMAT, self._settings):
                return {}
            trials = [Trial.from_dict(each) for each in data["trials"]]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            _LOG.warning("the trials in %s cannot be used, and the sweep begins anew: %s", os.fspath(self._path), error)
            return {}
        if all(trial.error is not None for trial in trials):
            return {}  # whatever it was that let everything fail may have been mended
        return {(trial.options, trial.round): trial for trial in trials}
