"""The commands and their options; what they do is in the module of each, imported when it runs, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import exit_codes

app = typer.Typer(
    help="Run Mixture-of-Experts models that are larger than the GPU's memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="GGUF file; the first one of a split model.")]
ModelOrHubArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="GGUF file; or OWNER/REPOSITORY/FILE of Hugging Face, which is fetched if need be.")
]
# As text: a Path would take one of a URL's slashes away.
ModelOrUrlArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="GGUF file, or the URL or OWNER/REPOSITORY/FILE (Hugging Face) of one; its header is read.")
]
RpcOption = Annotated[
    list[str] | None, typer.Option("--rpc", metavar="HOST:PORT", help="Use this worker's devices too. May be given several times.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: one for each physical core.")
]
BatchThreadsOption = Annotated[
    int | None, typer.Option("--threads-batch", min=1, metavar="N", help="CPU threads for prompts. Default: those for single tokens.")
]
RepackOption = Annotated[bool, typer.Option("--repack/--no-repack", help="Let llama.cpp rearrange weights for the CPU.")]
CpuMoeOption = Annotated[bool, typer.Option("--cpu-moe", help="All experts in host memory.")]
NCpuMoeOption = Annotated[
    int | None, typer.Option("--n-cpu-moe", min=0, metavar="N", help="The experts of the first N layers in host memory.")
]
ExpertsOnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--experts-on",
        metavar="REGEX=DEVICE",
        help="Tensors whose name matches go to this device. May be given several times; the first that matches decides.",
    ),
]
TemperatureOption = Annotated[float, typer.Option("--temp", min=0.0, metavar="T", help="0: always the most likely token.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="S", help="Of the random choices. Default: a new one.")]
LookupOption = Annotated[bool, typer.Option("--lookup", help="Draft tokens by looking up what followed the last ones before.")]
DraftModelOption = Annotated[
    Path | None, typer.Option("--draft-model", metavar="FILE", help="Draft tokens with this smaller model of the same vocabulary.")
]
RepackIfQuickerOption = Annotated[
    bool | None, typer.Option("--repack/--no-repack", help="Let llama.cpp rearrange weights for the CPU. Default: it may.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", metavar="FILE", help="Fill what is not given from this profile; 'auto': what `llama-moe tune` kept."),
]
MemoryOption = Annotated[bool, typer.Option("--memory", help="Show the memory used, by device and role.")]
LoraOption = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[=SCALE]", help="Load this LoRA adapter too, SCALE times. May be given several times."),
]
ContextSizeOption = Annotated[int, typer.Option("--ctx", min=0, metavar="N", help="Tokens of context; 0: what the model was trained for.")]


def _show_version(value: bool) -> None:
    if value:
        from llama_moe import __version__

        typer.echo(f"llama-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Run Mixture-of-Experts models that are larger than the GPU's memory."""


@app.command()
def run(
    model: ModelOrHubArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="PROMPT", help="What to continue, or to answer; '-' reads it from standard input.")
    ],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, in the format of the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message before it; implies --chat.")] = None,
    cpu_moe: CpuMoeOption = False,
    n_cpu_moe: NCpuMoeOption = None,
    experts_on: ExpertsOnOption = None,
    rpc: RpcOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Most tokens to generate.")] = 256,
    context_size: ContextSizeOption = 4096,
    temperature: TemperatureOption = 0.8,
    seed: SeedOption = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="The text ends before this. May be given several times.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option("--grammar", metavar="FILE", help="The text matches this GBNF grammar.")] = None,
    json_schema: Annotated[
        str | None, typer.Option("--json-schema", metavar="FILE_OR_JSON", help="The text is JSON of this JSON schema; '{}' is any.")
    ] = None,
    lookup: LookupOption = False,
    draft_model: DraftModelOption = None,
    threads: ThreadsOption = None,
    repack: RepackIfQuickerOption = None,
    profile: ProfileOption = None,
    lora: LoraOption = None,
    memory: MemoryOption = False,
) -> None:
    """Continue a prompt, or answer it, streaming the text.

    The text goes to standard output; reasoning, speed and memory to standard error. Without --cpu-moe, --n-cpu-moe or --experts-on, as
    many experts as fit go to the accelerators.
    """
    from .run import EngineChoice, choose_drafting, choose_lora, choose_placement, choose_sampling, run_prompt

    with exit_codes():
        choice = EngineChoice(
            model=model,
            experts=choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=experts_on or []),
            drafting=choose_drafting(lookup=lookup, draft_model=draft_model),
            rpc=rpc or [],
            context_size=context_size,
            threads=threads,
            repack=repack,
            profile=profile,
            lora=choose_lora(lora or []),
        )
        params = choose_sampling(
            max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop or [], grammar=grammar, json_schema=json_schema
        )
        run_prompt(choice, prompt, params=params, chat=chat or system is not None, system=system, memory=memory)


