"""What `tune()` found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import _table
from ._sizes import format_size

if TYPE_CHECKING:
    from .profiles import Profile
    from .trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TuningReport:
    """What was tried and what won; `str()` of it is a table.

    Attributes:
        trials: every trial, in the order in which they were made; those that an earlier sweep made come where this one needed them.
        profile: what was kept.
        default: the defaults of `load()`, with the median of their trials.
        winner: the best options, with the median of theirs.
        path: the profile's file.
        in_time: whether the sweep came to its end; else a second one goes on.
    """

    trials: tuple[Trial, ...]
    profile: Profile
    default: Trial
    winner: Trial
    path: str
    in_time: bool

    def to_dict(self) -> dict[str, object]:
        """As plain data, for JSON."""
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "profile": self.profile.to_dict(),
            "default": asdict(self.default),
            "winner": asdict(self.winner),
            "path": self.path,
            "in_time": self.in_time,
        }

    def __str__(self) -> str:
        rows = [_HEAD, *map(_row, self.trials)]
        parts = [_table.columns(rows, right=(1, 2, 3, 6, 7, 8, 9))]
        failed = dict.fromkeys(f"{trial.options}: {trial.error}" for trial in self.trials if trial.error is not None)
        if failed:
            parts.append("\n".join(f"failed: {line}" for line in failed))
        lines = [f"best at {self.profile.objective}: {self.winner.options}", self._gains(), f"kept in {self.path}"]
        if not self.in_time:
            lines.append("time was over before all was tried; the next sweep goes on from here")
        return "\n\n".join([*parts, "\n".join(lines)])

    def _gains(self) -> str:
        if self.default.error is not None:
            return f"the defaults failed: {self.default.error}"
        if self.winner.options == self.default.options:
            return "nothing that was tried is noticeably better than the defaults"
        decode = _ratio(self.winner.decode_tokens_per_second, self.default.decode_tokens_per_second)
        prompt = _ratio(self.winner.prompt_tokens_per_second, self.default.prompt_tokens_per_second)
        return f"against the defaults: decode {decode}, prompt {prompt}"

    def __repr__(self) -> str:
        return f"<TuningReport of {len(self.trials)} trials: {self.winner.options}>"


_HEAD = (
    "experts",
    "micro-batch",
    "threads",
    "for prompts",
    "repack",
    "kernels",
    "host memory",
    "accelerators",
    "prompt, tokens/s",
    "decode, tokens/s",
    "took",
)


def _row(trial: Trial) -> tuple[str, ...]:
    options = trial.options
    fine = trial.error is None
    return (
        options.experts,
        str(options.micro_batch_size),
        str(options.threads or "default"),
        str(options.threads_batch or options.threads or "default"),
        "yes" if options.repack else "no",
        options.expert_kernels,
        options.host_memory,
        format_size(sum(trial.device_bytes.values())) if trial.device_bytes else "-",
        f"{trial.prompt_tokens_per_second:.2f}" if fine else "failed",
        f"{trial.decode_tokens_per_second:.2f}" if fine else "failed",
        f"{trial.seconds:.1f} s",
    )


def _ratio(found: float, before: float) -> str:
    return f"{found:.2f} tokens/s instead of {before:.2f} ({(found / before - 1) * 100:+.1f} %)" if before else f"{found:.2f} tokens/s"
