"""A table of what keeping the experts in host memory saves of an accelerator's memory, and what it costs in speed.

    python -m benchmarks.vram_table MODEL.gguf [MODEL.gguf ...] [--json FILE] [--output FILE]

For each model everything on the accelerator, then all experts in host memory: memory and tokens per second of both, measured by
`llama_moe.benchmark()`. "VRAM" is the memory report's: weights, KV cache and compute buffers on the accelerators. "Driver" is how much less
memory the driver called free once the engine was there; it has what the report cannot know, such as the CUDA context.

It needs an accelerator. `--rpc` lets a worker on this machine stand in for one: bytes are those of an accelerator, speeds are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_moe
from llama_moe import Device
from llama_moe._files import written_whole
from llama_moe._sizes import format_size
from llama_moe.benchmark_report import BenchmarkReport, BenchmarkRow
from llama_moe.errors import LlamaMoeError
from llama_moe.worker import Worker

HEAD = ("model", "quantisation", "device VRAM", "VRAM, experts on CPU", "saved", "reduction", "tokens/s", "tokens/s, experts on CPU")


@dataclass(frozen=True)
class Line:
    """One model."""

    model: str
    quantisation: str
    report: BenchmarkReport

    def placed(self, placement: str) -> BenchmarkRow:
        return next(row for row in self.report.rows if row.placement == placement)

    def cells(self) -> tuple[str, ...]:
        gpu, cpu = self.placed("gpu"), self.placed("cpu")
        saved = "-" if gpu.error or cpu.error or cpu.saved_bytes is None else format_size(cpu.saved_bytes)
        reduction = "-" if saved == "-" or cpu.reduction is None else f"{cpu.reduction:.1%}"
        return (self.model, self.quantisation, vram(gpu), vram(cpu), saved, reduction, speed(gpu), speed(cpu))

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "quantisation": self.quantisation, "report": self.report.to_dict()}


def vram(row: BenchmarkRow) -> str:
    if row.error is not None or row.device_bytes is None:
        return "failed"
    drop = sum((row.free_memory_drop or {}).values())
    return format_size(row.device_bytes) + (f" (driver {format_size(drop)})" if drop else "")


def speed(row: BenchmarkRow) -> str:
    decode = row.speed.decode if row.speed else None
    return "-" if decode is None else str(decode.tokens_per_second)


def quantisation(path: Path) -> str:
    """The formats of the experts, or of all weights of a dense model, that have a tenth of their bytes or more."""
    types = llama_moe.inspect(path).types_by_role()
    sizes = types.get("experts") or types["weights"]
    return " + ".join(name for name, size in sizes.items() if size * 10 >= sum(sizes.values()))


def measure(path: Path, devices: list[Device], arguments: argparse.Namespace) -> Line:
    info = llama_moe.inspect(path)
    if not info.expert_count:
        raise LlamaMoeError(f"{path} ({info.architecture}) has no experts")
    report = llama_moe.benchmark(
        path,
        placements=("gpu", "cpu"),
        prompt_tokens=0,
        generate_tokens=arguments.tokens,
        repetitions=arguments.repetitions,
        context_size=arguments.context_size,
        threads=arguments.threads,
        devices=devices,
        on_progress=lambda text: sys.stderr.write(f"{text}\n"),
    )
    return Line(str(info.metadata.get("general.name") or path.stem), quantisation(path), report)


def markdown(lines: list[Line], devices: list[Device], stand_in: bool) -> str:
    first = lines[0].report
    names = ", ".join(f"{device.name} ({device.description}, {format_size(device.memory_total)})" for device in devices)
    facts = [f"accelerator: {names}"]
    if stand_in:
        facts = [f"no accelerator: an RPC worker stands in for one, {names}; its speeds say nothing of a GPU's"]
    facts += [
        f"CPU: {first.machine['cpu']}; {first.threads} threads",
        f"llama_moe {first.build['version']}, llama.cpp {first.build['llama_cpp_commit']}, {first.build['compiler']}",
        f"backends: {first.build['backends']}",
        f"context of {first.context_size} tokens, micro-batches of {first.micro_batch_size}",
        "tokens/s are of generation: mean ± standard deviation",
    ]
    facts += [f"{line.model}, {row.placement}: {row.error}" for line in lines for row in line.report.rows if row.error is not None]
    table = [HEAD, ("---", "---", *["---:"] * (len(HEAD) - 2)), *(line.cells() for line in lines)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in table), "", *(f"- {fact}" for fact in facts), ""])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="GGUF files of Mixture-of-Experts models")
    parser.add_argument(
        "--rpc", nargs="?", const="", metavar="HOST:PORT", help="let this worker, or one started here, stand in for an accelerator"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate in each run (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each placement (default %(default)s)")
    parser.add_argument("--context-size", type=int, default=4096, help="tokens of context (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one for each core)")
    parser.add_argument("--output", type=Path, help="write the Markdown table here as well")
    parser.add_argument("--json", type=Path, help="write the whole record here")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    with contextlib.ExitStack() as stack:
        if arguments.rpc is None:
            devices = [device for device in llama_moe.devices() if device.kind in ("gpu", "integrated_gpu")]
            if not devices:
                sys.stderr.write(
                    "there is no accelerator: nothing would be saved, so there is no table. Build for your GPU (docs/building.md), "
                    "or see what the table looks like with --rpc, where a worker on this machine stands in for one\n"
                )
                return 1
        else:
            endpoint = arguments.rpc or stack.enter_context(Worker(threads=arguments.threads)).endpoint
            devices = llama_moe.add_rpc_device(endpoint)
        try:
            lines = [measure(path, devices, arguments) for path in arguments.models]
        except (LlamaMoeError, OSError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
    text = markdown(lines, devices, stand_in=arguments.rpc is not None)
    record = {"stand_in": arguments.rpc is not None, "lines": [line.to_dict() for line in lines]}
    for path, content in ((arguments.output, text), (arguments.json, json.dumps(record, indent=2) + "\n")):
        if path is not None:
            with written_whole(path) as partial:
                partial.write_text(content, encoding="utf-8")
    print(text, end="")
    return 1 if any(line.report.failed for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