@app.command("chat")
def chat_command(
    model: ModelOrHubArgument,
    *,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    cpu_moe: CpuMoeOption = False,
    n_cpu_moe: NCpuMoeOption = None,
    experts_on: ExpertsOnOption = None,
    rpc: RpcOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Most tokens of an answer. Default: what there is room for."),
    ] = None,
    context_size: ContextSizeOption = 4096,
    temperature: TemperatureOption = 0.8,
    seed: SeedOption = None,
    thinking: Annotated[bool, typer.Option("--thinking/--no-thinking", help="Let a model that can think first do so.")] = True,
    lookup: LookupOption = False,
    draft_model: DraftModelOption = None,
    threads: ThreadsOption = None,
    repack: RepackIfQuickerOption = None,
    profile: ProfileOption = None,
    lora: LoraOption = None,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Keep what is typed, for the arrow keys of later chats.")] = True,
    memory: MemoryOption = False,
) -> None:
    """Chat with a model in the terminal.

    Ctrl-C stops an answer and not the program. /help shows what else can be done. When the context is full, the oldest messages leave it.
    From a pipe, each line is a message. Answers go to standard output, everything else to standard error.
    """
    from .chat import run_chat
    from .run import EngineChoice, choose_drafting, choose_lora, choose_placement, choose_sampling

    with exit_codes():
        choice = EngineChoice(
            model=model,
            experts=choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=experts_on or []),
            drafting=choose_drafting(lookup=lookup, draft_model=draft_model),
            rpc=rpc or [],
            context_size=context_size,
            threads=threads,
            repack=repack,
            profile=profile,
            lora=choose_lora(lora or []),
        )
        params = choose_sampling(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=[], grammar=None, json_schema=None)
        run_chat(choice, params=params, system=system, thinking=thinking, keep_history=history, memory=memory)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/REPOSITORY of the Hugging Face hub.")],
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A file of it; a pattern, such as '*Q4_K_M*'; or a format that one name has, such as Q4_K_M. Default: its only model.",
        ),
    ] = None,
    *,
    revision: Annotated[str | None, typer.Option("--revision", metavar="REV", help="A branch, tag or commit. Default: main.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Put it there. Default: the cache of the Hugging Face tools.")
    ] = None,
) -> None:
    """Fetch a model from the Hugging Face hub, and say where it is.

    All files of a split model are fetched. A download that was interrupted goes on where it ended. The token for what is not public is
    that of the Hugging Face tools ($HF_TOKEN, or 'hf auth login').
    """
    from .pull import pull_model

    with exit_codes():
        pull_model(repo, file, revision=revision, folder=folder)


