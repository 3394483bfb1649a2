"""What a model makes of a text: embeddings, log-probabilities, perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, overload

from . import _logging
from .errors import InvalidOptionError
from .stream import Deadline
from .tokens import as_prompts, token_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from . import _core
    from .engine import Engine
    from .model import Model
    from .tokens import Prompt

Pooling: TypeAlias = Literal["mean", "last", "cls", "none"]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How likely a model finds a text.

    Attributes:
        tokens: ids of the text's tokens, n of them.
        logprobs: natural logarithms of the probabilities of the tokens but the first, each given all before it: float32 of shape [n - 1],
            read-only.
    """

    tokens: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]

    @property
    def total(self) -> float:
        """The text's log-probability, given its first token."""
        return float(self.logprobs.sum(dtype=float))

    @property
    def perplexity(self) -> float:
        """E to the power of the mean negative log-probability."""
        return math.exp(-self.total / len(self.logprobs))

    def __repr__(self) -> str:
        return f"<Score of {len(self.tokens)} tokens: log-probability {self.total:.3f}, perplexity {self.perplexity:.3f}>"


def text_windows(length: int, window: int, step: int) -> Iterator[tuple[int, int]]:
    """Where each window of a text of `length` tokens begins, and its first token that no earlier one counted.

    The text's very first token has no probability, so that counting begins at the second.
    """
    begin, fresh = 0, 1
    while True:
        yield begin, fresh
        if begin + window >= length:
            return
        begin, fresh = begin + step, begin + window


class ScoringMethods:
    """What an `Engine` computes of texts without adding to them: embeddings and log-probabilities."""

    _native: _core.Engine
    _model: Model

    @overload
    def embed(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, pooling: Pooling = "mean", normalize: bool = True, timeout: float | None = None
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def embed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: Literal["mean", "last", "cls"] = "mean",
        normalize: bool = True,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def embed(
        self, prompts: Sequence[Prompt], *, pooling: Literal["none"], normalize: bool = True, timeout: float | None = None
    ) -> list[npt.NDArray[np.float32]]: ...
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
            InvalidOptionError: `pooling` is none of these, a token id is outside the vocabulary, or `timeout` is not above 0.
            ContextFullError: a prompt is longer than the context.
            DecodeError: the computation failed.
            QueueFullError: too many requests wait already. Of several prompts, those after the first wait for room.
            RequestTimeoutError: `timeout` passed.
            CancelledError: the engine was closed meanwhile.
            ClosedError: it was closed before.
        """
        rows, single = self._values(prompts, timeout, partial(self._native.submit_embed, pooling=pooling, normalise=normalize))
        width = self._native.embedding_size
        if pooling == "none":
            each = [row.reshape(-1, width) for row in rows]
            return each[0] if single else each
        import numpy as np  # late: most of what imports this package needs none of it

        return rows[0] if single else np.stack(rows) if rows else np.empty((0, width), np.float32)

    async def aembed(
        self,
        prompts: Sequence[Prompt],
        *,
        pooling: Literal["mean", "last", "cls"] = "mean",
        normalize: bool = True,
        timeout: float | None = None,
    ) -> npt.NDArray[np.float32]:
        """What `embed()` does with several texts, for asyncio: other tasks run meanwhile, and no thread is needed.

        Cancelling the task that awaits it cancels all. Arguments, result and errors are those of `embed()`.
        """
        from . import aio  # late: importing asyncio takes longer than importing this package

        _logging.sync_level()
        submit = partial(self._native.submit_embed, pooling=pooling, normalise=normalize)
        each, _ = as_prompts(prompts)
        rows = await aio.values(cast("Engine", self), [partial(submit, self._tokens_of(prompt)) for prompt in each], timeout)
        import numpy as np

        return np.stack(rows) if rows else np.empty((0, self._native.embedding_size), np.float32)

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
            LlamaMoeError: what `embed()` raises.
        """
        each, single = as_prompts(prompts)
        tokens = [self._tokens_of(prompt) for prompt in each]
        rows, _ = self._values(tokens, timeout, self._native.submit_score)
        for row in rows:
            row.flags.writeable = False
        scores = [Score(tuple(prompt), row) for prompt, row in zip(tokens, rows, strict=True)]
        return scores[0] if single else scores

    def perplexity(self, text: Prompt, *, stride: int | None = None, timeout: float | None = None) -> float:
        """The perplexity of a text of any length: e to the power of its tokens' mean negative log-probability.

        A text longer than the context is cut into windows of `context_size` tokens that begin `stride` tokens after each other, and of each
        window only the tokens that no earlier one had are counted, so that all but the first have some context.

        Args:
            text: a prompt of two tokens or more.
            stride: tokens, from 1 to `context_size` - 1; None: half of `context_size`.
            timeout: seconds from now in which all windows must end; None: no limit.

        Raises:
            InvalidOptionError: the text has one token only, or `stride` is out of range.
            LlamaMoeError: what `score()` raises.
        """
        window = self._native.context_size
        step = window // 2 if stride is None else stride
        if not 1 <= step < window:
            raise InvalidOptionError(f"stride is {stride}; it must be from 1 to {window - 1}, which is the context less one token")
        tokens = self._tokens_of(text)
        windows = list(text_windows(len(tokens), window, step))
        scores = self.score([tokens[begin : begin + window] for begin, _ in windows], timeout=timeout)
        total, counted = 0.0, 0
        for (begin, fresh), part in zip(windows, scores, strict=True):
            counts = part.logprobs[fresh - begin - 1 :]
            total += float(counts.sum(dtype=float))
            counted += len(counts)
        return math.exp(-total / counted)

    def _tokens_of(self, prompt: Prompt) -> list[int]:
        return self._model.tokenize(prompt, parse_special=True) if isinstance(prompt, str) else token_ids(prompt)

    def _values(
        self, prompts: Prompt | Sequence[Prompt], timeout: float | None, submit: Callable[..., _core.Generation]
    ) -> tuple[list[npt.NDArray[np.float32]], bool]:
        """What each prompt's request computed, and whether there was one prompt, not a sequence of them."""
        _logging.sync_level()
        each, single = as_prompts(prompts)
        deadline = Deadline(timeout)
        requests: list[_core.Generation] = []
        try:
            for prompt in each:
                requests.append(submit(self._tokens_of(prompt), timeout=deadline.left(), wait_for_room=bool(requests)))
            return [request.take_values() for request in requests], single
        except BaseException:
            for request in requests:
                request.cancel()
            raise
