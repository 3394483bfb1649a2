"""`llama-moe run`: continue or answer a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llama_moe import SamplingParams

from . import options
from .console import check_one_of, exit_codes, note, stream_to_stdout, text_of
from .loading import opening


@exit_codes()
def run(
    model: options.ModelOrHub,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="PROMPT", help="What to continue, or to answer; '-' reads it from standard input.")
    ],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, in the format of the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message before it; implies --chat.")] = None,
    cpu_moe: options.CpuMoe = False,
    n_cpu_moe: options.NCpuMoe = None,
    experts_on: options.ExpertsOn = None,
    rpc: options.Rpc = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Most tokens to generate.")] = 256,
    context_size: options.ContextSize = 4096,
    temperature: options.Temperature = 0.8,
    seed: options.Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="The text ends before this. May be given several times.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option("--grammar", metavar="FILE", help="The text matches this GBNF grammar.")] = None,
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", metavar="FILE_OR_JSON", help="The text is JSON of this JSON schema; '{}' is any.")
    ] = None,
    lookup: options.Lookup = False,
    draft_model: options.DraftModel = None,
    threads: options.Threads = None,
    repack: options.TunableRepack = None,
    expert_kernels: options.TunableExpertKernels = None,
    profile: options.Profile = None,
    lora: options.Lora = None,
    memory: options.Memory = False,
) -> None:
    """Continue a prompt, or answer it, streaming the text.

    The text goes to standard output; reasoning, speed and memory to standard error. Without --cpu-moe, --n-cpu-moe or --experts-on, as
    many experts as fit go to the accelerators.
    """
    opened = opening(
        model,
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
        experts_on=experts_on,
        rpc=rpc,
        context_size=context_size,
        lookup=lookup,
        draft_model=draft_model,
        threads=threads,
        repack=repack,
        expert_kernels=expert_kernels,
        profile=profile,
        lora=lora,
    )
    check_one_of("each says what the text must be", {"--grammar": grammar is not None, "--json-schema": json_schema is not None})
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop or [],
        grammar=None if grammar is None else text_of(grammar, "--grammar"),
        json_schema=_schema(json_schema),
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with opened as engine:
        if chat or system is not None:
            messages = [] if system is None else [{"role": "system", "content": system}]
            stream_to_stdout(engine.stream_chat([*messages, {"role": "user", "content": text}], params))
        else:
            stream_to_stdout(engine.stream(text, params))
        if memory:
            note(str(engine.memory()))


def _schema(file_or_json: str | None) -> str | None:
    """The text of the schema; a file that cannot be read is a usage error."""
    if file_or_json is None or file_or_json.lstrip().startswith("{"):
        return file_or_json
    return text_of(Path(file_or_json), "--json-schema")
