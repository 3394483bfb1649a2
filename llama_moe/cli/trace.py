"""`llama-moe trace`: which experts a text uses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

import llama_moe
from llama_moe import SamplingParams
from llama_moe._files import check_writable
from llama_moe._table import columns
from llama_moe.errors import InvalidOptionError

from . import options
from .console import exit_codes, note, progress, text_of
from .loading import add_workers, choose_lora, choose_placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_moe import CacheSimulation, Engine, RoutingTrace
    from llama_moe.model import ExpertKernels
    from llama_moe.routing_cache import CachePolicy

_POLICIES: tuple[CachePolicy, ...] = ("lru", "lfu", "static")


@exit_codes()
def trace(
    model: options.Model,
    *,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Compute this text.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="PROMPT", help="Compute this prompt and continue it, always with the most likely token."),
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=1, metavar="N", help="Most tokens to continue it with. Default: 128.")
    ] = None,
    cpu_moe: options.CpuMoe = False,
    n_cpu_moe: options.NCpuMoe = None,
    rpc: options.Rpc = None,
    lora: options.Lora = None,
    context_size: options.ContextSize = 4096,
    threads: options.Threads = None,
    repack: options.Repack = True,
    expert_kernels: options.ExpertKernels = "auto",
    cache_slots: Annotated[
        list[int] | None,
        typer.Option(
            "--cache-slots",
            min=1,
            metavar="N",
            help="Say how often a cache of N experts would have had the ones that were needed. May be given several times.",
        ),
    ] = None,
    heatmap: Annotated[Path | None, typer.Option("--heatmap", metavar="FILE", help="Draw a heatmap into this image.")] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Keep it all for RoutingTrace.load().")] = None,
    as_json: options.Json = False,
) -> None:
    """Show which experts the routers of a model choose for a text.

    For each layer: its most used experts with their share of the tokens, how many were never used, and how even it was: the entropy (1: all
    alike) and the coefficient of variation (0: all alike). Texts longer than the context are computed in pieces.
    """
    experts = choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe)
    text = None if file is None else text_of(file, "--file")
    if text is None and prompt is None:
        raise typer.BadParameter("there is nothing to compute; give a text, a prompt or both", param_hint="--file and --prompt")
    if generate is not None and prompt is None:
        raise typer.BadParameter("only a prompt is continued; give one with --prompt", param_hint="--generate")
    _check_files(heatmap, save)
    add_workers(rpc)
    adapters = choose_lora(lora)
    with (
        progress("Loading") as on_progress,
        llama_moe.load(
            model,
            experts=experts,
            context_size=context_size,
            threads=threads,
            repack=repack,
            expert_kernels=cast("ExpertKernels", expert_kernels),
            lora=adapters,
            on_progress=on_progress,
        ) as engine,
    ):
        with engine.trace_routing(choices=bool(cache_slots) or save is not None) as routing:
            if text is not None:
                _read(engine, text)
            if prompt is not None:
                completion = engine.generate(prompt, SamplingParams(max_tokens=128 if generate is None else generate, temperature=0))
                note(f"{prompt}{completion.text}")
        caches = [routing.simulate_cache(slots, policy) for slots in cache_slots or () for policy in _POLICIES]
    # Before the files: what was computed is told whatever becomes of them.
    if as_json:
        typer.echo(json.dumps(routing.to_dict() | {"caches": [asdict(cache) | {"hit_rate": cache.hit_rate} for cache in caches]}, indent=2))
    else:
        typer.echo(_report(routing, caches))
    if save is not None:
        routing.save(save)
    if heatmap is not None:
        routing.plot(heatmap)


def _check_files(heatmap: Path | None, save: Path | None) -> None:
    """Refuses what could not be written, before the work of minutes."""
    if save is not None:
        check_writable(save)
    if heatmap is not None:
        from llama_moe.routing_plot import check_plot

        try:
            check_plot(heatmap)
        except ImportError as error:
            raise InvalidOptionError(f"--heatmap: {error}") from None


def _read(engine: Engine, text: str) -> None:
    """Computes a text, in pieces that fit the context, all layers for each token."""
    tokens = engine.model.tokenize(text)
    if len(tokens) < 2:
        raise InvalidOptionError(f"the text has {len(tokens)} tokens; it must have 2 or more")
    # A score needs nothing after its last token, so that one begins the next piece.
    step = engine.context_size - 1
    for begin in range(0, len(tokens) - 1, step):
        engine.score(tokens[begin : begin + step + 1])


def _report(routing: RoutingTrace, caches: Sequence[CacheSimulation]) -> str:
    layers = routing.by_layer(top=4)
    rows = [("layer", "tokens", "most used experts", "unused", "entropy", "variation")]
    rows += [
        (
            str(layer.layer),
            f"{layer.tokens:,}",
            ", ".join(f"{expert} ({share:.1%})" for expert, share in layer.top),
            str(layer.unused),
            f"{layer.entropy:.3f}",
            f"{layer.variation:.3f}",
        )
        for layer in layers
    ]
    uniform = routing.experts_used / routing.expert_count
    experts = f"{routing.experts_used} of {routing.expert_count} experts each"
    parts = [
        f"{routing.tokens:,} tokens, {experts}; used alike, each would compute {uniform:.1%} of the tokens",
        columns(rows, right=(0, 1, 3, 4, 5)),
    ]
    if caches:
        total = len(routing.layers) * routing.expert_count
        found = [("cache slots", "of all experts", *_POLICIES)]
        by_slots = {slots: {cache.policy: cache for cache in caches if cache.slots == slots} for slots in {c.slots: None for c in caches}}
        found += [
            (str(slots), f"{slots / total:.1%}", *(f"{of_policy[policy].hit_rate:.1%}" for policy in _POLICIES))
            for slots, of_policy in by_slots.items()
        ]
        parts.append("Hit rates of a cache that all layers share:\n" + columns(found, right=range(5)))
    return "\n\n".join(parts)
