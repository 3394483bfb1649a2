"""Lines from a person or a pipe: editing and history on a terminal, and messages of several lines."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from llama_moe._machine import data_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["MessageReader"]

_BLOCK = '"""'
_MOST_LINES = 1000


class MessageReader:
    """Reads messages from standard input.

    A line that ends with a backslash goes on in the next one, and three quotation marks begin and end a message of any lines. On a terminal
    lines can be edited and earlier ones are called back; they are kept in a file of the user's own.

    Args:
        commands: what the tab key completes at the beginning of a line.
        keep: whether lines are kept for later sessions.
    """

    def __init__(self, commands: Sequence[str], *, keep: bool) -> None:
        self.interactive = sys.stdin.isatty()
        self._history: Path | None = None
        if self.interactive:
            self._start_editing(commands, keep=keep)

    def read(self) -> str | None:
        """The next message; None at the end of the input."""
        line = self._line("> ")
        if line is None:
            return None
        begins_block = line.lstrip().startswith(_BLOCK)
        lines = [line.lstrip()[len(_BLOCK) :] if begins_block else line]
        while begins_block:
            if lines[-1].rstrip().endswith(_BLOCK):
                lines[-1] = lines[-1].rstrip()[: -len(_BLOCK)]
                return "\n".join(lines).strip("\n")
            following = self._line("... ")
            if following is None:  # the end of the input ends the message too
                return "\n".join(lines).strip("\n")
            lines.append(following)
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._line("... ")
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def close(self) -> None:
        """Keeps the lines."""
        if self._history is None:
            return
        import readline

        with contextlib.suppress(OSError):  # a history that cannot be written is no reason to fail
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            readline.write_history_file(self._history)

    def _line(self, prompt: str) -> str | None:
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        if not sys.stdout.isatty():  # the answers go elsewhere, and the prompt must not
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            return None

    def _start_editing(self, commands: Sequence[str], *, keep: bool) -> None:
        try:
            import readline
        except ImportError:  # Python can be built without it: the terminal's own editing remains
            return
        readline.set_completer_delims("")
        readline.set_completer(lambda text, state: ([*(name for name in commands if text and name.startswith(text)), None])[state])
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
        if keep:
            self._history = data_folder() / "chat_history"
            with contextlib.suppress(OSError):
                readline.read_history_file(self._history)
            readline.set_history_length(_MOST_LINES)
