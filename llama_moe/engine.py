"""Text generation for one or many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from . import _core, _logging
from ._options import context_options
from .chat import ChatStream
from .errors import InvalidOptionError
from .inspection import inspect
from .memory import MemoryReport
from .model import Model
from .sampling import SamplingParams
from .stream import TokenStream
from .tokens import as_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Literal

    from typing_extensions import Self

    from .chat import ChatCompletion, ToolChoice
    from .model import DevicesLike, HostMemory, StrPath
    from .placement import PlacementLike
    from .results import Completion
    from .tokens import Prompt


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
    def generate(self, prompts: Prompt, params: SamplingParams | None = None) -> Completion: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Completion | list[Completion]:
        """Generates for one prompt, or for several together.

        An exception that interrupts it, such as KeyboardInterrupt, or the failure of one of several, cancels all.

        Args:
            prompts: a prompt, or a sequence of prompts.
            params: how to sample: one for all, or one for each of several prompts; None: the defaults.

        Returns:
            A completion; a list of them, in order, for several prompts.

        Raises:
            ContextFullError: a prompt is longer than the context.
            DecodeError: the computation failed.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, or a token id is outside the vocabulary.
        """
        streams, single = self._start(prompts, params)
        try:
            completions = [stream.read_all() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return completions[0] if single else completions

    @overload
    def stream(self, prompts: Prompt, params: SamplingParams | None = None) -> TokenStream: ...  # type: ignore[overload-overlap]
    @overload
    def stream(self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[TokenStream]: ...
    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> TokenStream | list[TokenStream]:
        """Starts to generate for one prompt, or for several, and returns at once.

        Args:
            prompts: a prompt, or a sequence of prompts.
            params: how to sample: one for all, or one for each of several prompts; None: the defaults.

        Returns:
            An iterator over the tokens; a list of them, in order, for several prompts.

        Raises:
            ContextFullError: a prompt is longer than the context.
            ClosedError: the engine was closed.
            InvalidOptionError: `params` has another length than `prompts`, or a token id is outside the vocabulary.
        """
        streams, single = self._start(prompts, params)
        return streams[0] if single else streams

    def _start(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[TokenStream], bool]:
        """A stream for each prompt, and whether there was one prompt, not a sequence of them."""
        _logging.sync_level()
        each, single = as_prompts(prompts)
        options = [item._to_native() for item in _params_of_each(params, len(each), single=single)]
        streams: list[TokenStream] = []
        try:
            for prompt, sampling in zip(each, options, strict=True):
                streams.append(TokenStream(self._native.submit(prompt, sampling), self))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams, single

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatCompletion:
        """Answers a conversation, in the format of the model's chat template.

        Args:
            messages: mappings of the OpenAI API's shape: `role` ("system", "developer", "user", "assistant" or "tool") and `content`, a
                text or a list of text parts; `tool_calls`, `tool_call_id`, `name` and `reasoning_content` where they belong.
            params: how to sample; None: the defaults.
            tools: functions that the model may ask to call, of the OpenAI API's shape.
            tool_choice: "auto": as the model likes; "none": not; "required": at least one, behind text if it likes;
                {"function": {"name": ...}}: that one.
            parallel_tool_calls: whether it may ask for several at once, in formats where that can be told apart.
            response_format: {"type": "text"}; {"type": "json_object"}; or {"type": "json_schema", "json_schema": {"schema": ...}}: the
                answer is JSON of that schema.
            enable_thinking: for templates that ask: whether the model thinks first.
            template: the text of a Jinja template to use in place of the model's own.
            template_options: further variables for the template.
            add_generation_prompt: end the prompt where the answer begins.
            continue_final_message: go on with the last message, which is the assistant's, in place of a new one.

        Returns:
            The answer.

        Raises:
            InvalidOptionError: the model has no template, a message or tool is not of the right shape, the template refuses the messages or
                has no place for tools, or an option is outside its range.
            ContextFullError: the conversation is longer than the context.
            DecodeError: the computation failed.
            ClosedError: the engine was closed.
        """
        return self.stream_chat(
            messages,
            params,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            enable_thinking=enable_thinking,
            template=template,
            template_options=template_options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        ).read_all()

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = False,
        response_format: Mapping[str, object] | None = None,
        enable_thinking: bool = True,
        template: str | None = None,
        template_options: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatStream:
        """Starts to answer a conversation and returns at once. The arguments and errors are those of `chat`.

        Returns:
            An iterator over what the answer gains.
        """
        _logging.sync_level()
        prompt = self._model.chat_format(template).apply(
            messages,
            params,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
            enable_thinking=enable_thinking,
            template_options=template_options,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return ChatStream(TokenStream(self._native.submit(prompt.text, prompt.options()), self), prompt.parser())

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
