"""A model and its engine in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core
from ._options import fill_context
from .engine import Engine
from .inspection import inspect
from .model import Model
from .speculative import speculation_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from .model import DevicesLike, HostMemory, StrPath
    from .placement import PlacementLike
    from .speculative import Speculative


def load(
    path: StrPath,
    *,
    experts: PlacementLike = "fit",
    context_size: int = 4096,
    context_pool: int | None = None,
    max_sequences: int = 1,
    max_queue: int = 1024,
    batch_size: int = 2048,
    micro_batch_size: int = 512,
    threads: int | None = None,
    threads_batch: int | None = None,
    kv_type: str = "f16",
    flash_attention: Literal["auto", "on", "off"] = "auto",
    offload_kv: bool = True,
    speculative: Speculative | None = None,
    devices: DevicesLike | None = None,
    gpu_layers: int | Literal["all"] = "all",
    host_memory: HostMemory = "mmap",
    repack: bool = True,
    check_tensors: bool = False,
    on_progress: Callable[[float], object] | None = None,
) -> Engine:
    """Loads a model and returns an engine over it; closing the engine closes the model.

    The arguments are those of `Model` and `Engine`, and so are the errors. `experts="fit"` leaves room for the whole KV cache.

    Example:
        with llama_moe.load("model.gguf", experts="cpu") as llm:
            print(llm.generate("Hello", SamplingParams(max_tokens=16)))
    """
    # What is wrong with the engine's options is said before the load, which may take minutes.
    fill_context(
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
    ).validate()
    model = Model(
        path,
        experts=experts,
        devices=devices,
        gpu_layers=gpu_layers,
        host_memory=host_memory,
        repack=repack,
        check_tensors=check_tensors,
        fit_context_tokens=context_pool or (context_size or _trained_context(path)) * max_sequences,
        on_progress=on_progress,
    )
    try:
        engine = Engine(
            model,
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
            speculative=speculative,
        )
    except BaseException:
        model.close()
        raise
    engine._owns_model = True
    return engine


def _trained_context(path: StrPath) -> int:
    info = inspect(path)
    length = info.metadata.get(f"{info.architecture}.context_length")
    return length if isinstance(length, int) else 0
