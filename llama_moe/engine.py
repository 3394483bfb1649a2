"""Text generation for one or many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from . import _core, _logging
from ._files import written_whole
from ._options import fill_context, native_model
from .conversation import ChatMethods
from .errors import InvalidOptionError
from .memory import MemoryReport
from .sampling import SamplingParams
from .scoring import ScoringMethods
from .speculative import speculation_options
from .stream import Deadline, TokenStream
from .tokens import as_prompts
from .tracing import TracingMethods

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal

    from typing_extensions import Self

    from .aio import AsyncTokenStream
    from .model import Model, StrPath
    from .results import Completion
    from .speculative import Speculative
    from .tokens import Prompt


class Engine(ChatMethods, ScoringMethods, TracingMethods):
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
        options = fill_context(
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
        self._start_native(model, options, speculative)

    @classmethod
    def _owning(cls, model: Model, options: _core.EngineOptions, speculative: Speculative | None) -> Self:
        """An engine that closes its model; one that cannot be made closes it, too."""
        engine = cls.__new__(cls)
        try:
            engine._start_native(model, options, speculative)
        except BaseException:
            model.close()
            raise
        engine._owns_model = True
        return engine

    def _start_native(self, model: Model, options: _core.EngineOptions, speculative: Speculative | None) -> None:
        _logging.sync_level()
        self._model = model
        self._owns_model = False
        draft = None if speculative is None else speculative.draft_model
        self._native = _core.Engine(native_model("model", model), options, *([] if draft is None else [draft._native]))

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
            A completion; a list of them, in order, for several prompts. When the engine is closed meanwhile, each has what was generated
            until then, and the `finish_reason` "cancelled".

        Raises:
            ContextFullError: a prompt is longer than the context.
            DecodeError: the computation failed.
            QueueFullError: too many requests wait already. Of several prompts, those after the first wait for room.
            RequestTimeoutError: `timeout` passed.
            ClosedError: the engine was closed before.
            InvalidOptionError: `params` has another length than `prompts`, a token id of a prompt or of `logit_bias` is outside the
                vocabulary, a grammar or schema cannot be used, or `timeout` is not above 0.
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
        """Starts to generate for one prompt, or for several, and returns: at once, unless the queue has no room for all of several.

        Args:
            prompts: a prompt, or a sequence of prompts.
            params: how to sample: one for all, or one for each of several prompts; None: the defaults.
            timeout: seconds from now in which each must end, the wait for its turn included, whether or not anybody reads; None: no limit.

        Returns:
            An iterator over the tokens; a list of them, in order, for several prompts.

        Raises:
            ContextFullError: a prompt is longer than the context.
            QueueFullError: too many requests wait already. Of several prompts, those after the first wait for room.
            RequestTimeoutError: `timeout` passed while they did.
            ClosedError: the engine was closed before, or while they did.
            InvalidOptionError: as for `generate()`.
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

        Cancelling the task that awaits it cancels all. Arguments, result and errors are those of `generate()`; where that waits for room in
        the queue, this does too, without holding up the event loop.
        """
        from . import aio  # late: importing asyncio takes longer than importing this package

        requests, single = self._requests(prompts, params)
        completions = await aio.generate(self, requests, timeout)
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
        streams = aio.start(self, requests, timeout)
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
        deadline = Deadline(timeout)
        streams: list[TokenStream] = []
        try:
            for prompt, sampling in requests:
                # Of several, a full queue is an error to the first; later ones wait for the room that earlier ones make.
                generation = self._native.submit(prompt, sampling, deadline.left(), wait_for_room=bool(streams))
                streams.append(TokenStream(generation, self, logprobs=sampling.logprobs is not None))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams, single

    def save_prefix(self, prompt: Prompt, path: StrPath) -> int:
        """Computes a prompt and writes its KV cache to a file, for `load_prefix()`, also in another process.

        The file is complete or not there at all. Returns the prompt's length in tokens.

        Raises:
            OSError: the file cannot be written.
            LlamaMoeError: what `embed()` raises.
        """
        _logging.sync_level()
        tokens = self._tokens_of(prompt)
        data = self._native.save_prefix(tokens)
        with written_whole(path) as partial:
            partial.write_bytes(data)
        return len(tokens)

    def load_prefix(self, path: StrPath) -> int:
        """Reads what `save_prefix()` wrote and keeps it in host memory: prompts that begin like it are computed from where it ends.

        Returns its length in tokens.

        Raises:
            InvalidOptionError: it is of another model or `kv_type`, or damaged; of an engine with another `max_sequences`, unless both have
                a `context_pool`; or of one with a pool, when this one has none, or the other way round.
            ContextFullError: it is longer than `context_size`.
            ClosedError: the engine was closed.
            OSError: the file cannot be read.
        """
        _logging.sync_level()
        return self._native.load_prefix(Path(path).read_bytes())

    def clear_prefixes(self) -> None:
        """Forgets what `load_prefix()` loaded.

        Raises:
            ClosedError: the engine was closed.
        """
        _logging.sync_level()
        self._native.clear_prefixes()

    def memory(self) -> MemoryReport:
        """Bytes by device and role: the model's weights, the KV cache and the compute buffers."""
        return MemoryReport.of(self._native.memory())

    def stats(self) -> dict[str, int | float]:
        """What it does now, and counts since it was made.

        Returns:
            Now: "requests_running" and "requests_waiting". Since it was made: "requests_submitted"; "requests_finished", however they
            ended; "requests_preempted", which went back to the queue because a `context_pool` was full; "prompt_tokens", which were
            computed; "cached_tokens", which were not, because an earlier request or a saved prefix had them; "generated_tokens";
            "draft_tokens" and "draft_tokens_accepted" of speculative decoding, and "draft_acceptance_rate", the share of them, 0 to 1;
            "decode_calls" of llama.cpp; and the seconds spent in those ("decode_seconds") and in choosing tokens ("sample_seconds").
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

    @property
    def lost(self) -> bool:
        """Whether it can compute nothing any more, because a device failed or llama.cpp gave up in it. False once it is closed.

        Every call raises `DecodeError` then. Close it and load anew, on the devices that are left.
        """
        return self._native.lost

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
    if not isinstance(params, Sequence):
        raise TypeError(f"params must be a SamplingParams, or a sequence of one for each prompt, not {params!r}")
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"params must be a SamplingParams, or one for each prompt, not {item!r}")
    if len(params) != prompts:
        raise InvalidOptionError(f"params has {len(params)} entries for {prompts} prompts; give one for all, or one for each")
    return params
