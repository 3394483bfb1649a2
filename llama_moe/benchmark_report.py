"""What `benchmark()` found, as objects, tables, CSV and plain data."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from . import _table
from ._sizes import format_size
from .quality import QUALITY_HEAD, quality_cells

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeAlias

    from ._speed import Speed, Spread
    from .devices import Device
    from .memory import MemoryReport
    from .quality import Quality

    Cell: TypeAlias = str | int | float | None

Baseline = Literal["measured", "weights"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """One placement of one file: what was measured, or why that was not possible.

    Attributes:
        model: the file.
        placement: the placement, as a word where there is one: "gpu", "first:12".
        error: why it failed; None: it did not, and then `memory`, `speed` and `load_seconds` are there. They are there too where only the
            text could not be read.
        memory: bytes by device and role of the loaded engine.
        device_bytes: what of it is on accelerators.
        free_memory_drop: bytes by which the free memory that each accelerator's driver tells fell from before the load until the engine
            was there. Others that use the accelerator change it too. Workers are left out: they tell what their machine has.
        saved_bytes: bytes of accelerator memory that "gpu" takes more than this; None: there is no accelerator, or `error`.
        reduction: the same as a share of what "gpu" takes, 0 to 1.
        baseline: where that is from. "measured": a row of this report; "weights": no such row, so that only weights are compared, which
            are known from the placement.
        load_seconds: of the model and its engine. Each placement is loaded once. The first load of a file that is not in the operating
            system's cache is slower than later ones.
        speed: of prompts and of single tokens.
        quality: what it makes of the text, if one was given.
    """

    model: str
    placement: str
    error: str | None = None
    memory: MemoryReport | None = None
    device_bytes: int | None = None
    free_memory_drop: Mapping[str, int] | None = None
    saved_bytes: int | None = None
    reduction: float | None = None
    baseline: Baseline | None = None
    load_seconds: float | None = None
    speed: Speed | None = None
    quality: Quality | None = None

    def to_dict(self) -> dict[str, object]:
        """As plain data, for JSON."""
        speed = self.speed
        prompt, decode, first = (speed.prompt, speed.decode, speed.time_to_first_token) if speed else (None, None, None)
        return {
            "model": self.model,
            "placement": self.placement,
            "error": self.error,
            "memory": self.memory.to_dict() if self.memory else None,
            "device_bytes": self.device_bytes,
            "free_memory_drop": None if self.free_memory_drop is None else dict(self.free_memory_drop),
            "saved_bytes": self.saved_bytes,
            "reduction": self.reduction,
            "baseline": self.baseline,
            "load_seconds": self.load_seconds,
            "prompt": prompt.to_dict() if prompt else None,
            "decode": decode.to_dict() if decode else None,
            "time_to_first_token": first.to_dict() if first else None,
            "quality": asdict(self.quality) if self.quality else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A file that was measured.

    Attributes:
        path: the file.
        description: llama.cpp's words for architecture, size and quantisation; "" if no placement could be loaded.
        size_bytes: bytes of all tensors.
        parameter_count: numbers in all tensors.
    """

    path: str
    description: str
    size_bytes: int
    parameter_count: int


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class BenchmarkReport:
    """What `benchmark()` measured, and on what; `str()` of it is a table.

    Attributes:
        rows: one for each file and placement.
        models: the files.
        accelerators: the devices whose memory is counted; none: everything was on the CPU.
        machine: `cpu` is the CPU's name, `id` the same text on every machine of the same kind.
        build: `build_info()`.
        threads: CPU threads for single tokens; None: no placement could be loaded.
        threads_batch: CPU threads for prompts.
        context_size: tokens of context of each engine.
        micro_batch_size: most tokens computed at once.
        host_memory: how host memory held weights.
        repack: whether llama.cpp could rearrange weights for the CPU.
        expert_kernels: what computed with weights in host memory, as it was asked for.
        notes: what a reader must know about the figures.
    """

    rows: tuple[BenchmarkRow, ...]
    models: tuple[ModelFacts, ...]
    accelerators: tuple[Device, ...]
    machine: Mapping[str, str]
    build: Mapping[str, str]
    threads: int | None
    threads_batch: int | None
    context_size: int
    micro_batch_size: int
    host_memory: str
    repack: bool
    expert_kernels: str
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether a row has an error."""
        return any(row.error is not None for row in self.rows)

    def to_dict(self) -> dict[str, object]:
        """As plain data, for JSON."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "models": [asdict(model) for model in self.models],
            "accelerators": [asdict(device) for device in self.accelerators],
            "machine": dict(self.machine),
            "build": dict(self.build),
            "threads": self.threads,
            "threads_batch": self.threads_batch,
            "context_size": self.context_size,
            "micro_batch_size": self.micro_batch_size,
            "host_memory": self.host_memory,
            "repack": self.repack,
            "expert_kernels": self.expert_kernels,
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """A line of names, and a line for each row: sizes in bytes, times in seconds, speeds in tokens per second."""
        rows = [self._csv_row(row) for row in self.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Tables in GitHub's Markdown: what was measured, the figures, and the notes below."""
        head, *body = self._table()
        lines = [_markdown_line(head), _markdown_line(["---"] + ["---:"] * (len(head) - 1)), *map(_markdown_line, body)]
        parts = ["\n".join(f"- {name}: {value}" for name, value in self._facts()), "\n".join(lines)]
        if remarks := self._remarks():
            parts.append("\n".join(f"- {remark}" for remark in remarks))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        table = self._table()
        parts = [_table.columns(self._facts()), _table.columns(table, right=range(1, len(table[0])))]
        if remarks := self._remarks():
            parts.append("\n".join(remarks))
        return "\n\n".join(parts)

    def __repr__(self) -> str:
        failed = sum(row.error is not None for row in self.rows)
        return f"<BenchmarkReport of {len(self.rows)} placements{f', {failed} failed' if failed else ''}>"

    def _facts(self) -> list[tuple[str, str]]:
        facts = [
            ("model", f"{model.path} ({model.description + ', ' if model.description else ''}{format_size(model.size_bytes)})")
            for model in self.models
        ]
        facts.append(("machine", f"{self.machine['cpu']}; {self.threads} threads, {self.threads_batch} for prompts"))
        facts.append(("accelerators", ", ".join(f"{device.name} ({device.description})" for device in self.accelerators) or "none"))
        facts.append(("versions", f"llama_moe {self.build['version']}, llama.cpp {self.build['llama_cpp_commit']}"))
        facts.append(("context", f"{self.context_size} tokens, micro-batches of {self.micro_batch_size}"))
        return facts

    def _remarks(self) -> list[str]:
        failed = [f"{self._label(row)} failed: {row.error}" for row in self.rows if row.error is not None]
        return failed + [f"note: {note}" for note in self.notes]

    def _label(self, row: BenchmarkRow) -> str:
        number = [model.path for model in self.models].index(row.model) + 1
        return row.placement if len(self.models) == 1 else f"{row.placement} (model {number})"

    def _table(self) -> list[list[str]]:
        """A head, and the cells of each row under it; columns that would be empty are left out."""
        columns: list[list[str]] = [["placement", *map(self._label, self.rows)]]

        def add(head: str, cells: Iterable[str]) -> None:
            column = [head, *cells]
            if any(cell != "-" for cell in column[1:]):
                columns.append(column)

        add("accelerator memory", (_size(row.device_bytes) if self.accelerators else "-" for row in self.rows))
        add("free memory fell by", (_size(sum((row.free_memory_drop or {}).values()) or None) for row in self.rows))
        add("saved", (_size(row.saved_bytes) for row in self.rows))
        add("reduction", ("-" if row.reduction is None else f"{row.reduction:.1%}" for row in self.rows))
        add("host memory", (_size(self._host_bytes(row)) for row in self.rows))
        add("load", ("-" if row.load_seconds is None else f"{row.load_seconds:.2f} s" for row in self.rows))
        speeds = [row.speed for row in self.rows]
        add(_test_name("prompt", speeds), (str(s.prompt.tokens_per_second) if s and s.prompt else "-" for s in speeds))
        add(_test_name("decode", speeds), (str(s.decode.tokens_per_second) if s and s.decode else "-" for s in speeds))
        first = [s.time_to_first_token if s else None for s in speeds]
        add("first token, ms", (f"{1000 * t.mean:.1f} ± {1000 * t.stdev:.1f}" if t else "-" for t in first))
        quality = [quality_cells(row.quality) for row in self.rows]
        for index, head in enumerate(QUALITY_HEAD):
            add(head, (cells[index] for cells in quality))
        return [list(cells) for cells in zip(*columns, strict=True)]

    def _host_bytes(self, row: BenchmarkRow) -> int | None:
        if row.memory is None or row.device_bytes is None:
            return None
        return row.memory.total_bytes - row.device_bytes

    def _csv_row(self, row: BenchmarkRow) -> dict[str, Cell]:
        facts = next(model for model in self.models if model.path == row.model)
        speed, quality = row.speed, row.quality
        cells: dict[str, Cell] = {
            "model": row.model,
            "description": facts.description,
            "size_bytes": facts.size_bytes,
            "placement": row.placement,
            "error": row.error,
            "device_bytes": row.device_bytes,
            "host_bytes": self._host_bytes(row),
            "free_memory_drop": sum(row.free_memory_drop.values()) if row.free_memory_drop else None,
            "saved_bytes": row.saved_bytes,
            "reduction": row.reduction,
            "baseline": row.baseline,
            "load_seconds": row.load_seconds,
            "prompt_tokens": speed.prompt.tokens[0] if speed and speed.prompt else None,
            "generated_tokens": speed.decode.tokens[0] if speed and speed.decode else None,
            "repetitions": max((len(runs.tokens) for runs in (speed.prompt, speed.decode) if runs), default=None) if speed else None,
        }
        cells |= _spread("prompt_tokens_per_second", speed.prompt.tokens_per_second if speed and speed.prompt else None)
        cells |= _spread("decode_tokens_per_second", speed.decode.tokens_per_second if speed and speed.decode else None)
        cells |= _spread("time_to_first_token", speed.time_to_first_token if speed else None)
        cells |= {
            "perplexity": quality.perplexity if quality else None,
            "perplexity_error": quality.perplexity_error if quality else None,
            "top_agreement": quality.top_agreement if quality else None,
            "mean_kl": quality.mean_kl if quality else None,
            "max_kl": quality.max_kl if quality else None,
            "threads": self.threads,
            "threads_batch": self.threads_batch,
            "context_size": self.context_size,
            "micro_batch_size": self.micro_batch_size,
            "host_memory": self.host_memory,
            "repack": self.repack,
            "expert_kernels": self.expert_kernels,
            "accelerators": ", ".join(device.name for device in self.accelerators),
            "cpu": self.machine["cpu"],
            "version": self.build["version"],
            "llama_cpp_commit": self.build["llama_cpp_commit"],
        }
        return cells


def _size(size: int | None) -> str:
    return "-" if size is None else format_size(size) if size >= 0 else f"-{format_size(-size)}"


def _test_name(kind: Literal["prompt", "decode"], speeds: Sequence[Speed | None]) -> str:
    runs = [getattr(speed, kind) for speed in speeds if speed is not None]
    counts = sorted({tokens for run in runs if run is not None for tokens in run.tokens})
    return f"{kind} {'/'.join(map(str, counts))}, tokens/s"


def _spread(name: str, spread: Spread | None) -> dict[str, Cell]:
    names = ("mean", "stdev", "median", "min", "max")
    figures = spread.to_dict() if spread is not None else dict.fromkeys(names)
    return {f"{name}_{key}": figure for key, figure in figures.items()}  # type: ignore[misc]


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
