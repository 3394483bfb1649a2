"""`llama-moe run`: continue a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

import llama_moe
from llama_moe import ExpertPlacement, SamplingParams

from .console import note, progress, stream_to_stdout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def choose_placement(*, cpu_moe: bool, n_cpu_moe: int | None, experts_on: Sequence[str]) -> ExpertPlacement:
    """The placement that the options stand for; more than one kind of them is a usage error."""
    given = [
        option
        for option, value in (("--cpu-moe", cpu_moe), ("--n-cpu-moe", n_cpu_moe is not None), ("--experts-on", bool(experts_on)))
        if value
    ]
    if len(given) > 1:
        raise typer.BadParameter("each says where the experts go; give only one of them", param_hint=" and ".join(given))
    if cpu_moe:
        return ExpertPlacement.cpu()
    if n_cpu_moe is not None:
        return ExpertPlacement.cpu_first(n_cpu_moe)
    return ExpertPlacement.rules(map(_rule, experts_on)) if experts_on else ExpertPlacement.fit()


def _rule(text: str) -> tuple[str, str]:
    regex, _, device = text.rpartition("=")
    if not (regex and device):
        raise typer.BadParameter(f"{text!r} is not REGEX=DEVICE", param_hint="--experts-on")
    return regex, device


def run_prompt(
    model: Path,
    prompt: str,
    *,
    experts: ExpertPlacement,
    rpc: Sequence[str],
    max_tokens: int,
    context_size: int,
    temperature: float,
    seed: int | None,
    threads: int | None,
    repack: bool,
    memory: bool,
) -> None:
    """Loads the model, streams the completion, and reports speed, and memory if asked to."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    for endpoint in rpc:
        llama_moe.add_rpc_device(endpoint)
    with progress("Loading") as on_progress:
        engine = llama_moe.load(model, experts=experts, context_size=context_size, threads=threads, repack=repack, on_progress=on_progress)
    with engine:
        stream_to_stdout(engine, text, params)
        if memory:
            note(str(engine.memory()))