@app.command()
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
    context_size: ContextSizeOption = 4096,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, metavar="N", help="Sequences held at once.")] = 1,
    kv_type: Annotated[str, typer.Option("--kv-type", metavar="TYPE", help="Number format of the KV cache, such as q8_0.")] = "f16",
    gpu_layers: Annotated[int | None, typer.Option("--gpu-layers", min=0, metavar="N", help="Layers on the GPU. Default: all.")] = None,
    rpc: RpcOption = None,
    lora: LoraOption = None,
    predict: Annotated[bool, typer.Option("--predict/--no-predict", help="Predict speeds; measures the machine the first time.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show what a model will take, and how quick it will be, before loading it.

    Three plans side by side: everything on the GPU, all experts in host memory, and as many experts on the GPU as fit. Nothing is loaded.
    """
    from .plan import show_plans
    from .run import choose_lora

    with exit_codes():
        show_plans(
            model,
            vram=vram or [],
            ram=ram,
            overhead=overhead,
            bandwidth=bandwidth,
            reserve=reserve,
            context_size=context_size,
            max_sequences=max_sequences,
            kv_type=kv_type,
            gpu_layers=gpu_layers,
            rpc=rpc or [],
            lora=choose_lora(lora or []),
            predict=predict,
            as_json=as_json,
        )


@app.command()
def bench(
    model: ModelArgument,
    *,
    placements: Annotated[
        str | None,
        typer.Option(
            "--placements",
            metavar="LIST",
            help="Where the experts go, separated by commas: gpu, cpu, fit, fit:8GiB, first:12 (layers in host memory), last:4. "
            "Default: gpu,cpu,fit; only gpu where that makes no difference.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=0, metavar="N", help="Length of the prompts; 0: none.")] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", "-n", min=0, metavar="N", help="Tokens to decode; 0: none.")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Of each test.")] = 3,
    context_size: Annotated[
        int | None,
        typer.Option(
            "--ctx",
            min=0,
            metavar="N",
            help="Tokens of context; 0: what the model was trained for. Default: 4096, or more if the tests need more.",
        ),
    ] = None,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch", min=1, metavar="N", help="Most prompt tokens computed at once.")] = 512,
    threads: ThreadsOption = None,
    threads_batch: BatchThreadsOption = None,
    host_memory: Annotated[
        str, typer.Option("--host-memory", metavar="MODE", help="How host memory holds weights: mmap, pageable, pinned or locked.")
    ] = "mmap",
    repack: RepackOption = True,
    rpc: RpcOption = None,
    lora: LoraOption = None,
    quality: Annotated[
        Path | None, typer.Option("--quality", metavar="FILE", help="Compare what is predicted along this text: perplexity, agreement, KL.")
    ] = None,
    quality_tokens: Annotated[
        int | None, typer.Option("--quality-tokens", min=3, metavar="N", help="How much of it to use. Default: 1024.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="OTHER", help="Measure this file too, such as another quantisation.")
    ] = None,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
) -> None:
    """Measure memory, speed and quality under several placements.

    The speeds compare with llama-bench's. A placement that fails is reported and the others go on; the exit status is then 1.
    """
    from .bench import run_bench
    from .run import choose_lora

    with exit_codes():
        run_bench(
            model,
            placements=placements,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            repetitions=repetitions,
            context_size=context_size,
            micro_batch_size=micro_batch_size,
            threads=threads,
            threads_batch=threads_batch,
            host_memory=host_memory,
            repack=repack,
            rpc=rpc or [],
            lora=choose_lora(lora or []),
            quality=quality,
            quality_tokens=quality_tokens,
            against=against,
            formats={"--json": as_json, "--markdown": as_markdown, "--csv": as_csv},
        )


@app.command()
def trace(
    model: ModelArgument,
    *,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Compute this text.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="PROMPT", help="Compute this prompt and continue it, always with the most likely token."),
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=1, metavar="N", help="Most tokens to continue it with. Default: 128.")
    ] = None,
    cpu_moe: CpuMoeOption = False,
    n_cpu_moe: NCpuMoeOption = None,
    rpc: RpcOption = None,
    lora: LoraOption = None,
    context_size: ContextSizeOption = 4096,
    threads: ThreadsOption = None,
    repack: RepackOption = True,
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
    as_json: JsonOption = False,
) -> None:
    """Show which experts the routers of a model choose for a text.

    For each layer: its most used experts with their share of the tokens, how many were never used, and how even it was: the entropy (1: all
    alike) and the coefficient of variation (0: all alike). Texts longer than the context are computed in pieces.
    """
    from .run import choose_lora, choose_placement
    from .trace import trace_model

    with exit_codes():
        trace_model(
            model,
            file=file,
            prompt=prompt,
            generate=generate,
            experts=choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=[]),
            rpc=rpc or [],
            lora=choose_lora(lora or []),
            context_size=context_size,
            threads=threads,
            repack=repack,
            cache_slots=cache_slots or [],
            heatmap=heatmap,
            save=save,
            as_json=as_json,
        )


@app.command()
def tune(
    model: ModelArgument,
    *,
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, metavar="M", help="Time for all of it.")] = 10.0,
    objective: Annotated[
        str, typer.Option("--objective", metavar="KIND", help="What to be quick at: decode (single tokens), prompt, or mixed.")
    ] = "decode",
    context_size: ContextSizeOption = 4096,
    max_sequences: Annotated[int, typer.Option("--max-sequences", min=1, metavar="N", help="Texts that are generated at once.")] = 1,
    rpc: RpcOption = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", metavar="SIZE", help="Most memory on each accelerator, such as 8GiB. Default: what is free."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", "-p", min=1, metavar="N", help="Length of the prompts; micro-batches are not larger.")
    ] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", "-n", min=1, metavar="N", help="Tokens to decode.")] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, metavar="N", help="Of both in each trial.")] = 3,
    restart: Annotated[bool, typer.Option("--restart", help="Drop the trials of an earlier sweep, which are otherwise kept.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the options with which a model is quickest here.

    They are kept for this model, machine, --ctx and --max-sequences; `llama-moe run --profile auto` and `load(..., profile="auto")` use
    them. A second sweep goes on where the first one ended.
    """
    from .tune import run_tune

    with exit_codes():
        run_tune(
            model,
            minutes=minutes,
            objective=objective,
            context_size=context_size,
            max_sequences=max_sequences,
            rpc=rpc or [],
            vram=vram,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            repetitions=repetitions,
            restart=restart,
            as_json=as_json,
        )


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="GGUF file; the first one of a split model.")],
    target_and_type: Annotated[
        list[str],
        typer.Argument(metavar="DST TYPE", help="File to write (not needed with --dry-run), and a type such as Q4_K_M, Q2_K, Q8_0 or F16."),
    ],
    *,
    experts: Annotated[str | None, typer.Option("--experts", metavar="T", help="Of the routed experts, such as Q2_K.")] = None,
    attention: Annotated[str | None, typer.Option("--attention", metavar="T", help="Of the attention, such as Q6_K.")] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="T", help="Of the output matrix.")] = None,
    embedding: Annotated[str | None, typer.Option("--embedding", metavar="T", help="Of the token embedding.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="REGEX=T",
            help="Of tensors whose name matches. May be given several times; the first that matches decides, before the options above.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Importance matrix: IQ1, IQ2, IQ3_XXS and Q2_K_S need it.")
    ] = None,
    requantize: Annotated[bool, typer.Option("--requantize", help="Also change what is quantised, losing precision twice.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: one for each core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done; reads no weights.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model in smaller number formats.

    TYPE is one of llama.cpp's mixes, which choose a format for every tensor; the options change it for a part of the model.
    """
    from .quantizing import quantize_model

    with exit_codes():
        quantize_model(
            source,
            target_and_type,
            experts=experts,
            attention=attention,
            output=output,
            embedding=embedding,
            overrides=override or [],
            imatrix=imatrix,
            requantize=requantize,
            threads=threads,
            dry_run=dry_run,
            as_json=as_json,
        )


@app.command("imatrix")
def imatrix_command(
    model: ModelArgument,
    *,
    file: Annotated[Path, typer.Option("--file", "-f", metavar="FILE", help="Compute this text.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="File to write.")] = Path("imatrix.gguf"),
    context_size: Annotated[int, typer.Option("--ctx", min=32, metavar="N", help="Tokens that are computed together.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, metavar="N", help="How many of them. Default: the whole text.")] = None,
    output: Annotated[bool, typer.Option("--process-output", help="Also for the output matrix.")] = False,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read names of special tokens in the text as these tokens.")
    ] = False,
    cpu_moe: CpuMoeOption = False,
    n_cpu_moe: NCpuMoeOption = None,
    rpc: RpcOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Compute the importance matrix of a model, for quantize --imatrix."""
    from .quantizing import compute_imatrix
    from .run import choose_placement

    with exit_codes():
        compute_imatrix(
            model,
            file,
            out,
            experts=choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=[]),
            rpc=rpc or [],
            context_size=context_size,
            chunks=chunks,
            output=output,
            parse_special=parse_special,
            threads=threads,
        )


@app.command("inspect")
def inspect_model(model: ModelOrUrlArgument, *, as_json: JsonOption = False) -> None:
    """Show a model's architecture, experts and formats."""
    from .show import show_model

    with exit_codes():
        show_model(model, as_json=as_json)


@app.command()
def devices(*, rpc: RpcOption = None, as_json: JsonOption = False) -> None:
    """List the devices that can hold a model."""
    from .show import show_devices

    with exit_codes():
        show_devices(rpc or [], as_json=as_json)


@app.command()
def doctor(*, as_json: JsonOption = False) -> None:
    """Show what was found of CPU features, devices, plug-ins and drivers, what is missing, and what to install.

    The exit status is 1 if a part of the installation is broken. A GPU that is not used is no fault.
    """
    from .doctor import show_diagnosis

    with exit_codes():
        show_diagnosis(as_json=as_json)


@app.command()
def serve(
    models: Annotated[
        list[Path] | None,
        typer.Option("--model", "-m", metavar="FILE", help="Serve this GGUF file. May be given several times."),
    ] = None,
    *,
    model_dirs: Annotated[
        list[Path] | None,
        typer.Option("--model-dirs", metavar="DIR", help="Serve the GGUF files in this folder. May be given several times."),
    ] = None,
    more_dirs: Annotated[list[Path] | None, typer.Argument(metavar="DIR", help="Further folders, after --model-dirs.")] = None,
    cpu_moe: CpuMoeOption = False,
    n_cpu_moe: NCpuMoeOption = None,
    experts_on: ExpertsOnOption = None,
    fit: Annotated[bool, typer.Option("--fit", help="As many experts as fit on the accelerators. That is the default.")] = False,
    bind: Annotated[str, typer.Option("--bind", metavar="HOST:PORT", help="Where to listen; port 0: any free one.")] = "127.0.0.1:11435",
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="LLAMA_MOE_API_KEY", help="Clients must send it. Needed where others can connect."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file with the key.")] = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, metavar="N", help="Requests computed at once; more wait.")] = 4,
    context_size: ContextSizeOption = 4096,
    context_pool: Annotated[
        int | None, typer.Option("--context-pool", min=1, metavar="N", help="Tokens of KV cache for all requests. Default: --ctx for each.")
    ] = None,
    ttl: Annotated[float | None, typer.Option("--ttl", min=0.0, metavar="S", help="Unload models that nobody used for S seconds.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", metavar="SIZE", help="Memory of all loaded models. Default: what is free.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of one answer.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option("--max-prompt-tokens", min=1, metavar="N", help="Of one prompt.")] = None,
    max_choices: Annotated[int, typer.Option("--max-choices", min=1, metavar="N", help="Answers that one request may ask for.")] = 16,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Of one request.")] = "16MiB",
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, metavar="N", help="Requests that may wait.")] = 1024,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.0, metavar="S", help="Of one request, its wait included.")] = None,
    grace: Annotated[float, typer.Option("--grace", min=0.0, metavar="S", help="What running requests have to end, when stopped.")] = 10.0,
    trace_routing: Annotated[
        bool, typer.Option("--trace-routing", help="Count which experts are chosen, for /metrics and /v1/routing; costs speed.")
    ] = False,
    threads: ThreadsOption = None,
    threads_batch: BatchThreadsOption = None,
    kv_type: Annotated[str, typer.Option("--kv-type", metavar="TYPE", help="Number format of the KV cache, such as q8_0.")] = "f16",
    repack: Annotated[
        bool | None, typer.Option("--repack/--no-repack", help="Let llama.cpp rearrange weights for the CPU. Default: it may.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option("--profile", metavar="FILE", help="Fill what is not given from this profile; 'auto': what `llama-moe tune` kept."),
    ] = None,
    rpc: RpcOption = None,
    lora: LoraOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what llama.cpp says, too.")] = False,
) -> None:
    """Serve models over HTTP, with the OpenAI API's shapes.

    It listens on this machine only, unless --bind says otherwise, and then needs a key. Models in folders are loaded when they are first
    asked for, and the least recently used is unloaded when another needs its memory. It runs until Ctrl-C or SIGTERM; requests that run
    then have the time of --grace to end.
    """
    from .console import check_one_of
    from .run import choose_lora, choose_placement
    from .serve import api_key_of, run_server

    with exit_codes():
        check_one_of(
            "each says where the experts go",
            {"--fit": fit, "--cpu-moe": cpu_moe, "--n-cpu-moe": n_cpu_moe is not None, "--experts-on": bool(experts_on)},
        )
        run_server(
            models=models or [],
            model_dirs=[*(model_dirs or []), *(more_dirs or [])],
            experts=choose_placement(cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe, experts_on=experts_on or []),
            bind=bind,
            api_key=api_key_of(api_key, api_key_file),
            parallel=parallel,
            context_size=context_size,
            context_pool=context_pool,
            ttl=ttl,
            memory_budget=memory_budget,
            max_tokens=max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            max_choices=max_choices,
            max_body_bytes=max_body,
            max_queue=max_queue,
            timeout=timeout,
            grace_seconds=grace,
            trace_routing=trace_routing,
            threads=threads,
            threads_batch=threads_batch,
            kv_type=kv_type,
            repack=repack,
            profile=profile,
            rpc=rpc or [],
            lora=choose_lora(lora or []),
            verbose=verbose,
        )


