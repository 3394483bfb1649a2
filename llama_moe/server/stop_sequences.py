"""Stop sequences of an answer's text, with the knowledge of which one it was.

An engine looks for stop strings in all that a model says, its reasoning and the JSON of its tool calls too, and does not tell which one it
found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopFinder:
    """Finds the first of several strings to be complete in a text that comes in pieces; of those complete at once the longest.

    Attributes:
        found: the one that ended the text; None as long as none did.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text in which no stop string can begin any more; nothing after the end."""
        if self.found is not None:
            return ""
        self._held += text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            _, begin, self.found = min(ends)
            return self._held[:begin]
        safe = len(self._held) - self._begun()
        text, self._held = self._held[:safe], self._held[safe:]
        return text

    def finish(self) -> str:
        """Takes the end of the text and returns what was held back."""
        text, self._held = ("", "") if self.found is not None else (self._held, "")
        return text

    def _begun(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
