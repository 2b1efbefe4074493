"""The style that all pictures share: colours, axes, titles, units."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fitsmall.compressors.naming import printable
from fitsmall.experiments.run.metric_format import display_factor

__all__ = [
    "FAINT",
    "GRID",
    "INK",
    "as_text",
    "format_bytes",
    "set_log_axes",
    "set_title",
    "style_axes",
]

INK, FAINT, GRID = "#22262e", "#8b929e", "#eceef1"


def style_axes(axes: Axes) -> None:
    """Leave two thin axes, left and below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)


def as_text(name: str) -> str:
    """A name that Matplotlib does not take for mathematics, without control characters.

    Example:
        >>> print(as_text("$x^2$"))
        \\$x^2\\$
    """
    return printable(name).replace("$", r"\$")


def set_title(axes: Axes, title: str, subtitle: str) -> None:
    """Write a title, and below it a smaller line that explains the axes."""
    axes.set_title(as_text(title), loc="left", pad=26, fontsize=14, fontweight="bold", color=INK)
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        color=FAINT,
    )


def set_log_axes(axes: Axes, metric: str, ticks: Sequence[float]) -> None:
    """Make both axes logarithmic: bytes from left to right, a metric from below to above.

    Args:
        axes: Axes of values as they are logged, errors as fractions.
        metric: Name of the metric.
        ticks: Multiples of each power of ten that the vertical axis shows.
    """
    factor = display_factor(metric)
    unit = " %" if factor == 100 else ""
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    smallest, largest = axes.get_xlim()
    few = largest < 10 * smallest  # within a decade LogLocator's labels overlap
    axes.xaxis.set_major_locator(MaxNLocator(5) if few else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:.3g}{unit}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("size of the file", color=INK, fontsize=10)


def format_bytes(count: float) -> str:
    """A number of bytes in the largest decimal unit that it fills.

    Example:
        >>> format_bytes(512), format_bytes(6412), format_bytes(202440), format_bytes(1066440)
        ('512 B', '6.41 KB', '202 KB', '1.07 MB')
    """
    for unit, size in (("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
