"""The simplest picture of a study: networks as they are, and compressed in one way.

python -m fitsmall.experiments.study.before_after docs/results/digits_mlp/points.csv \
    --compression '80 % zeros, 4 bits' --title 'Seven networks for handwritten digits' \
    -o docs/size_and_error.svg
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fitsmall.experiments.run.metric_format import format_metric
from fitsmall.experiments.run.plot_style import (
    INK,
    format_bytes,
    set_log_axes,
    set_title,
    style_axes,
)

__all__ = ["Mark", "draw_before_after", "read_marks"]

_DENSE, _COMPRESSED, _ARROW = "#6b7280", "#b8322a", "#c4c9d1"


class Mark(NamedTuple):
    """A network in the picture, over all seeds.

    Args:
        bytes: Mean size of its file.
        error: Mean test error.
        low: Least test error.
        high: Largest test error.
    """

    bytes: float
    error: float
    low: float
    high: float


def read_marks(
    rows: Iterable[Mapping[str, str]], compression: str, budget: str
) -> list[tuple[Mark, Mark]]:
    """Return each network as it is and compressed, from small to large.

    Args:
        rows: Lines of a study's ``points.csv``, one for each run.
        compression: Label of the compression. Runs are taken that trained during it.
        budget: Label of the budget; runs under others are left out.

    Raises:
        ValueError: No network has runs of both kinds.

    Example:
        >>> run = {"budget": "10 steps", "size": "width 4", "seed": "0", "error": "0.5"}
        >>> dense = {"compression": "none", "fine_tune": "False", "bytes": "80"}
        >>> small = {"compression": "4 bits", "fine_tune": "True", "bytes": "10"}
        >>> [(before, after)] = read_marks([run | dense, run | small], "4 bits", "10 steps")
        >>> before.bytes, after.bytes
        (80.0, 10.0)
    """
    runs: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        kind = row["compression"], row["fine_tune"]
        if row["budget"] == budget and kind in (("none", "False"), (compression, "True")):
            runs[row["size"], row["compression"]].append(row)
    sizes = {size for size, kind in runs if kind == "none" and (size, compression) in runs}
    if not sizes:
        raise ValueError(
            f"no network has runs under a budget of {budget}, as it is and with {compression}"
        )
    pairs = [(_mark(runs[size, "none"]), _mark(runs[size, compression])) for size in sizes]
    return sorted(pairs, key=lambda pair: pair[0].bytes)


def _mark(runs: list[Mapping[str, str]]) -> Mark:
    errors = [float(run["error"]) for run in runs]
    size = statistics.fmean(float(run["bytes"]) for run in runs)
    return Mark(size, statistics.fmean(errors), min(errors), max(errors))


def draw_before_after(
    pairs: list[tuple[Mark, Mark]], compression: str, title: str, path: Path, metric: str = "error"
) -> None:
    """Draw error against bytes of networks as they are and compressed.

    Args:
        pairs: Networks, as :func:`read_marks` returns them.
        compression: Label of the compression.
        title: Title of the picture.
        path: Picture to write; its suffix chooses the format.
        metric: Name of the error.
    """
    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    style_axes(axes)
    set_title(axes, title, "test error against the size of the file; bars span the seeds")
    for before, after in pairs:
        axes.annotate(
            "",
            (after.bytes, after.error),
            (before.bytes, before.error),
            arrowprops={"arrowstyle": "->", "color": _ARROW, "linewidth": 0.8, "shrinkB": 5},
        )
    _draw_line(axes, [before for before, _ in pairs], _DENSE, "trained as they are")
    label = f"compressed while they trained: {compression}"
    _draw_line(axes, [after for _, after in pairs], _COMPRESSED, label)
    before, after = pairs[-1]
    for mark, height, offset, colour in (
        (before, before.high, 9, _DENSE),
        (after, after.low, -18, _COMPRESSED),
    ):
        axes.annotate(
            f"{format_bytes(mark.bytes)}, {format_metric(metric, mark.error, 1)}",
            (mark.bytes, height),
            (0, offset),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=colour,
        )
    axes.margins(x=0.09, y=0.12)
    set_log_axes(axes, metric, ticks=(1, 2, 5))
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    with matplotlib.rc_context({"svg.hashsalt": "fitsmall"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_line(axes: Axes, marks: list[Mark], colour: str, label: str) -> None:
    axes.errorbar(
        [mark.bytes for mark in marks],
        [mark.error for mark in marks],
        yerr=[[m.error - m.low for m in marks], [m.high - m.error for m in marks]],
        color=colour,
        linewidth=2,
        marker="o",
        markersize=6,
        elinewidth=1,
        label=label,
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("points", type=Path, help="points.csv of a study's report")
    parser.add_argument("--compression", required=True, help="label of the compression")
    parser.add_argument("--budget", default="2,000 steps", help="label of the budget")
    parser.add_argument("--title", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    options = parser.parse_args()
    with open(options.points, newline="") as file:
        pairs = read_marks(csv.DictReader(file), options.compression, options.budget)
    draw_before_after(pairs, options.compression, options.title, options.output)


if __name__ == "__main__":
    _main()