@app.command()
def worker(
    bind: Annotated[str, typer.Option("--bind", metavar="HOST:PORT", help="Where to listen.")] = "127.0.0.1:50052",
    *,
    threads: ThreadsOption = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Listen where other machines can connect. The protocol has no authentication.")
    ] = False,
    cache: Annotated[Path | None, typer.Option("--cache", metavar="DIR", help="Keep weights that clients sent in this folder.")] = None,
    until_stdin_closes: Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)] = False,
) -> None:
    """Serve this machine's devices to others.

    This is llama.cpp's RPC server; `llama-moe run --rpc HOST:PORT` uses it. It runs until it is killed.
    """
    from .worker import run_worker

    with exit_codes():
        run_worker(bind, threads=threads, allow_remote=allow_remote, cache=cache, until_stdin_closes=until_stdin_closes)


@app.command("demo-model")
def demo_model(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write.")],
    *,
    experts: Annotated[int, typer.Option("--experts", metavar="N", help="Experts in each layer.")] = 8,
    used: Annotated[int, typer.Option("--used", metavar="N", help="Experts that compute each token.")] = 2,
) -> None:
    """Write a small Mixture-of-Experts model.

    It is made from SmolLM2-135M, with copies of its feed-forward blocks as experts, and generates the same text.
    """
    from .demo import write_model

    with exit_codes():
        write_model(out, experts=experts, used=used)


@app.command()
def demo() -> None:
    """Try it: generate, and show the memory saved.

    The experts of the demo model go to host memory, the rest to this machine's GPU, or to a worker process that stands in for one.
    """
    from .demo import run_demo

    with exit_codes():
        run_demo()
