"""The picture of a study: error against bytes, a line for each size of network."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fitsmall.experiments.run.figures import INK, size_of, style, title
from fitsmall.experiments.run.units import scale, words
from fitsmall.experiments.study.points import Point, Study

__all__ = ["draw", "palette"]

_MARKERS = {"dense": "o", "tuned": "s", "not tuned": "x"}


def palette(count: int) -> list[str]:
    """Colours of sizes, from small to large.

    Example:
        >>> palette(2)
        ['#440154', '#bddf26']
    """
    return [colors.to_hex(c) for c in colormaps["viridis"](np.linspace(0, 0.9, count))]


def draw(study: Study, path: Path) -> None:
    """Draw the study into a picture, whose kind the name says."""
    figure = Figure(figsize=(10, 6.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    style(axes)
    title(
        axes,
        f"{words(study.metric).capitalize()} against bytes, under one budget",
        "a line for each size, with 95 % intervals; circles: dense, squares: tuned, crosses: not",
    )
    for size, colour in zip(study.sizes, palette(len(study.sizes)), strict=True):
        envelope = study.envelope(size)
        _draw(axes, study, envelope, colour, size)
        others = [p for p in study.points if p.size == size and p not in envelope]
        _scatter(axes, study, others, colour, 0.35)
    axes.set_xscale("log")
    axes.set_yscale("log")
    # Intervals of few seeds are wide, and would leave little of the picture to the points.
    axes.set_ylim(top=1.15 * scale(study.metric) * max(point.mean() for point in study.points))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_of(value)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 7)))
    unit = " %" if scale(study.metric) == 100 else ""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{unit}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("size of the file", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, title="size", title_fontsize=9)
    figure.savefig(path)


def _draw(axes: Axes, study: Study, points: list[Point], colour: str, label: str) -> None:
    factor = scale(study.metric)
    sizes = np.array([point.mean("bytes") for point in points])
    errors = factor * np.array([point.mean() for point in points])
    axes.plot(sizes, errors, color=colour, linewidth=1.6, label=label)
    spread = factor * np.array([point.interval() for point in points])
    known = np.isfinite(spread)  # from two seeds on
    low = np.maximum(errors - spread, errors / 2)  # which a logarithm needs
    high = errors + spread
    axes.fill_between(sizes, low, high, where=known, color=colour, alpha=0.12, linewidth=0)
    _scatter(axes, study, points, colour, 1.0)


def _scatter(axes: Axes, study: Study, points: list[Point], colour: str, alpha: float) -> None:
    factor = scale(study.metric)
    for kind, marker in _MARKERS.items():
        chosen = [point for point in points if point.kind == kind]
        x, y = [p.mean("bytes") for p in chosen], [factor * p.mean() for p in chosen]
        axes.scatter(x, y, marker=marker, color=colour, s=34, alpha=alpha, linewidths=1.2)
