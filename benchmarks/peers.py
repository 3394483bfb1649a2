"""The programs we compare with, each in a process of its own, so that no peer shares threads or memory with what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_ROOT = Path(__file__).parent.parent


def llama_bench() -> Path:
    """The pinned llama.cpp's own benchmark, built by `make bench` from the same sources and flags as our module.

    Raises:
        FileNotFoundError: it was not built.
    """
    named = os.environ.get("LLAMA_BENCH")
    if named:
        return Path(named)
    for path in sorted(_ROOT.glob("build/*/bin/llama-bench")):
        return path
    raise FileNotFoundError("no llama-bench below build/; run `make bench`, or name one in LLAMA_BENCH")


def llama_bench_rates(model: Path, *, threads: int, prompt: int = 0, tokens: int = 0) -> float:
    """Tokens per second of one repetition of llama-bench, after its own warm-up.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        prompt: tokens of the prompt test; 0 for none.
        tokens: tokens of the generation test; 0 for none. Exactly one of both is given.
    """
    return float(_llama_bench(model, threads=threads, prompt=prompt, tokens=tokens)["avg_ts"])


def llama_bench_load_seconds(model: Path, *, threads: int) -> float:
    """Seconds llama-bench takes to load a model and make a context: its run time less one token and a run without a model."""
    begin = time.perf_counter()
    result = _llama_bench(model, threads=threads, tokens=1, extra=["--no-warmup"])
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    subprocess.run([llama_bench(), "--list-devices"], check=True, capture_output=True)
    return whole - (time.perf_counter() - begin) - float(result["avg_ns"]) / 1e9


def _llama_bench(model: Path, *, threads: int, prompt: int = 0, tokens: int = 0, extra: list[str] | None = None) -> dict[str, Any]:
    command = [llama_bench(), "-m", model, "-t", threads, "-p", prompt, "-n", tokens, "-r", 1, "-o", "json", *(extra or [])]
    ran = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    results: list[dict[str, Any]] = json.loads(ran.stdout)
    return results[0]


class LlamaCppPython:
    """llama-cpp-python with a model loaded, in a process that answers one measurement at a time."""

    def __init__(self, model: Path, *, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp_python_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(model), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def decode_rate(self, tokens: int) -> float:
        """Tokens per second between the first and the last of `tokens` streamed tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        return float(self._answer()["tokens_per_second"])

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
