"""The picture of a run: error against bytes while it trained, bytes by layer, ranks and widths."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from fitsmall.compressors import Report
from fitsmall.experiments.run.curves import layer_curves, size_curve
from fitsmall.experiments.run.metric_format import describe_metric, format_metric
from fitsmall.experiments.run.plot_style import (
    GRID,
    INK,
    as_text,
    format_bytes,
    set_log_axes,
    set_title,
    style_axes,
)

__all__ = ["draw_run"]

MARK = "#b8322a"
PARTS = {"positions": "#2a5c8a", "values": "#e08e45", "codebooks, biases": "#7fb58a"}
HEADER = "#b9bec7"

_MAX_ROWS = 20  # more layers than these cannot be read


def draw_run(
    path: Path,
    report: Report,
    metrics: Path,
    marks: dict[str, tuple[float, float]],
    metric: str = "error",
) -> None:
    """Draw a run into a PNG: its curve, the bytes of each layer, and ranks and widths it learned.

    Args:
        path: PNG to write.
        report: Sizes of the compressed file.
        metrics: The run's ``metrics.csv``.
        marks: Bytes and error of each network that was measured after training, by its label.
        metric: Name of the error.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.06)
    ranks = layer_curves(metrics, "rank")
    units, kept = layer_curves(metrics, "units"), layer_curves(metrics, "kept")
    panels = [1.15, 1, *[1] * (bool(ranks) + bool(kept))]
    figure = Figure(figsize=(5.6 * sum(panels), 5.2), dpi=150, layout=layout)
    every = figure.subplots(1, len(panels), width_ratios=panels)
    for axes in every:
        style_axes(axes)
    _draw_curve(every[0], size_curve(metrics, metric), marks, metric)
    _draw_bytes(every[1], report)
    if ranks:
        _draw_ranks(every[2], ranks)
    if kept:
        _draw_widths(figure, every[-1], units, kept)
    figure.savefig(path)


def _draw_curve(
    axes: Axes,
    points: list[tuple[float, float]],
    marks: dict[str, tuple[float, float]],
    metric: str,
) -> None:
    name = describe_metric(metric)
    heading = f"{name.capitalize()} against bytes"
    set_title(axes, heading, f"held-out {name} after each epoch, from dark to light")
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
            f"{as_text(name)}\n{format_bytes(size)}, {format_metric(metric, error)}",
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
    axes.margins(x=0.12, y=0.08)
    set_log_axes(axes, metric, ticks=(1, 1.5, 2, 3, 5))


def _draw_bytes(axes: Axes, report: Report) -> None:
    set_title(
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
    if len(layers) > _MAX_ROWS:
        sizes = sorted(layers, key=lambda name: sum(layers[name]))
        smallest = sizes[: len(layers) - _MAX_ROWS + 1]
        merged = [
            sum(parts) for parts in zip(*(layers.pop(name) for name in smallest), strict=True)
        ]
        layers[f"{len(smallest)} others"] = merged
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
    axes.set_yticks(rows, [as_text(name) for name in names])
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("bytes", color=INK, fontsize=10)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_ranks(axes: Axes, ranks: dict[str, list[float]]) -> None:
    set_title(axes, "Ranks", "of layers that become two, after each epoch")
    factored = {name: values for name, values in ranks.items() if any(values)}
    colours = colormaps["viridis"](np.linspace(0, 0.9, max(1, len(factored))))
    for (name, values), colour in zip(factored.items(), colours, strict=True):
        heights = np.where(np.array(values) > 0, values, np.nan)
        axes.plot(np.arange(1, len(values) + 1), heights, color=colour, label=as_text(name))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    axes.grid(color=GRID, linewidth=0.8)
    if factored:
        axes.legend(
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
        )


def _draw_widths(
    figure: Figure, axes: Axes, units: dict[str, list[float]], kept: dict[str, list[float]]
) -> None:
    set_title(axes, "Widths", "fraction of channels, heads and units kept, after each epoch")
    # Layers that lost most, in the order of the network.
    shown = set(sorted(kept, key=lambda name: kept[name][-1])[:_MAX_ROWS])
    rows = [name for name in kept if name in shown]
    image = np.array([kept[name] for name in rows])
    drawn = axes.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=1,
        extent=(0.5, image.shape[1] + 0.5, len(rows) - 0.5, -0.5),
    )
    last = {name: (units[name][-1], units[name][-1] / kept[name][-1]) for name in rows}
    labels = [f"{as_text(n)}   {before:.0f} to {now:.0f}" for n, (now, before) in last.items()]
    axes.set_yticks(np.arange(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=INK, fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02)
