"""`llama-moe inspect` and `llama-moe devices`: what is there."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

import llama_moe
from llama_moe._sizes import format_size
from llama_moe._table import columns

from . import options
from .console import exit_codes
from .loading import add_workers

# As text: a Path would take one of a URL's slashes away.
ModelOrUrl = Annotated[
    str, typer.Argument(metavar="MODEL", help="GGUF file, or the URL or OWNER/REPOSITORY/FILE (Hugging Face) of one; its header is read.")
]


@exit_codes()
def inspect(model: ModelOrUrl, *, as_json: options.Json = False) -> None:
    """Show a model's architecture, experts and formats."""
    info = llama_moe.inspect(model)
    sizes, types = info.by_role(), info.types_by_role()
    if as_json:
        facts = {
            "path": info.path,
            "architecture": info.architecture,
            "parameter_count": info.parameter_count,
            "size_bytes": info.size_bytes,
            "layer_count": info.layer_count,
            "expert_count": info.expert_count,
            "experts_used": info.experts_used,
            "roles": {role: {"bytes": size, "types": types[role]} for role, size in sizes.items()},
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    experts = f"{info.expert_count}, {info.experts_used} used for each token" if info.expert_count else "none"
    typer.echo(
        columns(
            [
                ("model", info.path),
                ("architecture", info.architecture),
                ("parameters", f"{info.parameter_count:,}"),
                ("size", format_size(info.size_bytes)),
                ("layers", str(info.layer_count)),
                ("experts", experts),
            ]
        )
    )
    rows = [("role", "size", "share", "formats")]
    for role, size in sorted(sizes.items(), key=lambda item: -item[1]):
        formats = ", ".join(f"{name} {format_size(part)}" for name, part in types[role].items())
        rows.append((role, format_size(size), f"{size / max(info.size_bytes, 1):.1%}", formats))
    typer.echo("\n" + columns(rows, right=(1, 2)))


@exit_codes()
def devices(*, rpc: options.Rpc = None, as_json: options.Json = False) -> None:
    """List the devices that can hold a model."""
    add_workers(rpc)
    found = llama_moe.devices()
    if as_json:
        typer.echo(json.dumps([asdict(device) for device in found], indent=2))
        return
    rows = [("name", "kind", "backend", "free", "total", "description")]
    rows += [
        (device.name, device.kind, device.backend, format_size(device.memory_free), format_size(device.memory_total), device.description)
        for device in found
    ]
    typer.echo(columns(rows, right=(3, 4)))
