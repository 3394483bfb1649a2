"""The options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="GGUF file; the first one of a split model.")]
ModelOrHub = Annotated[
    Path, typer.Argument(metavar="MODEL", help="GGUF file; or OWNER/REPOSITORY/FILE of Hugging Face, which is fetched if need be.")
]
Rpc = Annotated[
    list[str] | None, typer.Option("--rpc", metavar="HOST:PORT", help="Use this worker's devices too. May be given several times.")
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads. Default: one for each physical core.")]
BatchThreads = Annotated[
    int | None, typer.Option("--threads-batch", min=1, metavar="N", help="CPU threads for prompts. Default: those for single tokens.")
]
Repack = Annotated[bool, typer.Option("--repack/--no-repack", help="Let llama.cpp rearrange weights for the CPU.")]
# Where a profile may say it: None if it is not given.
TunableRepack = Annotated[
    bool | None, typer.Option("--repack/--no-repack", help="Let llama.cpp rearrange weights for the CPU. Default: it may.")
]
ExpertKernels = Annotated[
    str, typer.Option("--expert-kernels", metavar="KIND", help="What computes with weights in host memory: auto, llama_moe or ggml.")
]
TunableExpertKernels = Annotated[
    str | None,
    typer.Option("--expert-kernels", metavar="KIND", help="What computes with weights in host memory: auto (default), llama_moe or ggml."),
]
Profile = Annotated[
    str | None,
    typer.Option("--profile", metavar="FILE", help="Fill what is not given from this profile; 'auto': what `llama-moe tune` kept."),
]
CpuMoe = Annotated[bool, typer.Option("--cpu-moe", help="All experts in host memory.")]
NCpuMoe = Annotated[int | None, typer.Option("--n-cpu-moe", min=0, metavar="N", help="The experts of the first N layers in host memory.")]
ExpertsOn = Annotated[
    list[str] | None,
    typer.Option(
        "--experts-on",
        metavar="REGEX=DEVICE",
        help="Tensors whose name matches go to this device. May be given several times; the first that matches decides.",
    ),
]
ContextSize = Annotated[int, typer.Option("--ctx", min=0, metavar="N", help="Tokens of context; 0: what the model was trained for.")]
KvType = Annotated[str, typer.Option("--kv-type", metavar="TYPE", help="Number format of the KV cache, such as q8_0.")]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[=SCALE]", help="Load this LoRA adapter too, SCALE times. May be given several times."),
]
Temperature = Annotated[float, typer.Option("--temp", min=0.0, metavar="T", help="0: always the most likely token.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, metavar="S", help="Of the random choices. Default: a new one.")]
Lookup = Annotated[bool, typer.Option("--lookup", help="Draft tokens by looking up what followed the last ones before.")]
DraftModel = Annotated[
    Path | None, typer.Option("--draft-model", metavar="FILE", help="Draft tokens with this smaller model of the same vocabulary.")
]
Memory = Annotated[bool, typer.Option("--memory", help="Show the memory used, by device and role.")]
