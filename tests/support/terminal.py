"""A program in a terminal: keys go in, and what the terminal shows is waited for."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import Self

from tests.support.processes import environment
from tests.support.waiting import eventually

__all__ = ["Terminal"]

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]")
# A guard against a hang, not a measure.
_TIMEOUT_SECONDS = 120.0


class Terminal:
    """A running process whose terminal we are; killed on leaving the `with` block if it still runs.

    Args:
        command: what to run.
        env: variables besides this process's.
    """

    def __init__(self, command: Sequence[str], **env: str) -> None:
        self._master, slave = pty.openpty()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=_take_terminal,  # noqa: PLW1509 - so that Ctrl-C is a signal; it takes no lock
                env=environment() | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"} | env,
            )
        finally:
            os.close(slave)
        self._shown = b""

    @property
    def shown(self) -> str:
        """All that it wrote so far, without the sequences that move the cursor and set colours."""
        return _CONTROL.sub("", self._shown.decode(errors="replace")).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        """Presses keys; "\\r" is the enter key, "\\x03" is Ctrl-C."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Reads until the text stands in `shown` behind position `after`; returns where it ends."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while (found := self.shown.find(text, after)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} was not shown after {self.shown[:after]!r}, but {self.shown[after:]!r}")
        return found + len(text)

    def wait_for_prompt(self, prompt: str, *, after: int = 0) -> int:
        """Waits for a prompt, and until the program sleeps behind it: a signal between the two would be noticed with the next key only."""
        end = self.wait_for(prompt, after=after)
        stat = Path(f"/proc/{self._process.pid}/stat")
        assert eventually(lambda: stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "S")
        return end

    def finish(self) -> int:
        """Reads to the end of the program; returns its exit status."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while self._read(deadline - time.monotonic()):
            pass
        return self._process.wait(_TIMEOUT_SECONDS)

    def _read(self, seconds: float) -> bool:
        """Reads what comes next; False at the end, or when nothing came in time."""
        if not select.select([self._master], [], [], max(seconds, 0))[0]:
            return False
        try:
            piece = os.read(self._master, 1 << 16)
        except OSError:  # Linux says so when the other side is closed
            return False
        self._shown += piece
        return bool(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._master)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
