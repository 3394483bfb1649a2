"""llama-cpp-python, which computes one prompt at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from typing_extensions import Self


class LlamaCppPython:
    """llama-cpp-python with a model loaded, in a process that answers one measurement at a time."""

    def __init__(self, model: Path, *, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_python_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(model), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def decode_rate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Tokens per second of `prompts` served in turn, counting only the time between each one's first and last of `tokens` tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        seconds: list[float] = self._answer()["seconds"]
        return len(prompts) * (tokens - 1) / sum(seconds)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the llama-cpp-python process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
