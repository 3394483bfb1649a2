"""`llama-moe run`: continue or answer a prompt."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

import llama_moe
from llama_moe import ExpertPlacement, Model, SamplingParams, Speculative

from .console import note, progress, stream_to_stdout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal, TypeAlias

    Drafting: TypeAlias = Literal["lookup"] | Path | None


def choose_placement(*, cpu_moe: bool, n_cpu_moe: int | None, experts_on: Sequence[str]) -> ExpertPlacement:
    """The placement that the options stand for; more than one kind of them is a usage error."""
    _check_one_of(
        "each says where the experts go",
        {"--cpu-moe": cpu_moe, "--n-cpu-moe": n_cpu_moe is not None, "--experts-on": bool(experts_on)},
    )
    if cpu_moe:
        return ExpertPlacement.cpu()
    if n_cpu_moe is not None:
        return ExpertPlacement.cpu_first(n_cpu_moe)
    return ExpertPlacement.rules(map(_rule, experts_on)) if experts_on else ExpertPlacement.fit()


def choose_sampling(
    *, max_tokens: int, temperature: float, seed: int | None, stop: Sequence[str], grammar: Path | None, json_schema: str | None
) -> SamplingParams:
    """How to sample; a file that cannot be read is a usage error."""
    _check_one_of("each says what the text must be", {"--grammar": grammar is not None, "--json-schema": json_schema is not None})
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = _text_of(Path(json_schema), "--json-schema")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
        grammar=None if grammar is None else _text_of(grammar, "--grammar"),
        json_schema=json_schema,
    )


def choose_drafting(*, lookup: bool, draft_model: Path | None) -> Drafting:
    """What drafts tokens: lookup, the model in a file, or nothing."""
    _check_one_of("each says what drafts tokens", {"--lookup": lookup, "--draft-model": draft_model is not None})
    return "lookup" if lookup else draft_model


def _check_one_of(reason: str, options: Mapping[str, bool]) -> None:
    given = [option for option, is_given in options.items() if is_given]
    if len(given) > 1:
        raise typer.BadParameter(f"{reason}; give only one of them", param_hint=" and ".join(given))


def _text_of(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{str(path)!r} cannot be read: {error.strerror}", param_hint=option) from None
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{str(path)!r} is not text in UTF-8", param_hint=option) from None


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
    params: SamplingParams,
    drafting: Drafting,
    chat: bool,
    system: str | None,
    rpc: Sequence[str],
    context_size: int,
    threads: int | None,
    repack: bool,
    memory: bool,
) -> None:
    """Loads the model, streams the completion or the answer, and reports speed, and memory if asked to."""
    text = sys.stdin.read() if prompt == "-" else prompt
    for endpoint in rpc:
        llama_moe.add_rpc_device(endpoint)
    with contextlib.ExitStack() as stack:
        speculative = Speculative.lookup() if drafting == "lookup" else None
        if isinstance(drafting, Path):
            with progress("Loading the draft model") as on_progress:
                speculative = Speculative.draft(stack.enter_context(Model(drafting, repack=repack, on_progress=on_progress)))
        with progress("Loading") as on_progress:
            engine = llama_moe.load(
                model,
                experts=experts,
                context_size=context_size,
                threads=threads,
                speculative=speculative,
                repack=repack,
                on_progress=on_progress,
            )
        stack.enter_context(engine)
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            stream_to_stdout(engine.stream_chat([*messages, {"role": "user", "content": text}], params))
        else:
            stream_to_stdout(engine.stream(text, params))
        if memory:
            note(str(engine.memory()))
