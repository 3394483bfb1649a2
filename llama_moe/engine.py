"""Text generation for one or many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, overload

from . import _core, _logging
from ._options import context_options
from .errors import InvalidOptionError
from .inspection import inspect
from .memory import MemoryReport
from .model import Model
from .sampling import SamplingParams
from .stream import TokenStream
from .tokens import as_prompts

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Literal, TypeVar

    from typing_extensions import Self

    from .aio import AsyncTokenStream
    from .model import DevicesLike, HostMemory, StrPath
    from .placement import PlacementLike
    from .results import Completion
    from .stream import GenerationReader
    from .tokens import Prompt

    StreamT = TypeVar("StreamT", bound=GenerationReader)


class Engine:
    """Generates for many requests over one context, on a thread of its own; usable from any thread.

    A prompt is text, to which the model's special tokens are added and in which they are recognised, or token ids, which are used as they
    are. Close it with `close()` or a `with` block.

    Args:
        model: an open model; it stays usable by others.
        context_size: tokens for each request, prompt and completion together; 0: what the model was trained for.
        max_sequences: requests that are computed at once; more wait.
        batch_size: most tokens in one call of llama.cpp.
        micro_batch_size: most tokens computed at once; more is quicker at prompts and takes more compute memory.
        threads: CPU threads for single tokens; None: one for each physical core this process may use.
        threads_batch: CPU threads for prompts; None: the same as `threads`.
        kv_type: number format of the KV cache: "f32", "f16", "bf16", "q8_0", "q4_0" and others of ggml's.
        flash_attention: "auto", "on" or "off".
        offload_kv: keep the KV cache of a layer on the accelerator that has the layer.

    Raises:
        InvalidOptionError: an option is outside its range.
        ClosedError: the model was closed.
        LlamaMoeError: memory ran out.
    """

    def __init__(
        self,
        model: Model,
        *,
        context_size: int = 4096,
        max_sequences: int = 1,
        batch_size: int = 2048,
        micro_batch_size: int = 512,
        threads: int | None = None,
        threads_batch: int | None = None,
        kv_type: str = "f16",
        flash_attention: Literal["auto", "on", "off"] = "auto",
        offload_kv: bool = True,
    ) -> None:
        _logging.sync_level()
        self._model = model
        self._owns_model = False
        self._native = _core.Engine(
            model._native,
            context_options(
                context_size=context_size,
                max_sequences=max_sequences,
                batch_size=batch_size,
                micro_batch_size=micro_batch_size,
                threads=threads,
                threads_batch=threads_batch,
                kv_type=kv_type,
                flash_attention=flash_attention,
                offload_kv=offload_kv,
            ),
        )

    @property
    def model(self) -> Model:
        """The model it generates with."""
        return self._model

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, timeout: float | None = None
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
    ) -> Completion | list[Completion]:
        """Generates for one prompt, or for several together.

        An exception that interrupts it, such as KeyboardInterrupt, or the failure of one of several, cancels all.

        Args:
            prompts: a prompt, or a sequence of prompts.
            params: how to sample: one for all, or one for each of several prompts; None: the defaults.
            timeout: seconds from now in which each must end, the wait for its turn included; None: no limit.

        Returns:
            A completion; a list of them, in order, for several prompts.

        Raises:
            ContextFullError: a prompt is longer than the context.
            DecodeError: the computation failed.
            RequestTimeoutError: `timeout` passed.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, a token id is outside the vocabulary, or `timeout` is not above
                0.
        """
        streams, single = self._start(prompts, params, timeout, self._start_stream)
        try:
            completions = [stream.read_all() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return completions[0] if single else completions

    @overload
    def stream(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> TokenStream: ...
    @overload
    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, timeout: float | None = None
    ) -> list[TokenStream]: ...
    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
    ) -> TokenStream | list[TokenStream]:
        """Starts to generate for one prompt, or for several, and returns at once.

        Args:
            prompts: a prompt, or a sequence of prompts.
            params: how to sample: one for all, or one for each of several prompts; None: the defaults.
            timeout: seconds from now in which each must end, the wait for its turn included, whether or not anybody reads; None: no limit.

        Returns:
            An iterator over the tokens; a list of them, in order, for several prompts.

        Raises:
            ContextFullError: a prompt is longer than the context.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, a token id is outside the vocabulary, or `timeout` is not above
                0.
        """
        streams, single = self._start(prompts, params, timeout, self._start_stream)
        return streams[0] if single else streams

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> Completion: ...
    @overload
    async def agenerate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, timeout: float | None = None
    ) -> list[Completion]: ...
    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
    ) -> Completion | list[Completion]:
        """What `generate()` does, for asyncio: other tasks run meanwhile, and no thread is needed.

        Cancelling the task that awaits it cancels all. Arguments, result and errors are those of `generate()`.
        """
        streams, single = self._start(prompts, params, timeout, self._start_async_stream)
        try:
            completions = [await stream.read_all() for stream in streams]
        except BaseException:
            for stream in streams:
                stream._close()
            raise
        return completions[0] if single else completions

    @overload
    def astream(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: SamplingParams | None = None, *, timeout: float | None = None
    ) -> AsyncTokenStream: ...
    @overload
    def astream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, *, timeout: float | None = None
    ) -> list[AsyncTokenStream]: ...
    def astream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncTokenStream | list[AsyncTokenStream]:
        """What `stream()` does, for asyncio: returns asynchronous iterators at once, without being awaited.

        Arguments and errors are those of `stream()`; besides, it is a RuntimeError when no event loop runs in this thread.
        """
        streams, single = self._start(prompts, params, timeout, self._start_async_stream)
        return streams[0] if single else streams

    def _start_stream(self, prompt: str | list[int], sampling: _core.SamplingOptions, timeout: float | None) -> TokenStream:
        return TokenStream(self._native.submit(prompt, sampling, timeout), self)

    def _start_async_stream(self, prompt: str | list[int], sampling: _core.SamplingOptions, timeout: float | None) -> AsyncTokenStream:
        from . import aio  # late: importing asyncio takes longer than importing this package

        return aio.start(self, prompt, sampling, timeout)

    def _start(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        timeout: float | None,
        start: Callable[[str | list[int], _core.SamplingOptions, float | None], StreamT],
    ) -> tuple[list[StreamT], bool]:
        """A stream for each prompt, and whether there was one prompt, not a sequence of them."""
        _logging.sync_level()
        each, single = as_prompts(prompts)
        options = [item._to_native() for item in _params_of_each(params, len(each), single=single)]
        seconds = _seconds(timeout)
        streams: list[StreamT] = []
        try:
            for prompt, sampling in zip(each, options, strict=True):
                streams.append(start(prompt, sampling, seconds))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams, single

    def memory(self) -> MemoryReport:
        """Bytes by device and role: the model's weights, the KV cache and the compute buffers."""
        return MemoryReport.of(self._native.memory())

    def stats(self) -> dict[str, int | float]:
        """Counts since the engine was made: requests, tokens, calls of llama.cpp, and seconds spent in them."""
        return self._native.stats()

    @property
    def context_size(self) -> int:
        """Tokens for each request."""
        return self._native.context_size

    @property
    def max_sequences(self) -> int:
        """Requests that are computed at once."""
        return self._native.max_sequences

    @property
    def batch_size(self) -> int:
        """Most tokens in one call of llama.cpp."""
        return self._native.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Most tokens computed at once."""
        return self._native.micro_batch_size

    @property
    def threads(self) -> int:
        """CPU threads for single tokens."""
        return self._native.threads

    @property
    def threads_batch(self) -> int:
        """CPU threads for prompts."""
        return self._native.threads_batch

    @property
    def closed(self) -> bool:
        """Whether it, or its model, was closed."""
        return self._native.closed

    def close(self) -> None:
        """Cancels what runs, frees the KV cache, and closes the model too if `load()` made both. Idempotent."""
        self._native.close()
        if self._owns_model:
            self._model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<Engine over {self._model.path!r}: {self.max_sequences} x {self.context_size} tokens{closed}>"


def _params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int, *, single: bool) -> Sequence[SamplingParams]:
    if params is None:
        return [SamplingParams()] * prompts
    if isinstance(params, SamplingParams):
        return [params] * prompts
    if single:
        raise TypeError(f"params of one prompt must be a SamplingParams, not {params!r}")
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"params must be a SamplingParams, or one for each prompt, not {item!r}")
    if len(params) != prompts:
        raise InvalidOptionError(f"params has {len(params)} entries for {prompts} prompts; give one for all, or one for each")
    return params


def _seconds(timeout: object) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"timeout cannot be {timeout!r} ({type(timeout).__name__}); it must be a number of seconds")
    return float(timeout)


def _trained_context(path: StrPath) -> int:
    info = inspect(path)
    length = info.metadata.get(f"{info.architecture}.context_length")
    return length if isinstance(length, int) else 0


def load(
    path: StrPath,
    *,
    experts: PlacementLike = "fit",
    context_size: int = 4096,
    max_sequences: int = 1,
    batch_size: int = 2048,
    micro_batch_size: int = 512,
    threads: int | None = None,
    threads_batch: int | None = None,
    kv_type: str = "f16",
    flash_attention: Literal["auto", "on", "off"] = "auto",
    offload_kv: bool = True,
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
    context_options(
        context_size=context_size,
        max_sequences=max_sequences,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        threads=threads,
        threads_batch=threads_batch,
        kv_type=kv_type,
        flash_attention=flash_attention,
        offload_kv=offload_kv,
    ).validate()
    model = Model(
        path,
        experts=experts,
        devices=devices,
        gpu_layers=gpu_layers,
        host_memory=host_memory,
        repack=repack,
        check_tensors=check_tensors,
        fit_context_tokens=(context_size or _trained_context(path)) * max_sequences,
        on_progress=on_progress,
    )
    try:
        engine = Engine(
            model,
            context_size=context_size,
            max_sequences=max_sequences,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            threads=threads,
            threads_batch=threads_batch,
            kv_type=kv_type,
            flash_attention=flash_attention,
            offload_kv=offload_kv,
        )
    except BaseException:
        model.close()
        raise
    engine._owns_model = True
    return engine
