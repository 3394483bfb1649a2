"""Actors that leave traces, which the processes of Ray import from here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa

from llama_moe.ray import LlamaMoe

__all__ = ["DiesOnce", "Traced", "pids"]


class Traced(LlamaMoe):
    """Writes a file in `folder` when it has loaded and when it closes, and its process and threads into each row."""

    def __init__(self, *, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self._folder = Path(folder)
        self.mark("loaded")

    def mark(self, event: str) -> None:
        (self._folder / f"{event}-{os.getpid()}").touch(exist_ok=False)

    def __call__(self, batch: Any) -> Any:
        answered: Any = super().__call__(batch)
        for name, value in (("pid", os.getpid()), ("threads", self.engine.threads)):
            answered = answered.append_column(name, pa.array([value] * answered.num_rows))
        return answered

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.mark("closed")


class DiesOnce(Traced):
    """The first process that gets the row `fatal_id` is killed while it generates for that batch."""

    def __init__(self, *, fatal_id: int, **options: Any) -> None:
        super().__init__(**options)
        self._fatal_id = fatal_id

    def __call__(self, batch: Any) -> Any:
        if self._fatal_id in batch["id"].to_pylist() and not pids(self._folder, "killed"):
            streams = self.engine.stream(batch["prompt"].to_pylist())
            next(streams[0])
            self.mark("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def pids(folder: Path, event: str) -> set[int]:
    """The processes in which it happened."""
    return {int(file.name.rpartition("-")[2]) for file in folder.glob(f"{event}-*")}
