"""The low level: token arrays in, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core, _logging
from ._options import fill_context, native_model
from .memory import MemoryReport
from .tracing import TracingMethods

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Literal

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from .model import Model
    from .tokens import TokenIds


class Context(TracingMethods):
    """A KV cache over a model, for callers who batch and sample themselves; `Engine` does both for you.

    Sequences are numbered from 0 to `max_sequences - 1`. A call computes without the GIL; calls from several threads run one after another.
    After a failed or interrupted call every sequence is as it was before.

    Args:
        model: an open model; it stays usable by others.
        context_size: tokens for each sequence; 0: what the model was trained for.
        max_sequences: sequences that can be held at once.
        batch_size: most tokens in one call of llama.cpp; longer input is split.
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
        self._native = _core.Context(
            native_model("model", model),
            fill_context(
                _core.ContextOptions(),
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
        """The model it computes with."""
        return self._model

    def decode(
        self,
        tokens: TokenIds,
        positions: TokenIds | None = None,
        sequence_ids: TokenIds | int | None = None,
        outputs: Literal["last", "all"] | Sequence[bool] | npt.NDArray[np.bool_] = "last",
    ) -> npt.NDArray[np.float32]:
        """Adds tokens to their sequences and computes logits.

        Args:
            tokens: ids, shape [n].
            positions: each token's position in its sequence, shape [n]; None: each sequence goes on where it ended.
            sequence_ids: each token's sequence, shape [n] or one number for all; None: all are of sequence 0.
            outputs: the tokens to return logits for: "last": the last one of each sequence; "all"; or a bool mask of shape [n].

        Returns:
            Logits, float32 of shape [n_outputs, vocab_size], in the order of the tokens.

        Raises:
            InvalidOptionError: an array has another shape or type, or an id, position or sequence is out of range.
            ContextFullError: a sequence would grow past `context_size`.
            DecodeError: the computation failed.
        """
        _logging.sync_level()
        if isinstance(sequence_ids, int):
            sequence_ids = [sequence_ids] * len(tokens)
        return self._native.decode(tokens, positions, sequence_ids, outputs)

    def sequence_length(self, sequence_id: int) -> int:
        """Tokens that a sequence holds."""
        return self._native.sequence_length(sequence_id)

    def remove(self, sequence_id: int, start: int = 0, end: int = -1) -> None:
        """Removes the positions from `start` up to but not including `end`; -1 as end: to the last; -1 as sequence: of all of them."""
        self._native.remove(sequence_id, start, end)

    def copy(self, source: int, destination: int, start: int = 0, end: int = -1) -> None:
        """Makes `destination` share the positions from `start` up to but not including `end` of `source`; -1 as end: to the last."""
        self._native.copy(source, destination, start, end)

    def keep(self, sequence_id: int) -> None:
        """Removes every sequence but this one."""
        self._native.keep(sequence_id)

    def clear(self) -> None:
        """Removes every sequence."""
        self._native.clear()

    def save_state(self, sequence_id: int = -1) -> bytes:
        """The KV cache of a sequence, or of the whole context for -1.

        It can be loaded into a context of the same model with the same `max_sequences` and `kv_type`, also in another process.
        """
        return self._native.save_state(sequence_id)

    def load_state(self, data: bytes, sequence_id: int = -1) -> None:
        """Replaces a sequence, or the whole context for -1, by what `save_state()` returned.

        Raises:
            InvalidOptionError: the data is of another model, `max_sequences` or `kv_type`, does not fit, or is damaged.
        """
        self._native.load_state(data, sequence_id)

    def memory(self) -> MemoryReport:
        """Bytes by device and role: the model's weights, this KV cache and its compute buffers."""
        return MemoryReport.of(self._native.memory())

    @property
    def context_size(self) -> int:
        """Tokens for each sequence."""
        return self._native.context_size

    @property
    def max_sequences(self) -> int:
        """Sequences that can be held at once."""
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
        """Frees the KV cache. Idempotent."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"<Context over {self._model.path!r}: {self.max_sequences} x {self.context_size} tokens{closed}>"
