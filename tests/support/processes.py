"""Running Python in a process of its own, for what must not happen in the one that runs the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from typing_extensions import Self

__all__ = ["COMMAND", "REPOSITORY", "Program", "cli", "environment", "python", "run_on_one_core", "run_python"]

REPOSITORY = Path(__file__).resolve().parents[2]

# The command line program.
COMMAND = [sys.executable, "-m", "llama_moe.cli"]

# A guard against a hang, not a measure: generous enough for a busy machine.
_TIMEOUT_SECONDS = 120.0


def python(code: str, *arguments: object) -> list[str]:
    """The command that runs `code`, indented or not, with `arguments` in `sys.argv[1:]`."""
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's, with the package importable from any folder."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run_python(code: str, *arguments: object, timeout: float = _TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs `code` to its end and returns what it wrote."""
    return subprocess.run(python(code, *arguments), capture_output=True, text=True, timeout=timeout, check=False, env=environment())


def cli(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line program to its end and returns what it wrote."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=240, check=False, env=environment()
    )


def run_on_one_core(
    command: Sequence[str], *, stdin: str = "", cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end on one core, and ends whatever it left running.

    Engines then have one thread: several that wait for each other are slow where other programs take the cores.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env, start_new_session=True) as process:
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


class Program:
    """A running process whose output is read line by line; killed on leaving the `with` block if it still runs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def stdout(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def wait_for_line(self, text: str) -> None:
        """Reads standard output up to a line that contains `text`."""
        seen = []
        for line in self.stdout:
            if text in line:
                return
            seen.append(line)
        raise AssertionError(f"the process ended without writing {text!r}; it wrote {seen}, {self._process.communicate()[1]!r}")

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def finish(self, timeout: float = _TIMEOUT_SECONDS) -> tuple[int, str, str]:
        """Waits for the end; returns the exit status and the rest of what it wrote to standard output and standard error."""
        stdout, stderr = self._process.communicate(timeout=timeout)
        return self._process.returncode, stdout, stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
