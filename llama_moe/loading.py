"""A model and its engine in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core
from ._options import Default, fill_context
from ._tunable import Tunable, with_profile
from .engine import Engine
from .model import Model, file_of_this_machine, model_options
from .speculative import speculation_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from ._tunable import ProfileLike
    from .lora import LoraLike
    from .model import DevicesLike, ExpertKernels, HostMemory, StrPath
    from .placement import PlacementLike
    from .speculative import Speculative


def load(
    path: StrPath,
    *,
    experts: PlacementLike | Default[PlacementLike] = Default("fit"),
    context_size: int = 4096,
    context_pool: int | None = None,
    max_sequences: int = 1,
    max_queue: int = 1024,
    batch_size: int = 2048,
    micro_batch_size: int | Default[int] = Default(512),
    threads: int | Default[int | None] | None = Default(None),
    threads_batch: int | Default[int | None] | None = Default(None),
    kv_type: str = "f16",
    flash_attention: Literal["auto", "on", "off"] = "auto",
    offload_kv: bool = True,
    speculative: Speculative | None = None,
    devices: DevicesLike | None = None,
    gpu_layers: int | Literal["all"] = "all",
    host_memory: HostMemory | Default[HostMemory] = Default("mmap"),
    repack: bool | Default[bool] = Default(True),
    expert_kernels: ExpertKernels | Default[ExpertKernels] = Default("auto"),
    check_tensors: bool = False,
    lora: LoraLike = (),
    profile: ProfileLike = None,
    on_progress: Callable[[float], object] | None = None,
) -> Engine:
    """Loads a model and returns an engine over it; closing the engine closes the model.

    The arguments are those of `Model` and `Engine`, and so are the errors. `experts="fit"` leaves room for all that
    the engine takes. A `path` that is no file of this machine may be a file of the Hugging Face hub, as "owner/repository/file.gguf": it is
    fetched as `pull()` does, unless the cache has it.

    With `profile="auto"`, those of `experts`, `micro_batch_size`, `threads`, `threads_batch`, `repack`, `expert_kernels` and `host_memory`
    that are not given are what `tune()` found best for this model, machine, `lora`, `context_size` and `max_sequences`. The log says what
    was used, or that there is no such profile and the defaults are. It can also be the path of a profile, which must be of this model, and
    "none", the same as None.

    Example:
        with llama_moe.load("model.gguf", experts="cpu") as llm:
            print(llm.generate("Hello", SamplingParams(max_tokens=16)))
    """
    path = file_of_this_machine(path)
    experts, micro_batch_size, threads, threads_batch, repack, expert_kernels, host_memory = with_profile(
        profile,
        path,
        Tunable(experts, micro_batch_size, threads, threads_batch, repack, expert_kernels, host_memory),
        devices=devices,
        context_size=context_size,
        max_sequences=max_sequences,
        lora=lora,
    )
    engine_options = fill_context(
        _core.EngineOptions(),
        context_size=context_size,
        context_pool=context_pool,
        max_sequences=max_sequences,
        max_queue=max_queue,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        threads=threads,
        threads_batch=threads_batch,
        kv_type=kv_type,
        flash_attention=flash_attention,
        offload_kv=offload_kv,
        **speculation_options(speculative),
    )
    engine_options.validate()  # what is wrong with them is said before the load, which may take minutes
    options = model_options(
        devices=devices,
        gpu_layers=gpu_layers,
        host_memory=host_memory,
        repack=repack,
        expert_kernels=expert_kernels,
        check_tensors=check_tensors,
        lora=lora,
        fit_for=engine_options,
    )
    return Engine._owning(Model._load_for(path, experts, options, on_progress), engine_options, speculative)
