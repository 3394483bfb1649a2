"""A loaded model: weights, vocabulary, metadata, and where each tensor is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import _core, _logging
from ._options import fill, fill_context
from ._sizes import format_size
from .chat import ChatTemplate
from .devices import Device, device_name
from .errors import InvalidOptionError
from .lora import LoraAdapter, as_adapters
from .memory import MemoryReport
from .placement import Placement, as_placement
from .tokens import token_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Literal, TypeAlias

    from typing_extensions import Self

    from .hub_transfer import DownloadProgress
    from .inspection import Metadata
    from .lora import LoraLike
    from .placement import PlacementLike
    from .tokens import TokenIds

    StrPath: TypeAlias = str | os.PathLike[str]
    DevicesLike: TypeAlias = Sequence[Device | str] | Device | str
    HostMemory: TypeAlias = Literal["mmap", "pageable", "pinned", "locked"]
    ExpertKernels: TypeAlias = Literal["auto", "llama_moe", "ggml"]


class Model:
    """A model's weights on their devices; immutable once loaded, and usable from any thread.

    Loading runs without the GIL. Ctrl-C, and an exception from `on_progress`, stop it. Close it with `close()` or a `with` block: its
    engines and contexts are closed with it. What a header says (`architecture`, `metadata`, sizes and counts) and `placement` can still be
    read then; the rest raises `ClosedError`.

    Args:
        path: a GGUF file; the first one of a split model.
        experts: where the experts go: an `ExpertPlacement`, or "gpu", "cpu" or "fit" for the policy of that name with its defaults.
        devices: accelerators to use, as `Device` objects or names; None: all there are; []: the CPU alone.
        gpu_layers: how many layers go to the accelerators, from the last one down, the output counting as one; "all" for all.
        host_memory: how host memory holds weights. "mmap": mapped from the file, read as needed; "pageable": read into plain memory;
            "pinned": into memory that a GPU can read directly; "locked": mapped, and kept from being swapped out.
        repack: let llama.cpp rearrange weights on the CPU for its vector kernels. Quicker at single tokens, and slower at long prompts for
            the experts of many models; it costs a copy in memory.
        expert_kernels: what computes with quantised weights in host memory. "ggml": ggml's CPU backend; "llama_moe": this package's own
            kernels, for which weights are packed as they are read; "auto": its own where they are made for the processor, `repack` allows
            it, the packed copy fits into memory, and no GPU is there to compute long prompts with those weights. The log says which, and
            why.
        check_tensors: look for invalid values while loading; slow.
        lora: LoRA adapters to load beside the weights, each on its weight's device: `LoraAdapter` objects or paths. They hold for all that
            is computed with the model.
        fit_context_tokens: tokens of context that "fit" leaves room for, as one sequence of an engine with default options. (`load` knows
            its engine and leaves room for that.)
        on_progress: called on this thread with the share loaded, 0 to 1.

    Raises:
        FileNotFoundError: no such file.
        ModelLoadError: the file is not GGUF, truncated, corrupted, or of an unsupported architecture, or memory ran out; or an adapter is
            none, or is one for another model.
        PlacementError: the placement matches no tensor, the model has no experts, or a layer or device does not exist.
        DoesNotFitError: "fit" found no way to place it.
        InvalidOptionError: an option is outside its range.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        experts: PlacementLike = "fit",
        devices: DevicesLike | None = None,
        gpu_layers: int | Literal["all"] = "all",
        host_memory: HostMemory = "mmap",
        repack: bool = True,
        expert_kernels: ExpertKernels = "auto",
        check_tensors: bool = False,
        lora: LoraLike = (),
        fit_context_tokens: int = 512,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        options = model_options(
            devices=devices,
            gpu_layers=gpu_layers,
            host_memory=host_memory,
            repack=repack,
            expert_kernels=expert_kernels,
            check_tensors=check_tensors,
            lora=lora,
            fit_for=fill_context(_core.EngineOptions(), context_size=fit_context_tokens),
        )
        self._load(path, experts, options, on_progress)

    @classmethod
    def from_hub(
        cls,
        repo: str,
        file: str | None = None,
        *,
        revision: str | None = None,
        on_download: DownloadProgress | None = None,
        experts: PlacementLike = "fit",
        devices: DevicesLike | None = None,
        gpu_layers: int | Literal["all"] = "all",
        host_memory: HostMemory = "mmap",
        repack: bool = True,
        expert_kernels: ExpertKernels = "auto",
        check_tensors: bool = False,
        lora: LoraLike = (),
        fit_context_tokens: int = 512,
        on_progress: Callable[[float], object] | None = None,
    ) -> Self:
        """Fetches a model from the Hugging Face hub, unless the cache has it, and loads it.

        The first arguments, and their errors, are those of `pull`; `on_download` is its `on_progress`. The others are those of `Model`.

        Example:
            model = Model.from_hub("OWNER/REPOSITORY", "Q4_K_M", experts="cpu")
        """
        from .hub import pull

        return cls(
            pull(repo, file, revision=revision, on_progress=on_download),
            experts=experts,
            devices=devices,
            gpu_layers=gpu_layers,
            host_memory=host_memory,
            repack=repack,
            expert_kernels=expert_kernels,
            check_tensors=check_tensors,
            lora=lora,
            fit_context_tokens=fit_context_tokens,
            on_progress=on_progress,
        )

    @classmethod
    def _load_for(
        cls, path: StrPath, experts: PlacementLike, options: _core.ModelOptions, on_progress: Callable[[float], object] | None
    ) -> Self:
        """A model loaded for the engine that the options name."""
        model = cls.__new__(cls)
        model._load(path, experts, options, on_progress)
        return model

    def _load(
        self, path: StrPath, experts: PlacementLike, options: _core.ModelOptions, on_progress: Callable[[float], object] | None
    ) -> None:
        _logging.sync_level()
        policy = as_placement(experts)._to_native()
        self._native = _core.Model.load(os.fspath(path), options, policy, on_progress)
        self._lora = tuple(LoraAdapter(adapter.path, adapter.scale) for adapter in options.lora)
        self._placement: Placement | None = None
        self._chat_formats: dict[str | None, ChatTemplate] = {}

    @property
    def path(self) -> str:
        """The file it was loaded from."""
        return self._native.path

    @property
    def lora(self) -> tuple[LoraAdapter, ...]:
        """The LoRA adapters that it was loaded with."""
        return self._lora

    @property
    def placement(self) -> Placement:
        """The device, role and bytes of every tensor, as decided before the load."""
        if self._placement is None:
            self._placement = Placement._from_native(self._native.placement)
        return self._placement

    @property
    def metadata(self) -> Metadata:
        """The file's metadata by key, without the vocabulary."""
        return self._native.metadata

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "qwen3moe"."""
        return self._native.architecture

    @property
    def description(self) -> str:
        """llama.cpp's short description: architecture, size class and quantisation."""
        return self._native.description

    @property
    def layer_count(self) -> int:
        """Transformer blocks."""
        return self._native.layer_count

    @property
    def expert_count(self) -> int:
        """Routed experts in each MoE layer; 0 for a dense model."""
        return self._native.expert_count

    @property
    def experts_used(self) -> int:
        """Routed experts that compute each token; 0 for a dense model."""
        return self._native.experts_used

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return self._native.size_bytes

    @property
    def parameter_count(self) -> int:
        """Numbers in all tensors."""
        return self._native.parameter_count

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self._native.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens of context it was trained for."""
        return self._native.context_length

    @property
    def embedding_length(self) -> int:
        """Width of its hidden state."""
        return self._native.embedding_length

    @property
    def bos_token(self) -> int | None:
        """The token that begins a text, if there is one."""
        return _token_or_none(self._native.bos_token)

    @property
    def eos_token(self) -> int | None:
        """The token that ends a text, if there is one; see `is_end_of_generation()` for all that do."""
        return _token_or_none(self._native.eos_token)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of its chat format, if the file has one."""
        return self._native.chat_template

    @property
    def expert_kernels(self) -> Literal["llama_moe", "ggml"]:
        """What computes with its quantised weights in host memory."""
        return "llama_moe" if self._native.expert_kernels == "llama_moe" else "ggml"

    def chat_format(self, template: str | None = None) -> ChatTemplate:
        """What turns conversations into prompts and answers into messages; `Engine.chat` uses it.

        Args:
            template: the text of a Jinja template to use in place of the model's own.

        Raises:
            InvalidOptionError: the model has no template, or the text is not a template.
        """
        _logging.sync_level()
        chat = self._chat_formats.get(template)
        if chat is None:
            chat = ChatTemplate(self, template)
            if len(self._chat_formats) >= 8:  # templates made up for each call are not worth keeping
                self._chat_formats.clear()
            self._chat_formats[template] = chat
        return chat

    def memory(self) -> MemoryReport:
        """Bytes of its weights, and its LoRA adapters, by device and role."""
        return MemoryReport.of(self._native.memory())

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The token ids of `text`.

        Args:
            text: any text.
            add_special: add the tokens the model expects around a text, such as the beginning-of-text token.
            parse_special: read text such as "<|im_start|>" as the control token it names.
        """
        return self._native.tokenize(text, add_special, parse_special)

    def detokenize(self, ids: TokenIds, *, special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, as a sequence or a 1-D numpy array.
            special: write control tokens as their names, which are otherwise left out.
        """
        return self._native.detokenize(token_ids(ids), special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; they need not be whole UTF-8 characters."""
        return self._native.token_bytes(token)

    def is_end_of_generation(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return self._native.is_end_of_generation(token)

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._native.closed

    def close(self) -> None:
        """Closes its engines and contexts, which cancels what they run, and frees the weights. Idempotent."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        experts = f", {self.expert_count} experts ({self.experts_used} used)" if self.expert_count else ""
        closed = ", closed" if self.closed else ""
        return f"<Model {self.path!r}: {self.architecture}, {self.layer_count} layers{experts}, {format_size(self.size_bytes)}{closed}>"


def model_options(
    *,
    devices: DevicesLike | None,
    gpu_layers: int | Literal["all"] = "all",
    host_memory: HostMemory = "mmap",
    repack: bool = True,
    expert_kernels: ExpertKernels = "auto",
    check_tensors: bool = False,
    lora: LoraLike = (),
    fit_for: _core.EngineOptions | None = None,
) -> _core.ModelOptions:
    """The native options of a load."""
    if isinstance(gpu_layers, str) and gpu_layers != "all":
        raise InvalidOptionError(f"gpu_layers: {gpu_layers!r} is unknown; expected a number of layers, or 'all'")
    names = None
    if devices is not None:
        names = [device_name(device) for device in ([devices] if isinstance(devices, Device | str) else devices)]
    return fill(
        _core.ModelOptions(),
        {
            "devices": names,
            "gpu_layers": -1 if gpu_layers == "all" else gpu_layers,
            "host_memory": host_memory,
            "repack": repack,
            "expert_kernels": expert_kernels,
            "check_tensors": check_tensors,
            "lora": [adapter._to_native() for adapter in as_adapters(lora)],
            "fit_for": fit_for or _core.EngineOptions(),
        },
    )


def file_of_this_machine(path: StrPath) -> StrPath:
    """`path`, or where what it names on the hub was put."""
    if not isinstance(path, str) or Path(path).exists():
        return path
    from .hub import local_model  # late: HTTP takes longer to import than this package

    return local_model(path)


def resolve_placement(path: StrPath, *, experts: PlacementLike, devices: DevicesLike | None = None) -> Placement:
    """Where each tensor would go, read from the file's header; nothing is loaded."""
    options = model_options(devices=devices)
    return Placement._from_native(_core.resolve_placement(os.fspath(path), options, as_placement(experts)._to_native()))


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None
