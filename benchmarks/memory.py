"""How much memory a command takes, which a process of its own tells best."""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_PROBE_SECONDS = 0.005


@dataclass(frozen=True)
class Footprint:
    """What a command took.

    Attributes:
        peak_bytes: the most memory that it had at once, pages of mapped files among it.
        peak_own_bytes: without those, which the system can take back without writing them anywhere.
        output: what it wrote to stdout.
    """

    peak_bytes: int
    peak_own_bytes: int
    output: str


def footprint_of(command: Sequence[str]) -> Footprint:
    """Runs a command and watches its memory.

    Raises:
        RuntimeError: it failed.
    """
    peak = own = 0
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = _fields(status)
            if "VmHWM" in fields:  # else it has just ended
                peak, own = max(peak, _bytes(fields["VmHWM"])), max(own, _bytes(fields["RssAnon"]))
            time.sleep(_PROBE_SECONDS)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n{errors.read()[-2000:]}")
        return Footprint(peak, own, output.read())


def resident_bytes() -> int:
    """Memory that this process has now, pages of mapped files among it."""
    return _bytes(_fields(Path("/proc/self/status"))["VmRSS"])


def _fields(status: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())


def _bytes(field: str) -> int:
    return int(field.split(maxsplit=1)[0]) * 1024
