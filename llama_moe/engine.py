"""Text generation for one or many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

from . import _core, _logging
from ._files import write_whole
from ._options import fill_context
from .conversation import ChatMethods
from .errors import InvalidOptionError
from .inspection import inspect
from .memory import MemoryReport
from .model import Model
from .sampling import SamplingParams
from .scoring import Score, perplexity
from .speculative import Speculative, speculation_options
from .stream import TokenStream, seconds
from .tokens import as_prompts, token_ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Literal

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from .aio import AsyncTokenStream
    from .model import DevicesLike, HostMemory, StrPath
    from .placement import PlacementLike
    from .results import Completion
    from .scoring import Pooling
    from .tokens import Prompt


class Engine(ChatMethods):
    """Generates for many requests over one context, on a thread of its own; usable from any thread.

    A prompt is text, to which the model's special tokens are added and in which they are recognised, or token ids, which are used as they
    are. Close it with `close()` or a `with` block.

    Args:
        model: an open model; it stays usable by others.
        context_size: tokens for each request, prompt and completion together; 0: what the model was trained for.
        context_pool: tokens of KV cache that all requests share; None: `context_size` for each of `max_sequences`. When a pool is full, the
            newest request goes back to the queue and is continued later.
        max_sequences: requests that are computed at once; more wait.
        max_queue: requests that may wait; more are refused with `QueueFullError`.
        batch_size: most tokens in one call of llama.cpp.
        micro_batch_size: most tokens computed at once; more is quicker at prompts and takes more compute memory.
        threads: CPU threads for single tokens; None: one for each physical core this process may use.
        threads_batch: CPU threads for prompts; None: the same as `threads`.
        kv_type: number format of the KV cache: "f32", "f16", "bf16", "q8_0", "q4_0" and others of ggml's.
        flash_attention: "auto", "on" or "off".
        offload_kv: keep the KV cache of a layer on the accelerator that has the layer.
        speculative: draft tokens and verify them together; None: off.

    Raises:
        InvalidOptionError: an option is outside its range, or the draft model has another vocabulary.
        ClosedError: the model was closed.
        LlamaMoeError: memory ran out.
    """

    def __init__(
        self,
        model: Model,
        *,
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
    ) -> None:
        _logging.sync_level()
        self._model = model
        self._owns_model = False
        self._native = _core.Engine(
            model._native,
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
            ),
            *([] if speculative is None or speculative.draft_model is None else [speculative.draft_model._native]),
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
            QueueFullError: too many requests wait already. Of several prompts, those after the first wait for room.
            RequestTimeoutError: `timeout` passed.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, a token id is outside the vocabulary, or `timeout` is not above
                0.
        """
        streams, single = self._start(prompts, params, timeout)
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
            QueueFullError: too many requests wait already. Of several prompts, those after the first wait for room.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, a token id is outside the vocabulary, or `timeout` is not above
                0.
        """
        streams, single = self._start(prompts, params, timeout)
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
        from . import aio  # late: importing asyncio takes longer than importing this package

        requests, single = self._requests(prompts, params)
        completions = await aio.generate(self, requests, seconds(timeout))
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

        Arguments and errors are those of `stream()`; besides, it is a RuntimeError when no event loop runs in this thread, and a
        QueueFullError when the queue has no room for one of several prompts: an event loop must not wait.
        """
        from . import aio

        requests, single = self._requests(prompts, params)
        streams = aio.start(self, requests, seconds(timeout))
        return streams[0] if single else streams

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[tuple[str | list[int], _core.SamplingOptions]], bool]:
        """Each prompt with its options, and whether there was one prompt, not a sequence of them."""
        _logging.sync_level()
        each, single = as_prompts(prompts)
        options = [item._to_native() for item in _params_of_each(params, len(each), single=single)]
        return list(zip(each, options, strict=True)), single

    def _start(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, timeout: float | None
    ) -> tuple[list[TokenStream], bool]:
        """A stream for each prompt, and whether there was one prompt, not a sequence of them."""
        requests, single = self._requests(prompts, params)
        limit = seconds(timeout)
        streams: list[TokenStream] = []
        try:
            for prompt, sampling in requests:
                # Of several, a full queue is an error to the first; later ones wait for the room that earlier ones make.
                generation = self._native.submit(prompt, sampling, limit, wait_for_room=bool(streams))
                streams.append(TokenStream(generation, self))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams, single

    @overload
    def embed(self, prompts: Prompt, *, pooling: Pooling = "mean", normalize: bool = True) -> npt.NDArray[np.float32]: ...
    @overload
    def embed(
        self, prompts: Sequence[Prompt], *, pooling: Pooling = "mean", normalize: bool = True, timeout: float | None = None
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]: ...
    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean", normalize: bool = True, timeout: float | None = None
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """The embeddings of one text, or of several together: the model's last hidden states after its final norm.

        Args:
            prompts: a prompt, or a sequence of prompts.
            pooling: what becomes of the states of a prompt's tokens: "mean" of all, the "last", the first ("cls"), or "none": all of them.
            normalize: scale each vector to length 1.
            timeout: as for `generate()`.

        Returns:
            float32 of shape [embedding_length]; [prompts, embedding_length] for several prompts. Without pooling [tokens,
            embedding_length], and a list of those for several prompts.

        Raises:
            The same as `generate()`.
        """
        rows, single = self._values(prompts, timeout, partial(self._native.submit_embed, pooling=pooling, normalise=normalize))
        width = self._native.embedding_size
        if pooling == "none":
            each = [row.reshape(-1, width) for row in rows]
            return each[0] if single else each
        import numpy as np  # late: most of what imports this package needs none of it

        return rows[0] if single else np.stack(rows) if rows else np.empty((0, width), np.float32)

    @overload
    def score(self, prompts: Prompt, *, timeout: float | None = None) -> Score: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, prompts: Sequence[Prompt], *, timeout: float | None = None) -> list[Score]: ...
    def score(self, prompts: Prompt | Sequence[Prompt], *, timeout: float | None = None) -> Score | list[Score]:
        """How likely the model finds a text, or each of several: the log-probability of every token given those before it.

        Args:
            prompts: a prompt, or a sequence of prompts, each of two tokens or more and at most `context_size`.
            timeout: as for `generate()`.

        Raises:
            InvalidOptionError: a prompt has one token only.
            The same as `generate()`.
        """
        each, single = as_prompts(prompts)
        tokens = [self._tokens_of(prompt) for prompt in each]
        rows, _ = self._values(tokens, timeout, self._native.submit_score)
        scores = [Score(tuple(prompt), row) for prompt, row in zip(tokens, rows, strict=True)]
        return scores[0] if single else scores

    def perplexity(self, text: Prompt, *, stride: int | None = None) -> float:
        """The perplexity of a text of any length: e to the power of its tokens' mean negative log-probability.

        A text longer than the context is cut into windows of `context_size` tokens that begin `stride` tokens after each other, and of each
        window only the tokens that no earlier one had are counted, so that all but the first have some context.

        Args:
            text: a prompt of two tokens or more.
            stride: tokens, from 1 to `context_size` - 1; None: half of `context_size`.

        Raises:
            InvalidOptionError: the text has one token only, or `stride` is out of range.
            The same as `score()`.
        """
        return perplexity(self.score, self._tokens_of(text), window=self.context_size, stride=stride)

    def save_prefix(self, prompt: Prompt, path: StrPath) -> int:
        """Computes a prompt and writes its KV cache to a file, for `load_prefix()`, also in another process.

        The file is complete or not there at all. Returns the prompt's length in tokens.

        Raises:
            OSError: the file cannot be written.
            The same as `generate()`.
        """
        tokens = self._tokens_of(prompt)
        write_whole(path, self._native.save_prefix(tokens))
        return len(tokens)

    def load_prefix(self, path: StrPath) -> int:
        """Reads what `save_prefix()` wrote and keeps it in host memory: prompts that begin like it are computed from where it ends.

        Returns its length in tokens.

        Raises:
            InvalidOptionError: it is of another model, `max_sequences` or `kv_type`, or damaged.
            OSError: the file cannot be read.
        """
        return self._native.load_prefix(Path(path).read_bytes())

    def clear_prefixes(self) -> None:
        """Forgets what `load_prefix()` loaded."""
        self._native.clear_prefixes()

    def _tokens_of(self, prompt: Prompt) -> list[int]:
        return self._model.tokenize(prompt, parse_special=True) if isinstance(prompt, str) else token_ids(prompt)

    def _values(
        self, prompts: Prompt | Sequence[Prompt], timeout: float | None, submit: Callable[..., _core.Generation]
    ) -> tuple[list[npt.NDArray[np.float32]], bool]:
        """What each prompt's request computed, and whether there was one prompt, not a sequence of them."""
        _logging.sync_level()
        each, single = as_prompts(prompts)
        limit = seconds(timeout)
        requests: list[_core.Generation] = []
        try:
            for prompt in each:
                requests.append(submit(self._tokens_of(prompt), timeout=limit, wait_for_room=bool(requests)))
            return [request.take_values() for request in requests], single
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def memory(self) -> MemoryReport:
        """Bytes by device and role: the model's weights, the KV cache and the compute buffers."""
        return MemoryReport.of(self._native.memory())

    def stats(self) -> dict[str, int | float]:
        """Counts since the engine was made: requests, tokens, calls of llama.cpp, and seconds spent in them.

        `prompt_tokens` were computed, `cached_tokens` were not: an earlier request or a saved prefix had them. With speculative decoding,
        `draft_acceptance_rate` is the share of drafted tokens that the model accepted, 0 to 1.
        """
        stats: dict[str, int | float] = self._native.stats()
        stats["draft_acceptance_rate"] = stats["draft_tokens_accepted"] / max(stats["draft_tokens"], 1)
        return stats

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


def _trained_context(path: StrPath) -> int:
    info = inspect(path)
    length = info.metadata.get(f"{info.architecture}.context_length")
    return length if isinstance(length, int) else 0


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
