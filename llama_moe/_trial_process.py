"""The process of one trial: reads what to measure from standard input, writes what it measured to standard output.

It is a process so that what ends it, a crash or the operating system that runs out of memory, ends nothing else. It ends with the process
that started it, which holds the other end of its standard input.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import llama_moe
from llama_moe import LoraAdapter
from llama_moe._placements import parse_placement
from llama_moe._speed import measure_speed
from llama_moe.devices import chosen_accelerators
from llama_moe.errors import LlamaMoeError
from llama_moe.profiles import TunedOptions
from llama_moe.worker import exit_with_stdin


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """What came of a trial: speeds and memory, or "error"."""
    options = TunedOptions.from_dict(task["options"])
    try:
        for endpoint in task["rpc"]:
            llama_moe.add_rpc_device(endpoint)
        with llama_moe.load(
            task["path"],
            experts=parse_placement(options.experts),
            context_size=task["context_size"],
            max_sequences=task["max_sequences"],
            micro_batch_size=options.micro_batch_size,
            threads=options.threads,
            threads_batch=options.threads_batch,
            repack=options.repack,
            expert_kernels=options.expert_kernels,
            host_memory=options.host_memory,
            devices=task["devices"],
            lora=[LoraAdapter(**adapter) for adapter in task["lora"]],
        ) as engine:
            memory = engine.memory().by_device()
            speed = measure_speed(
                engine,
                prompt_tokens=task["prompt_tokens"],
                generate_tokens=task["generate_tokens"],
                repetitions=task["repetitions"],
                seconds=task["seconds"],
                streams=task["max_sequences"],
            )
    except (LlamaMoeError, OSError) as error:
        return {"error": "; ".join(str(error).splitlines())}
    return {
        "prompt": speed.prompt.tokens_per_second.median if speed.prompt else 0.0,
        "decode": speed.decode.tokens_per_second.median if speed.decode else 0.0,
        "device_bytes": {device.name: memory.get(device.name, 0) for device in chosen_accelerators(task["devices"])},
    }


def main() -> None:
    """Measures once."""
    # Of all processes this is the one to end when memory runs out; only Linux has this file.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=exit_with_stdin, daemon=True).start()
    sys.stdout.write(json.dumps(measure(task)) + "\n")


if __name__ == "__main__":
    main()
