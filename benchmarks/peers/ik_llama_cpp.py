"""ik_llama.cpp, a fork of llama.cpp with CPU kernels of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.ik_llama_cpp_build import library_path, pin

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

IK_LLAMA_CPP = f"ik_llama.cpp {pin().version}"
MISSING_IK_LLAMA_CPP = "ik_llama.cpp is not built: `python benchmarks/peers/ik_llama_cpp_build.py` does that, and `make bench`"


def has_ik_llama_cpp() -> bool:
    """Whether its library was built."""
    return library_path().is_file()


class IkLlamaCpp:
    """ik_llama.cpp with a model loaded, in a process that answers one measurement at a time.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        context_size: tokens that fit.
        repack: its run-time repacking.

    Attributes:
        load_seconds: what loading the model and making a context took.
        peak_bytes: the most memory that the process had at once until then, less what it had before.
    """

    def __init__(self, model: Path, *, threads: int, context_size: int, repack: bool) -> None:
        script = Path(__file__).with_name("ik_llama_cpp_process.py")
        command = [sys.executable, script, library_path(), model, threads, context_size, int(repack)]
        self._process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        loaded = self._answer()
        self.load_seconds: float = loaded["load_seconds"]
        self.peak_bytes: int = loaded["peak_bytes"]

    def prompt_rate(self, tokens: int) -> float:
        """Tokens per second of a prompt of random tokens."""
        return tokens / self._seconds({"prompt": tokens})

    def decode_rate(self, tokens: int) -> float:
        """Tokens per second of random tokens, one after the other, after an empty context."""
        return tokens / self._seconds({"tokens": tokens})

    def _seconds(self, request: dict[str, int]) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # it also prints what no log callback gets
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"the ik_llama.cpp process ended with {self._process.wait()}")

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
