"""The heatmap of a routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._files import check_writable, written_whole
from .errors import InvalidOptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .model import StrPath
    from .routing import RoutingTrace

_NEEDS = "plot() needs matplotlib: pip install 'llama-moe[plot]'"


def check_plot(path: StrPath) -> str:
    """The format of an image that `plot()` can write.

    Raises:
        ImportError: matplotlib is not installed.
        InvalidOptionError: it knows no such format.
        OSError: the file could not be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    known = FigureCanvasAgg.get_supported_filetypes()
    if suffix not in known:
        raise InvalidOptionError(f"{str(path)!r} has the suffix '.{suffix}'; an image can be {', '.join(sorted(known))}")
    check_writable(path)
    return suffix


def plot(trace: RoutingTrace, path: StrPath | None, *, title: str | None) -> Figure:
    """See `RoutingTrace.plot()`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NEEDS) from error

    suffix = None if path is None else check_plot(path)
    experts, layers = trace.expert_count, trace.layers
    load = trace.shares[list(layers)] * (experts / trace.experts_used)
    # Cells of about the same size whatever the model, within what a page shows.
    size = (min(max(experts * 0.11 + 2.5, 6.0), 24.0), min(max(len(layers) * 0.16 + 1.5, 3.5), 20.0))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(load, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0.0, vmax=max(2.0, float(load.max(initial=0.0))))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(_ticks(experts, 16))
    rows = _ticks(len(layers), 24)
    axes.set_yticks(rows, labels=[str(layers[row]) for row in rows])
    axes.set_title(f"Expert load over {trace.tokens:,} tokens" if title is None else title)
    bar = figure.colorbar(image, ax=axes, label="load (1 = all experts alike)")
    bar.ax.axhline(1.0, color="white", linewidth=2.0)
    if path is not None:
        with written_whole(path) as partial:
            figure.savefig(partial, format=suffix)
    return figure


def _ticks(count: int, most: int) -> list[int]:
    """At most about so many places to label, at round distances."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1 << 16) if count <= step * most)
    return list(range(0, count, step))
