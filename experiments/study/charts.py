"""The interactive charts of a study's page."""

import math
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from fitsmall.experiments.run.curves import step_curve
from fitsmall.experiments.run.metric_format import (
    describe_metric,
    display_factor,
    format_metric,
)
from fitsmall.experiments.run.plot_style import FAINT, GRID, INK
from fitsmall.experiments.study.analysis import LARGE, Study
from fitsmall.experiments.study.envelope import size_colours
from fitsmall.experiments.study.points import Point

__all__ = ["bits_heat_map", "pareto_chart", "training_chart"]

_SYMBOLS = {"dense": "circle", "tuned": "square", "not tuned": "x-thin"}


def pareto_chart(study: Study) -> go.Figure:
    """Test error against bytes: all points, and the envelope of each size with its intervals."""
    figure = _figure("size of the file, bytes", describe_metric(study.metric))
    factor = display_factor(study.metric)
    for size, colour in zip(study.sizes, size_colours(len(study.sizes)), strict=True):
        envelope = study.envelope(size)
        x = [point.mean("bytes") for point in envelope]
        y = [factor * point.mean() for point in envelope]
        margins = [factor * point.margin() for point in envelope]
        if all(map(math.isfinite, margins)):
            low = [max(b - m, b / 2) for b, m in zip(y, margins, strict=True)]
            high = [b + m for b, m in zip(y, margins, strict=True)]
            figure.add_scatter(
                x=[*x, *x[::-1]],
                y=[*high, *low[::-1]],
                mode="lines",
                fill="toself",
                fillcolor=colour,
                opacity=0.13,
                line={"width": 0},
                hoverinfo="skip",
                legendgroup=escape(size),
                showlegend=False,
            )
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": colour, "width": 2},
            hoverinfo="skip",
            name=escape(size),
            legendgroup=escape(size),
        )
        own = [point for point in study.points if point.size == size]
        figure.add_scatter(
            x=[point.mean("bytes") for point in own],
            y=[factor * point.mean() for point in own],
            mode="markers",
            marker={
                "color": colour,
                "size": 9,
                "symbol": [_SYMBOLS[point.kind] for point in own],
                "line": {"color": colour, "width": 2},
            },
            customdata=[[escape(point.name), escape(_describe(study, point))] for point in own],
            hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<extra></extra>",
            legendgroup=escape(size),
            showlegend=False,
            meta="points",
        )
    figure.update_xaxes(type="log", dtick="D2", exponentformat="SI")
    figure.update_yaxes(type="log", dtick="D2", ticksuffix=" %" if factor == 100 else "")
    return figure


def training_chart(study: Study) -> go.Figure:
    """Validation error against floating-point operations spent on training.

    Each size has two curves, of its dense network and of its best fine-tuned one that is
    :data:`~fitsmall.experiments.study.analysis.LARGE` times smaller or more.
    """
    figure = _figure("floating-point operations spent", f"held-out {describe_metric(study.metric)}")
    factor = display_factor(study.metric)
    for size, colour in zip(study.sizes, size_colours(len(study.sizes)), strict=True):
        own = [point for point in study.points if point.size == size]
        small = [p for p in own if p.fine_tune and p.mean("ratio") >= LARGE]
        best = min(small, key=lambda point: point.mean("error_validation"), default=None)
        for point, dash in ((study.dense_point(size), "solid"), (best, "dot")):
            if point is None:
                continue
            run = point.runs[min(point.runs)]
            curve = step_curve(Path(run["folder"]) / "metrics.csv", study.metric)
            if run["steps_before"] and not point.is_dense:
                before = step_curve(Path(run["init"]).with_name("metrics.csv"), study.metric)
                curve = before + [(run["steps_before"] + step, error) for step, error in curve]
            figure.add_scatter(
                x=[step * run["flops_per_step"] for step, _ in curve],
                y=[factor * error for _, error in curve],
                mode="lines",
                line={"color": colour, "width": 2, "dash": dash},
                name=escape(point.name),
                hovertemplate="%{fullData.name}<br>%{y:.3g} after %{x:.3g}<extra></extra>",
            )
    figure.update_yaxes(type="log", dtick="D2", ticksuffix=" %" if factor == 100 else "")
    return figure


def bits_heat_map(study: Study) -> go.Figure:
    """Bits per weight in the files of the largest network, by tensor and compression."""
    largest = study.sizes[-1]
    own = [point for point in study.points if point.size == largest]
    own.sort(key=lambda point: -point.mean("bytes"))
    runs = [point.runs[min(point.runs)] for point in own]
    layers = [name for name, layer in runs[0]["layers"].items() if layer["weights"] > 1]
    bits = [
        [
            8 * run["layers"][name]["bytes"] / run["layers"][name]["weights"]
            if name in run["layers"]
            else None
            for run in runs
        ]
        for name in layers
    ]
    names = [escape(point.name.removeprefix(f"{largest}: ")) for point in own]
    figure = _figure("", "")
    figure.add_heatmap(
        z=bits,
        x=names,
        y=[escape(name.removeprefix("net.")) for name in layers],
        colorscale="Viridis",
        zmin=0,
        colorbar={"title": {"text": "bits a weight"}, "thickness": 12},
        hovertemplate="%{y}<br>%{x}<br>%{z:.2f} bits a weight<extra></extra>",
        xgap=1,
        ygap=1,
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_layout(height=max(320, 90 + 18 * len(layers)))
    return figure


def _figure(x: str, y: str) -> go.Figure:
    axis = {"gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
            "height": 480,
        }
    )


def _describe(study: Study, point: Point) -> str:
    margin = point.margin()
    around = "" if math.isinf(margin) else f" ± {format_metric(study.metric, margin)}"
    folders = "<br>".join(run["folder"] for _, run in sorted(point.runs.items()))
    return (
        f"{format_metric(study.metric, point.mean())}{around} in {point.mean('bytes'):,.0f} bytes, "
        f"{point.mean('ratio'):.1f} times smaller<br>{folders}"
    )
