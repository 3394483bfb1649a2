"""`llama-moe plan`: three placements side by side, before a load."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

import llama_moe
from llama_moe import DeviceSpec, ExpertPlacement, Plan
from llama_moe._sizes import format_size, parse_rate
from llama_moe._table import columns
from llama_moe.errors import DoesNotFitError, LlamaMoeError
from llama_moe.inspection import header_file
from llama_moe.planning import ASSUMED_BANDWIDTH

from . import options
from .console import EXIT_FAILURE, exit_codes, note
from .loading import add_workers, choose_lora

if TYPE_CHECKING:
    from collections.abc import Callable

    from llama_moe.prediction import Prediction

_TITLES = {"gpu": "all on GPU", "cpu": "experts on CPU", "fit": "fitted"}


@exit_codes()
def plan(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="GGUF file, its URL, or OWNER/REPOSITORY/FILE of Hugging Face; only the header is read."),
    ],
    *,
    vram: Annotated[
        list[str] | None,
        typer.Option(
            "--vram",
            metavar="SIZE",
            help="Plan for a GPU of this size, such as 8GiB. May be given several times.",
        ),
    ] = None,
    ram: Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="Host memory to use. Default: what is available.")] = None,
    overhead: Annotated[
        str | None, typer.Option("--overhead", metavar="SIZE", help="What the driver takes of each --vram. Default: 512MiB.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option("--bandwidth", metavar="RATE", help="Of the memory of each --vram, such as 448GB/s, for predicted speeds.")
    ] = None,
    reserve: Annotated[str, typer.Option("--reserve", metavar="SIZE", help="What the fitted plan leaves free on each GPU.")] = "512MiB",
    context_size: options.ContextSize = 4096,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, metavar="N", help="Sequences held at once.")] = 1,
    kv_type: options.KvType = "f16",
    gpu_layers: Annotated[int | None, typer.Option("--gpu-layers", min=0, metavar="N", help="Layers on the GPU. Default: all.")] = None,
    rpc: options.Rpc = None,
    lora: options.Lora = None,
    predict: Annotated[bool, typer.Option("--predict/--no-predict", help="Predict speeds; measures the machine the first time.")] = True,
    as_json: options.Json = False,
) -> None:
    """Show what a model will take, and how quick it will be, before loading it.

    Three plans side by side: everything on the GPU, all experts in host memory, and as many experts on the GPU as fit. Nothing is loaded.
    """
    for name, value in (("--overhead", overhead), ("--bandwidth", bandwidth)):
        if value is not None and not vram:
            raise typer.BadParameter("it is of the GPU that --vram describes, and none is given", param_hint=name)
    if bandwidth is not None:
        parse_rate(bandwidth, "--bandwidth")
    workers = add_workers(rpc)
    adapters = choose_lora(lora)
    sizes = vram or []
    specs = [
        DeviceSpec(f"GPU{i}" if len(sizes) > 1 else "GPU", size, overhead=overhead or "512MiB", bandwidth=bandwidth)
        for i, size in enumerate(sizes)
    ]
    plans: dict[str, Plan] = {}
    failure: DoesNotFitError | None = None
    with header_file(model) as header:  # fetched once, where it is on a server
        for kind, experts in (
            ("gpu", ExpertPlacement.gpu()),
            ("cpu", ExpertPlacement.cpu()),
            ("fit", ExpertPlacement.fit(reserve=reserve)),
        ):
            if kind == "cpu" and not plans["gpu"].info.expert_count:
                continue
            try:
                planned = llama_moe.plan(
                    header,
                    devices=[*specs, *workers] if specs else None,
                    ram=ram,
                    experts=experts,
                    context_size=context_size,
                    max_sequences=max_sequences,
                    kv_type=kv_type,
                    gpu_layers="all" if gpu_layers is None else gpu_layers,
                    lora=adapters,
                )
            except DoesNotFitError as error:
                failure = error
            else:
                plans[kind] = replace(planned, info=replace(planned.info, path=model))
    speeds = _predicted(plans) if predict else {}
    if as_json:
        typer.echo(json.dumps(_as_data(plans, speeds, failure), indent=2))
    else:
        context = f"{context_size or 'all'} tokens of context" + (f" for each of {max_sequences} sequences" if max_sequences > 1 else "")
        _write_tables(model, plans, speeds, f"{context}, KV cache in {kv_type}")
        if specs and bandwidth is None and predict:
            typer.echo(f"\npredicted for GPU memory of {ASSUMED_BANDWIDTH // 10**9} GB/s (assumed; --bandwidth states it)")
    if failure is not None:
        note(f"error: {failure}")
        raise typer.Exit(EXIT_FAILURE)


def _predicted(plans: dict[str, Plan]) -> dict[str, Prediction | None]:
    """The speeds; None where one cannot be predicted, and the reason is noted."""
    try:
        measured = plans.get("cpu", plans["gpu"]).bandwidths()  # the plan that needs most of the host
    except LlamaMoeError as error:
        note(f"no predicted speeds: {error}")
        return dict.fromkeys(plans)

    def predicted(kind: str) -> Prediction | None:
        try:
            return plans[kind].predict(bandwidths=measured)
        except LlamaMoeError as error:
            note(f"no predicted speed of {_TITLES[kind]}: {error}")
            return None

    return {kind: predicted(kind) for kind in plans}


def _as_data(plans: dict[str, Plan], speeds: dict[str, Prediction | None], failure: DoesNotFitError | None) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for kind, plan in plans.items():
        speed = speeds.get(kind)
        data[kind] = {
            **plan.to_dict(),
            "device_bytes": plan.device_bytes,
            "host_bytes": plan.host_bytes,
            "saved_bytes": plans["gpu"].device_bytes - plan.device_bytes,
            "reduction": plan.reduction(plans["gpu"]),
            "summary": plan.summary,
            "prediction": None if speed is None else speed.to_dict(),
        }
    if failure is not None:
        data["fit"] = {"fits": False, "error": str(failure), "shortfall": failure.shortfall, "changes": list(failure.changes)}
    return data


def _write_tables(model: str, plans: dict[str, Plan], speeds: dict[str, Prediction | None], context: str) -> None:
    everything = plans["gpu"]
    info = everything.info
    experts = f"{info.expert_count} experts of which {info.experts_used} compute a token" if info.expert_count else "no experts"
    typer.echo(f"{model}: {info.architecture}, {info.layer_count} layers, {experts}, {format_size(info.size_bytes)}")
    typer.echo(f"{context}\n")

    def row(label: str, cell: Callable[[Plan], str]) -> list[str]:
        return [label, *(cell(plan) for plan in plans.values())]

    rows = [["", *(_TITLES[kind] for kind in plans)]]
    for device in everything.capacity:
        name = "host memory" if device == "CPU" else device
        rows.append(row(name, lambda plan, device=device: format_size(plan.memory.by_device().get(device, 0))))  # type: ignore[misc]
        roles = dict.fromkeys(entry.role for plan in plans.values() for entry in plan.rows if entry.device == device)
        for role in roles:
            size = {kind: sum(e.bytes for e in plan.rows if (e.device, e.role) == (device, role)) for kind, plan in plans.items()}
            rows.append([f"  {role.replace('_', ' ')}", *(format_size(part) if part else "-" for part in size.values())])
        rows.append(row("  may be used", lambda plan, device=device: format_size(plan.capacity[device])))  # type: ignore[misc]
    rows.append(row("fits", lambda plan: "yes" if plan.fits else f"no, {format_size(max(plan.shortfall.values()))} short"))
    if everything.device_bytes:
        rows.append(row("saved", lambda plan: format_size(everything.device_bytes - plan.device_bytes) if plan is not everything else "-"))
        rows.append(row("reduction", lambda plan: f"{plan.reduction(everything):.1%}" if plan is not everything else "-"))
    if speeds:
        cells = ("-" if speed is None else f"{speed.decode_tokens_per_second:.1f}" for speed in speeds.values())
        rows.append(["tokens/s (predicted)", *cells])
    typer.echo(columns(rows, right=range(1, len(plans) + 1)))
    if "fit" in plans:
        typer.echo(f"\n{plans['fit'].summary}")
