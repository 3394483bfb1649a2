"""How much the placement, or a quantisation, changes what a model predicts."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import _table
from ._placements import parse_placement, placement_name
from .context import Context
from .errors import InvalidOptionError
from .model import Model
from .scoring import text_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import IO

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from .model import DevicesLike, ExpertKernels, HostMemory, StrPath
    from .placement import PlacementLike

_CHUNK_TOKENS = 128
_ROWS = 32  # of logits that are looked at together: in float64 a vocabulary of 256k takes 64 MiB


@dataclass(frozen=True, slots=True)
class Quality:
    """What a model makes of a text, and how that differs from the reference.

    Attributes:
        tokens: positions whose next token was predicted, given the text before it.
        perplexity: e to the power of their mean negative log-probability.
        perplexity_error: its standard error, which comes from the choice of the text. Two rows share the text, so that they can differ by
            much less than this and still be really different.
        top_agreement: share of the positions at which this and the reference find the same next token most likely, 0 to 1; None: this is
            the reference.
        mean_kl: mean over the positions of the Kullback-Leibler divergence of this prediction from the reference's, in nats; None: this is
            the reference.
        max_kl: the largest one.
    """

    tokens: int
    perplexity: float
    perplexity_error: float
    top_agreement: float | None = None
    mean_kl: float | None = None
    max_kl: float | None = None


@dataclass(frozen=True, slots=True)
class QualityRow:
    """What was compared: a file under a placement, and what came of it."""

    model: str
    placement: str
    quality: Quality


@dataclass(frozen=True, slots=True)
class QualityReport:
    """What `compare()` found; `str()` of it is a table.

    Attributes:
        rows: one for each file and placement; the first is the reference of the others.
    """

    rows: tuple[QualityRow, ...]

    def to_dict(self) -> dict[str, list[dict[str, object]]]:
        """As plain data, for JSON."""
        return {"rows": [{"model": row.model, "placement": row.placement, **asdict(row.quality)} for row in self.rows]}

    def __str__(self) -> str:
        head = ("model", "placement", *QUALITY_HEAD)
        rows = [head, *((row.model, row.placement, *quality_cells(row.quality)) for row in self.rows)]
        return _table.columns(rows, right=range(2, len(head)))


QUALITY_HEAD = ("perplexity", "same top token", "mean KL", "max KL")


def quality_cells(quality: Quality | None) -> tuple[str, str, str, str]:
    """The cells of a table under `QUALITY_HEAD`."""
    if quality is None:
        return "-", "-", "-", "-"
    perplexity = f"{quality.perplexity:.4f} ± {quality.perplexity_error:.4f}"
    if quality.top_agreement is None:
        return perplexity, "reference", "-", "-"
    return perplexity, f"{quality.top_agreement:.2%}", f"{quality.mean_kl:.3g}", f"{quality.max_kl:.3g}"


def compare(
    path: StrPath,
    text: str,
    *,
    placements: Sequence[PlacementLike | str] = ("gpu", "cpu"),
    against: StrPath | None = None,
    max_tokens: int | None = 1024,
    window: int = 512,
    threads: int | None = None,
    devices: DevicesLike | None = None,
    host_memory: HostMemory = "mmap",
    repack: bool = True,
    expert_kernels: ExpertKernels = "auto",
    on_progress: Callable[[str], object] | None = None,
) -> QualityReport:
    """Compares what a model predicts under several placements, or with its quantisation in another file, position by position of a text.

    Both read the text itself, whatever they would have generated (teacher forcing). One load is there at a time; the predictions of the
    first, the reference, wait in a temporary file of 4 bytes for each position and token of the vocabulary.

    Args:
        path: a GGUF file; the reference is this one under the first of the placements.
        text: of three tokens or more.
        placements: an `ExpertPlacement`, or "gpu", "cpu", "fit", "fit:8GiB", "first:12" or "last:4", for each load.
        against: another file of the same vocabulary, to load under each of the placements too.
        max_tokens: how much of the text to use; None: all.
        window: tokens of context. A longer text is cut into windows of which each begins half a window after the one before, and only the
            tokens that no earlier one had are counted, as `Engine.perplexity()` does it.
        threads: CPU threads; None: one for each physical core this process may use.
        devices: as for `Model`.
        host_memory: as for `Model`.
        repack: as for `Model`.
        expert_kernels: as for `Model`.
        on_progress: called with what is done next.

    Raises:
        InvalidOptionError: the text or the window is too short, there are no placements, or the other file has another vocabulary.
        LlamaMoeError: what `Model` raises.
    """
    if not placements:
        raise InvalidOptionError("placements is empty; it must have one placement or more")
    rows: list[QualityRow] = []
    with QualityMeter(text, max_tokens=max_tokens, window=window, threads=threads) as meter:
        for placement in placements:
            for file in (path, against):
                if file is None:
                    continue
                name = placement_name(placement)
                if on_progress is not None:
                    on_progress(f"{name}: reading the text with {file}")
                policy = parse_placement(placement)
                with Model(
                    file,
                    experts=policy,
                    devices=devices,
                    host_memory=host_memory,
                    repack=repack,
                    expert_kernels=expert_kernels,
                    fit_context_tokens=window,
                ) as model:
                    rows.append(QualityRow(str(file), name, meter.measure(model)))
    return QualityReport(tuple(rows))


class QualityMeter:
    """Measures models at one text; the first is the reference of the others. Close it, or use it as a context manager."""

    def __init__(self, text: str, *, max_tokens: int | None = 1024, window: int = 512, threads: int | None = None) -> None:
        if window < 2:
            raise InvalidOptionError(f"window is {window}; it must be 2 tokens or more")
        if max_tokens is not None and max_tokens < 3:
            raise InvalidOptionError(f"max_tokens is {max_tokens}; it must be 3 or more")
        self._text = text
        self._max_tokens = max_tokens
        self._window = window
        self._threads = threads
        self._tokens: list[int] = []
        self._vocabulary = 0
        self._reference: IO[bytes] | None = None

    def measure(self, model: Model) -> Quality:
        """Reads the text with a model.

        Raises:
            InvalidOptionError: the text is too short, or this model's vocabulary is not that of the reference.
            OSError: there is no room for the predictions of the reference.
        """
        tokens = model.tokenize(self._text)[: self._max_tokens]
        if len(tokens) < 3:
            raise InvalidOptionError(f"the text has {len(tokens)} tokens; it must have 3 or more")
        if self._reference is None:
            reference = tempfile.TemporaryFile()  # noqa: SIM115 close() closes it
            try:
                quality = _summary(self._predictions(model, tokens), write_to=reference)
            except BaseException:
                reference.close()
                raise
            self._tokens, self._vocabulary, self._reference = tokens, model.vocab_size, reference
            return quality
        if tokens != self._tokens or model.vocab_size != self._vocabulary:
            raise InvalidOptionError(f"{model.path} has another vocabulary than the reference: they cannot be compared")
        self._reference.seek(0)
        return _summary(self._predictions(model, tokens), compare_with=self._reference)

    def _predictions(self, model: Model, tokens: Sequence[int]) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
        """Log-probabilities of shape [n, vocab_size], and the n tokens that came, for all positions in turn."""
        import numpy as np

        window = min(self._window, len(tokens))
        with Context(model, context_size=window, threads=self._threads) as context:
            for begin, fresh in text_windows(len(tokens), window, window // 2):
                context.clear()
                part = tokens[begin : begin + window]
                wanted = np.zeros(len(part), bool)
                wanted[fresh - begin - 1 : -1] = True
                for start in range(0, len(part), _CHUNK_TOKENS):
                    mask = wanted[start : start + _CHUNK_TOKENS]
                    logits = context.decode(part[start : start + _CHUNK_TOKENS], outputs=mask if mask.any() else "last")
                    came = np.asarray(part)[np.flatnonzero(mask) + start + 1]
                    for row in range(0, len(came), _ROWS):
                        yield _log_softmax(logits[row : row + _ROWS]), came[row : row + _ROWS]

    def close(self) -> None:
        """Deletes the predictions of the reference. Idempotent."""
        if self._reference is not None:
            self._reference.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _summary(
    predictions: Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]],
    *,
    write_to: IO[bytes] | None = None,
    compare_with: IO[bytes] | None = None,
) -> Quality:
    import numpy as np

    losses: list[npt.NDArray[np.float64]] = []
    divergences: list[npt.NDArray[np.float64]] = []
    same = 0
    for logprobs, came in predictions:
        losses.append(-logprobs[np.arange(len(came)), came])
        rounded = logprobs.astype(np.float32)
        if write_to is not None:
            write_to.write(rounded.tobytes())
        if compare_with is not None:
            expected = np.frombuffer(compare_with.read(rounded.nbytes), np.float32).reshape(rounded.shape)
            same += int((rounded.argmax(axis=1) == expected.argmax(axis=1)).sum())
            divergences.append(_kl_divergence(expected, rounded))
    loss = np.concatenate(losses)
    perplexity = math.exp(loss.mean())
    error = perplexity * float(loss.std(ddof=1)) / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
    if compare_with is None:
        return Quality(len(loss), perplexity, error)
    divergence = np.concatenate(divergences)
    return Quality(len(loss), perplexity, error, same / len(loss), float(divergence.mean()), float(divergence.max()))


def _kl_divergence(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The Kullback-Leibler divergence of each row of log-probabilities from the expected one: sum of p * (log p - log q), in nats."""
    import numpy as np

    logs = expected.astype(np.float64)
    # What the reference rules out adds nothing, also where both do.
    differences = np.where(np.isneginf(logs), 0.0, logs - np.where(np.isneginf(logs), 0.0, found))
    # Rounding of the logarithms can make a sum that is 0 a little less than that.
    sums: npt.NDArray[np.float64] = np.maximum((np.exp(logs) * differences).sum(axis=1), 0.0)
    return sums
