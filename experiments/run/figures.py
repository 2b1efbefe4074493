"""The picture of a run: error against bytes while it trained, and where the bytes went."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fitsmall.compressors import Report
from fitsmall.experiments.run.units import scale, shown, words

__all__ = ["curve", "draw", "logged", "ranks", "size_of", "style", "title"]

INK, FAINT, MARK = "#22262e", "#8b929e", "#b8322a"
PARTS = {"positions": "#2a5c8a", "values": "#e08e45", "codebooks, biases": "#7fb58a"}
HEADER = "#b9bec7"

_RANK = "compression/rank/"
_ROWS = 20  # of layers, that can be read


def curve(metrics: Path, metric: str = "error") -> list[tuple[float, float]]:
    """Estimated bytes and held-out error after each epoch, from a ``metrics.csv``.

    Empty if there is no such file: a run may log elsewhere.
    """
    keys = ("compression/bytes", f"val/{metric}")
    rows = _epochs(metrics)
    points = (tuple(row[key] for key in keys) for row in rows if row.keys() >= {*keys})
    return [(size, error) for size, error in points]


def ranks(metrics: Path) -> dict[str, list[float]]:
    """The rank of each layer after each epoch, 0 for one that is cheaper as it is."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in _epochs(metrics):
        for key, value in row.items():
            name, prefix, layer = key.rpartition(_RANK)
            if prefix and not name:
                found[layer.removesuffix(".weight").removeprefix("net.")].append(value)
    return dict(found)


def _epochs(metrics: Path) -> list[dict[str, float]]:
    """What was logged in each epoch."""
    epochs: dict[float, dict[str, float]] = defaultdict(dict)
    for row in logged(metrics):
        # A row holds what was logged together, and an epoch has several.
        epochs[row["epoch"]] |= row
    return list(epochs.values())


def logged(metrics: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``, without empty cells; none if there is no such file."""
    if not metrics.is_file():
        return []
    with open(metrics, newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]


def draw(
    path: Path,
    report: Report,
    metrics: Path,
    marks: dict[str, tuple[float, float]],
    metric: str = "error",
) -> None:
    """Draw a run into a PNG.

    Args:
        path: Picture to write.
        report: What the compressed file holds.
        metrics: The run's ``metrics.csv``.
        marks: Bytes and error of what was measured at the end, by what to call it.
        metric: Name of the error.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    learned = ranks(metrics)
    panels = [1.15, 1, 1] if learned else [1.15, 1]
    figure = Figure(figsize=(5.6 * sum(panels), 5.2), dpi=150, layout=layout)
    every = figure.subplots(1, len(panels), width_ratios=panels)
    for axes in every:
        style(axes)
    _draw_curve(every[0], curve(metrics, metric), marks, metric)
    _draw_bytes(every[1], report)
    if learned:
        _draw_ranks(every[2], learned)
    figure.savefig(path)


def _draw_curve(
    axes: Axes,
    points: list[tuple[float, float]],
    marks: dict[str, tuple[float, float]],
    metric: str,
) -> None:
    name = words(metric)
    heading = f"{name.capitalize()} against bytes"
    title(axes, heading, f"held-out {name} after each epoch, from dark to light")
    if points:
        sizes, errors = np.array(points).T
        axes.plot(sizes, errors, color=HEADER, linewidth=0.8, zorder=1)
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(points)))
        axes.scatter(sizes, errors, c=colours, s=24, zorder=2, linewidths=0)
    largest = max(size for size, _ in marks.values())
    for name, (size, error) in marks.items():
        outwards = "right" if size == largest and len(marks) > 1 else "left"
        axes.scatter(size, error, marker="D", s=64, color=MARK, zorder=3, linewidths=0)
        axes.annotate(
            f"{name}\n{size_of(size)}, {shown(metric, error)}",
            (size, error),
            (8 if outwards == "right" else -8, 12),
            textcoords="offset points",
            ha=outwards,
            color=MARK,
            fontsize=9.5,
            fontweight="bold",
            path_effects=[withStroke(linewidth=4, foreground="white")],
            zorder=4,
        )
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    axes.margins(x=0.12, y=0.08)
    axes.grid(color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    written = "{:.3g} %" if scale(metric) == 100 else "{:.3g}"
    for axis, text, factor, subs in (
        (axes.xaxis, size_of, 1.0, (1, 2, 5)),
        (axes.yaxis, written.format, scale(metric), (1, 1.5, 2, 3, 5)),
    ):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _, text=text, factor=factor: text(factor * value))
        )
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("size of the file", color=INK, fontsize=10)


def _draw_bytes(axes: Axes, report: Report) -> None:
    title(
        axes,
        f"Where the {report.total:,} bytes went",
        f"{report.ratio:.0f} times smaller than the {report.bytes_dense:,} they restore",
    )
    layers: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in report.tensors:
        layer, _, kind = tensor.name.rpartition(".")
        parts = layers[layer.removeprefix("net.") or tensor.name]
        if kind == "bias":
            parts[2] += tensor.bytes
        else:
            parts[0] += tensor.position_bytes
            parts[1] += tensor.value_bytes
            parts[2] += tensor.float_bytes
    if len(layers) > _ROWS:
        sizes = sorted(layers, key=lambda name: sum(layers[name]))
        few = sizes[: len(layers) - _ROWS + 1]
        together = [sum(parts) for parts in zip(*(layers.pop(name) for name in few), strict=True)]
        layers[f"{len(few)} others"] = together
    names = [*layers, "header"]
    rows = np.arange(len(names))[::-1]
    starts = np.zeros(len(layers))
    for (part, colour), widths in zip(PARTS.items(), np.array([*layers.values()]).T, strict=True):
        axes.barh(rows[:-1], widths, left=starts, height=0.62, color=colour, label=part)
        starts += widths
    axes.barh(rows[-1:], report.overhead, height=0.62, color=HEADER)
    for row, total in zip(rows, [*starts, report.overhead], strict=True):
        share = f"{total:,.0f}   {100 * total / report.total:.0f} %"
        axes.annotate(
            share,
            (total, row),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    axes.set_yticks(rows, names)
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("bytes", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_ranks(axes: Axes, learned: dict[str, list[float]]) -> None:
    title(axes, "Ranks", "of layers that become two, after each epoch")
    shown = {name: values for name, values in learned.items() if any(values)}
    colours = colormaps["viridis"](np.linspace(0, 0.9, max(1, len(shown))))
    for (name, values), colour in zip(shown.items(), colours, strict=True):
        heights = np.where(np.array(values) > 0, values, np.nan)
        axes.plot(np.arange(1, len(values) + 1), heights, color=colour, label=name)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    axes.grid(color="#eceef1", linewidth=0.8)
    if shown:
        axes.legend(
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )


def style(axes: Axes) -> None:
    """Two thin axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)


def title(axes: Axes, text: str, subtitle: str) -> None:
    """A title, and below it what it means."""
    axes.set_title(text, loc="left", pad=26, fontsize=14, fontweight="bold", color=INK)
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        color=FAINT,
    )


def size_of(count: float) -> str:
    """Bytes in the largest unit that leaves a whole number.

    Example:
        >>> size_of(512), size_of(6412), size_of(202440), size_of(1066440)
        ('512 B', '6.41 KB', '202 KB', '1.07 MB')
    """
    for unit, size in (("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
