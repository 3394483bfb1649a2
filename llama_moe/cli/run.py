"""`llama-moe run`: continue or answer a prompt."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import llama_moe
from llama_moe import ExpertPlacement, LoraAdapter, Model, SamplingParams, Speculative
from llama_moe._options import Default

from .console import check_one_of, note, progress, regex_rules, stream_to_stdout, text_of
from .pull import model_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, TypeAlias

    from llama_moe import Engine

    Drafting: TypeAlias = Literal["lookup"] | Path | None


def choose_placement(*, cpu_moe: bool, n_cpu_moe: int | None, experts_on: Sequence[str]) -> ExpertPlacement:
    """The placement that the options stand for; more than one kind of them is a usage error."""
    check_one_of(
        "each says where the experts go",
        {"--cpu-moe": cpu_moe, "--n-cpu-moe": n_cpu_moe is not None, "--experts-on": bool(experts_on)},
    )
    if cpu_moe:
        return ExpertPlacement.cpu()
    if n_cpu_moe is not None:
        return ExpertPlacement.cpu_first(n_cpu_moe)
    return ExpertPlacement.rules(regex_rules(experts_on, "DEVICE", "--experts-on")) if experts_on else ExpertPlacement.fit()


def choose_lora(texts: Sequence[str]) -> list[LoraAdapter]:
    """The adapters that FILE[=SCALE] stand for; a scale that is no number is part of the file's name."""
    adapters = []
    for text in texts:
        file, _, number = text.rpartition("=")
        try:
            adapters.append(LoraAdapter(file, float(number)) if file and not Path(text).exists() else LoraAdapter(text))
        except ValueError:
            adapters.append(LoraAdapter(text))
    return adapters


def choose_sampling(
    *, max_tokens: int | None, temperature: float, seed: int | None, stop: Sequence[str], grammar: Path | None, json_schema: str | None
) -> SamplingParams:
    """How to sample; a file that cannot be read is a usage error."""
    check_one_of("each says what the text must be", {"--grammar": grammar is not None, "--json-schema": json_schema is not None})
    if json_schema is not None and not json_schema.lstrip().startswith("{"):
        json_schema = text_of(Path(json_schema), "--json-schema")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop,
        grammar=None if grammar is None else text_of(grammar, "--grammar"),
        json_schema=json_schema,
    )


def choose_drafting(*, lookup: bool, draft_model: Path | None) -> Drafting:
    """What drafts tokens: lookup, the model in a file, or nothing."""
    check_one_of("each says what drafts tokens", {"--lookup": lookup, "--draft-model": draft_model is not None})
    return "lookup" if lookup else draft_model


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The model and engine that a command's options stand for."""

    model: Path
    experts: ExpertPlacement
    drafting: Drafting
    rpc: Sequence[str]
    context_size: int
    threads: int | None
    repack: bool | None
    profile: str | None
    lora: Sequence[LoraAdapter]


def open_engine(stack: contextlib.ExitStack, choice: EngineChoice) -> Engine:
    """Loads the model, from the hub if need be, and makes the engine; both are closed with the stack."""
    path = model_file(choice.model)
    for endpoint in choice.rpc:
        llama_moe.add_rpc_device(endpoint)
    speculative = Speculative.lookup() if choice.drafting == "lookup" else None
    if isinstance(choice.drafting, Path):
        with progress("Loading the draft model") as on_progress:
            draft = Model(choice.drafting, repack=choice.repack is not False, on_progress=on_progress)
        speculative = Speculative.draft(stack.enter_context(draft))
    with progress("Loading") as on_progress:
        engine = llama_moe.load(
            path,
            experts=Default("fit") if choice.experts == ExpertPlacement.fit() else choice.experts,  # which no option asks for
            context_size=choice.context_size,
            threads=Default(None) if choice.threads is None else choice.threads,
            speculative=speculative,
            repack=Default(True) if choice.repack is None else choice.repack,
            profile=choice.profile,
            lora=choice.lora,
            on_progress=on_progress,
        )
    return stack.enter_context(engine)


def run_prompt(choice: EngineChoice, prompt: str, *, params: SamplingParams, chat: bool, system: str | None, memory: bool) -> None:
    """Loads the model, streams the completion or the answer, and reports speed, and memory if asked to."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with contextlib.ExitStack() as stack:
        engine = open_engine(stack, choice)
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            stream_to_stdout(engine.stream_chat([*messages, {"role": "user", "content": text}], params))
        else:
            stream_to_stdout(engine.stream(text, params))
        if memory:
            note(str(engine.memory()))
