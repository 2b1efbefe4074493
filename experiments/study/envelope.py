"""The picture of a study: error against bytes, with a line for each size of network."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fitsmall.experiments.run.metric_format import describe_metric
from fitsmall.experiments.run.plot_style import INK, as_text, set_log_axes, set_title, style_axes
from fitsmall.experiments.study.analysis import Study
from fitsmall.experiments.study.points import Point

__all__ = ["draw_envelopes", "size_colours"]

_MARKERS = {"dense": "o", "tuned": "s", "not tuned": "x"}


def size_colours(count: int) -> list[str]:
    """Colours for sizes, from small to large.

    Example:
        >>> size_colours(2)
        ['#440154', '#bddf26']
    """
    return [colors.to_hex(c) for c in colormaps["viridis"](np.linspace(0, 0.9, count))]


def draw_envelopes(study: Study, path: Path) -> None:
    """Draw all points of a study, and the envelope of each size.

    Args:
        study: The study.
        path: Picture to write; its suffix chooses the format.
    """
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    set_title(
        axes,
        f"{describe_metric(study.metric).capitalize()} against bytes, under one budget",
        "a line for each size, with 95 % intervals; circles: dense, squares: tuned, crosses: not",
    )
    for size, colour in zip(study.sizes, size_colours(len(study.sizes)), strict=True):
        envelope = study.envelope(size)
        _draw_envelope(axes, envelope, colour, as_text(size))
        others = [p for p in study.points if p.size == size and p not in envelope]
        _draw_points(axes, others, colour, 0.35)
    set_log_axes(axes, study.metric, ticks=(1, 1.2, 1.5, 2, 3, 4, 5, 7))
    # Intervals of few seeds are wide, and would leave little room for the points.
    axes.set_ylim(top=1.15 * max(point.mean() for point in study.points))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, title="size", title_fontsize=9)
    figure.savefig(path)


def _draw_envelope(axes: Axes, points: list[Point], colour: str, label: str) -> None:
    sizes = np.array([point.mean("bytes") for point in points])
    errors = np.array([point.mean() for point in points])
    axes.plot(sizes, errors, color=colour, linewidth=1.6, label=label)
    margins = np.array([point.margin() for point in points])
    is_known = np.isfinite(margins)  # from two seeds on
    low = np.maximum(errors - margins, errors / 2)  # positive, for a logarithmic axis
    high = errors + margins
    axes.fill_between(sizes, low, high, where=is_known, color=colour, alpha=0.12, linewidth=0)
    _draw_points(axes, points, colour, 1.0)


def _draw_points(axes: Axes, points: list[Point], colour: str, alpha: float) -> None:
    for kind, marker in _MARKERS.items():
        chosen = [point for point in points if point.kind == kind]
        x, y = [p.mean("bytes") for p in chosen], [p.mean() for p in chosen]
        axes.scatter(x, y, marker=marker, color=colour, s=34, alpha=alpha, linewidths=1.2)
