"""Batch inference: an actor class for Ray Data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from llama_moe.engine import Engine
from llama_moe.errors import InvalidOptionError
from llama_moe.loading import load

from .answers import arrow_column, checked_outputs, text_column
from .columns import column_of, with_columns
from .resources import require, threads_of_actor
from .rows import Rows
from .sampling import as_sampling, with_fields

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from llama_moe.model import StrPath
    from llama_moe.sampling import SamplingParams

    from .columns import Batch
    from .rows import Stream

_CHAT_OPTIONS = tuple(name for name in inspect.signature(Engine.chat).parameters if name not in ("self", "messages", "params"))


class LlamaMoe:
    """Generates for the rows of a dataset: a class for `ray.data.Dataset.map_batches`, whose actors each load the model once.

    All rows of a batch go to the engine together, which computes `max_sequences` of them at once and replaces each that ends; so a batch
    should have several times as many. Rows keep their order and all their columns. Batches may be of any `batch_format`; "pyarrow" is the
    one that copies least, and numpy batches come back as Arrow tables.

    Rows are lost neither with a process nor with a machine: Ray starts the actor again, which loads the model again, and gives it the
    batch once more.

    Args:
        model: a GGUF file, at this path on every machine that runs an actor, or of the Hugging Face hub.
        load_options: arguments of `llama_moe.load`. Their defaults are those of `load`, but for two: `max_sequences` is 8, and `threads` is
            the number of CPUs that Ray reserves for the actor (`map_batches(..., num_cpus=n)`; Ray's default is one), within its share of
            the machine's cores.
        sampling: how to sample, as a `SamplingParams` or a mapping of its fields; None: the defaults.
        task: "completion": a row's prompt is text or token ids to continue; "chat": it is a conversation to answer.
        prompt_column: the column of prompts. For a chat, a list of messages of the OpenAI API's shape, or the text of a user's message.
        sampling_column: a column of mappings with fields of `SamplingParams`, which replace those of `sampling` in their row where they are
            not null; None: no such column. A `json_schema` in it is text.
        output_columns: the column for the text; or columns by what they get, such as {"text": "answer", "finish_reason": "why"}. There are
            "text", "finish_reason", "tokens" (ids), "logprobs" (of those tokens), "prompt_tokens", "cached_tokens" and
            "completion_tokens" (counts), and in a chat "reasoning" and "tool_calls". A column that is there already is replaced.
        chat_options: further arguments of `Engine.chat`, such as `tools` or `response_format`.
        system: in a chat, the system's message, which comes before each conversation.
        on_error: what becomes of a row whose prompt is too long, is none, or whose options are wrong: "raise" ends the job; "column" writes
            what is wrong to `error_column`, null in good rows, and leaves the row's outputs null.
        error_column: the column for that.

    Raises:
        InvalidOptionError: an argument is not one of its values, or the model has no chat template.
        LlamaMoeError: what `llama_moe.load` raises.
    """

    def __init__(
        self,
        model: StrPath,
        *,
        load_options: Mapping[str, Any] | None = None,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        task: Literal["completion", "chat"] = "completion",
        prompt_column: str = "prompt",
        sampling_column: str | None = None,
        output_columns: str | Mapping[str, str] = "completion",
        chat_options: Mapping[str, Any] | None = None,
        system: str | None = None,
        on_error: Literal["raise", "column"] = "raise",
        error_column: str = "error",
    ) -> None:
        if task not in ("completion", "chat"):
            raise InvalidOptionError(f"task is {task!r}; expected 'completion' or 'chat'")
        if on_error not in ("raise", "column"):
            raise InvalidOptionError(f"on_error is {on_error!r}; expected 'raise' or 'column'")
        self._chat = task == "chat"
        if not self._chat and (chat_options or system is not None):
            raise InvalidOptionError("chat_options and system are of chats; set task='chat', or leave them out")
        self._chat_options = _checked_chat_options(chat_options or {})
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._prompt_column = prompt_column
        self._sampling_column = sampling_column
        self._outputs = checked_outputs(output_columns, chat=self._chat)
        self._error_column = error_column if on_error == "column" else None
        if self._error_column in self._outputs.values():
            raise InvalidOptionError(f"error_column is {error_column!r}, which output_columns has already; give it another name")
        self._sampling = as_sampling(sampling)

        require("ray.data", "llama_moe.ray.LlamaMoe")
        options: dict[str, Any] = {"max_sequences": 8, **(load_options or {})}
        if options.get("profile") is None:  # which has its own threads
            options.setdefault("threads", threads_of_actor())
        self._engine = load(model, **options)
        try:
            if self._chat:
                self._engine.model.chat_format(self._chat_options.get("template"))  # says now if there is none
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine that it generates with."""
        return self._engine

    def __call__(self, batch: Batch) -> Batch:
        """The batch with the columns of the answers; may be called from several threads at once.

        Raises:
            InvalidOptionError: a column is missing.
            ContextFullError, InvalidOptionError, TypeError: with `on_error="raise"`, what is wrong with a row.
            DecodeError: the computation failed.
            ClosedError: it was closed.
            CancelledError: it was closed meanwhile.
        """
        prompts = column_of(batch, self._prompt_column)
        sampling = [None] * len(prompts) if self._sampling_column is None else column_of(batch, self._sampling_column)
        rows = Rows(prompts, lambda row: self._start(prompts[row], sampling[row]), keep_errors=self._error_column is not None)
        rows.generate()
        columns = {name: arrow_column(field, rows.answers) for field, name in self._outputs.items()}
        if self._error_column is not None:
            columns[self._error_column] = text_column(rows.errors)
        return with_columns(batch, columns)

    def _start(self, prompt: Any, sampling: Any) -> Stream:
        params = self._params(sampling)
        if self._chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not isinstance(messages, list):
                raise TypeError(f"a conversation must be text or a list of messages, not {prompt!r}")
            return self._engine.stream_chat([*self._system, *messages], params, **self._chat_options)
        # A list of anything but integers would be several prompts to the engine.
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt)):
            raise TypeError(f"a prompt must be text or token ids, not {prompt!r}")
        return self._engine.stream(prompt, params)

    def _params(self, changes: Any) -> SamplingParams:
        params = self._sampling if changes is None else with_fields(self._sampling, changes)
        return replace(params, logprobs=0) if "logprobs" in self._outputs and params.logprobs is None else params

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._engine.closed

    def close(self) -> None:
        """Frees the model and cancels what runs; Ray does it when the actor has no more to do. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # it does not where loading failed
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self._engine!r}>"


def _checked_chat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in _CHAT_OPTIONS:
            raise InvalidOptionError(f"chat_options has {name!r}; Engine.chat has {', '.join(_CHAT_OPTIONS)}")
    return dict(options)
