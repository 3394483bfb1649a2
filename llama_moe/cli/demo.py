"""`llama-moe demo` and `llama-moe demo-model`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import llama_moe
from llama_moe import SamplingParams, _core
from llama_moe._sizes import format_size
from llama_moe.model import resolve_placement

from .console import exit_codes, note, progress, stream_to_stdout

if TYPE_CHECKING:
    from llama_moe import Device

_QUESTION = "What is a mixture of experts? Answer in three sentences."
_PROMPT = f"<|im_start|>user\n{_QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@exit_codes()
def demo_model(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    *,
    experts: Annotated[int, typer.Option("--experts", metavar="N", help="Experts in each layer.")] = 8,
    used: Annotated[int, typer.Option("--used", metavar="N", help="Experts that compute each token.")] = 2,
) -> None:
    """Write a small Mixture-of-Experts model.

    It is made from SmolLM2-135M, with copies of its feed-forward blocks as experts, and generates the same text.
    """
    from llama_moe.demo_model import write_demo_model

    with progress("Writing") as on_progress:
        path = write_demo_model(out, experts=experts, used=used, on_progress=on_progress)
    typer.echo(f"{path}: {format_size(path.stat().st_size)}")


@exit_codes()
def demo() -> None:
    """Try it: generate, and show the memory saved.

    The experts of the demo model go to host memory, the rest to this machine's GPU, or to a worker process that stands in for one.
    """
    from llama_moe.demo_model import demo_model_path

    note("Preparing the demo model; the first time it is fetched and written.")
    with progress("Writing the demo model") as on_progress:
        model = demo_model_path(on_progress=on_progress)
    typer.echo(f"Model: {model} ({format_size(model.stat().st_size)})")
    with contextlib.ExitStack() as stack:
        accelerators, threads = _accelerators(stack)
        names = [device.name for device in accelerators]
        everything = _bytes_on(names, resolve_placement(model, experts="gpu", devices=accelerators).by_device())
        with progress("Loading") as on_progress:
            engine = llama_moe.load(model, experts="cpu", devices=accelerators, threads=threads, on_progress=on_progress)
        stack.enter_context(engine)
        typer.echo(f"\n> {_QUESTION}\n")
        stream_to_stdout(engine.stream(_PROMPT, SamplingParams(max_tokens=128, temperature=0)))
        typer.echo(f"\nMemory by device and role:\n\n{engine.memory()}\n")
        kept = _bytes_on(names, engine.model.placement.by_device())
        typer.echo(
            f"Weights on {', '.join(names)}: {format_size(kept)}, with all experts there it would be {format_size(everything)}: "
            f"{format_size(everything - kept)} ({(everything - kept) / everything:.0%}) saved."
        )


def _accelerators(stack: contextlib.ExitStack) -> tuple[list[Device], int | None]:
    """This machine's GPUs; a worker of our own, stopped with the stack, where there is none. And the CPU threads for the engine."""
    gpus = [device for device in llama_moe.devices() if device.kind in {"gpu", "integrated_gpu"}]
    if gpus:
        typer.echo(f"Accelerator: {', '.join(map(str, gpus))}")
        return gpus, None
    from llama_moe.worker import Worker

    half = max(1, _core.usable_cores() // 2)
    worker = stack.enter_context(Worker(threads=half))
    typer.echo(f"Accelerator: none here. A worker process on {worker.endpoint} stands in for one: its memory plays the part of the")
    typer.echo("accelerator's, and it shares this CPU with the experts, so the speed is not that of a GPU.")
    return llama_moe.add_rpc_device(worker.endpoint), half


def _bytes_on(names: list[str], by_device: dict[str, int]) -> int:
    return sum(size for device, size in by_device.items() if device in names)
