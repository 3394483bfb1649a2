"""The pinned llama.cpp's own benchmark programs, built by `make bench` from the same sources and flags as our module."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent.parent


def program(name: str) -> Path:
    """One of llama.cpp's programs.

    Raises:
        FileNotFoundError: it was not built.
    """
    folder = Path(os.environ.get("LLAMA_CPP_BIN") or _ROOT / "build" / "dev" / "bin")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no {name} in {folder}; run `make bench`, or name the folder that has it in LLAMA_CPP_BIN")
    return folder / name


def llama_bench_rates(model: Path, *, threads: int, prompt: int = 0, tokens: int = 0) -> float:
    """Tokens per second of one repetition of llama-bench, after its own warm-up.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        prompt: tokens of the prompt test; 0 for none.
        tokens: tokens of the generation test; 0 for none. Exactly one of both is given.
    """
    return float(_llama_bench(model, threads=threads, prompt=prompt, tokens=tokens)[0]["avg_ts"])


def llama_bench_prompt_and_decode_rates(model: Path, *, threads: int, prompt: int, tokens: int, repack: bool) -> tuple[float, float]:
    """As `llama_bench_rates()`, of a prompt and of tokens after an empty context, with the model loaded once.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        prompt: tokens of the prompt test.
        tokens: tokens of the generation test.
        repack: whether weights are repacked at load, which is the default.
    """
    results = _llama_bench(model, threads=threads, prompt=prompt, tokens=tokens, extra=["--repack", str(int(repack))])
    return float(results[0]["avg_ts"]), float(results[1]["avg_ts"])


def llama_bench_load_seconds(model: Path, *, threads: int, repack: bool = True) -> float:
    """Seconds llama-bench takes to load a model and make a context: its run time less one token and a run without a model."""
    begin = time.perf_counter()
    result = _llama_bench(model, threads=threads, tokens=1, extra=["--no-warmup", "--repack", str(int(repack))])[0]
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    subprocess.run([program("llama-bench"), "--list-devices"], check=True, capture_output=True)
    return whole - (time.perf_counter() - begin) - float(result["avg_ns"]) / 1e9


def _llama_bench(model: Path, *, threads: int, prompt: int = 0, tokens: int = 0, extra: list[str] | None = None) -> list[dict[str, Any]]:
    command = [program("llama-bench"), "-m", model, "-t", threads, "-p", prompt, "-n", tokens, "-r", 1, "-o", "json", *(extra or [])]
    return _json_lines(command, lines=False)


def llama_bench_command(model: Path, *, threads: int, repack: bool) -> list[str]:
    """A run of llama-bench that does little but load the model."""
    command = [program("llama-bench"), "-m", model, "-t", threads, "-p", 0, "-n", 1, "-r", 1, "--no-warmup", "--repack", int(repack)]
    return [str(part) for part in command]


def int8_peak(threads: int) -> dict[str, Any]:
    """How fast the machine multiplies 8-bit numbers at best, {"operations_per_second", "instruction"}; see `benchmarks/int8_peak.cpp`."""
    return _json_lines([_ROOT / "build" / "dev" / "bin" / "int8-peak", threads])[0]


def batched_bench_rate(
    model: Path, *, threads: int, streams: int, prompt: int, tokens: int, context_size: int, repack: bool = True
) -> float:
    """Tokens per second of all sequences together in llama-batched-bench's generation phase, its S_TG.

    It decodes `tokens` times one random token of each sequence, after prompts of random tokens. It neither samples nor makes text.

    Args:
        model: the GGUF file.
        threads: CPU threads.
        streams: sequences, each with a KV cache of its own.
        prompt: tokens of each prompt.
        tokens: tokens generated for each.
        context_size: tokens that fit each sequence's KV cache.
        repack: whether weights are repacked at load, which is the default.
    """
    command = [program("llama-batched-bench"), "-m", model, "-t", threads, "-tb", threads, "-c", streams * context_size, "--no-kv-unified"]
    command += ["-npp", prompt, "-ntg", tokens, "-npl", streams, "--output-format", "jsonl", *([] if repack else ["--no-repack"])]
    return float(_json_lines(command)[0]["speed_tg"])


def _json_lines(command: list[Any], *, lines: bool = True) -> list[dict[str, Any]]:
    """What a program writes to stdout as JSON: one object a line among other lines, or one list."""
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {ran.returncode}:\n{ran.stderr[-2000:]}")
    results: list[dict[str, Any]] = (
        [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")] if lines else json.loads(ran.stdout)
    )
    if not results:
        raise RuntimeError(f"{Path(command[0]).name} reported nothing:\n{ran.stderr[-2000:]}")
    return results
