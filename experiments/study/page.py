"""The report of a study as one HTML file, which opens without a network."""

import shlex
from html import escape
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fitsmall.experiments.run.metric_format import describe_metric
from fitsmall.experiments.study.analysis import Study
from fitsmall.experiments.study.charts import bits_heat_map, pareto_chart, training_chart
from fitsmall.experiments.study.markdown import describe_runs
from fitsmall.experiments.study.report_table import ReportTable

__all__ = ["render_page"]

_PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def render_page(
    study: Study,
    tables: list[ReportTable],
    conclusions: list[str],
    checklist: list[tuple[str, bool]],
) -> str:
    """The page as HTML.

    Args:
        study: The study, for the charts.
        tables: Its tables.
        conclusions: Sentences for the top.
        checklist: Requirements of a comparison, and whether the study meets them.
    """
    points = [point for _, points in study.budgets for point in points]
    runs = [run for point in points for _, run in sorted(point.runs.items())]
    commands = "\n".join(shlex.join(["fitsmall", "train", *run["overrides"]]) for run in runs)
    return _PAGE.substitute(
        plotly=get_plotlyjs(),
        name=escape(describe_metric(study.metric).capitalize()),
        facts=escape(describe_runs(study)),
        conclusions="".join(f"<li>{escape(line)}</li>" for line in conclusions),
        pareto=_render_chart(pareto_chart(study), "pareto"),
        timeline=_render_chart(training_chart(study), "timeline"),
        heat=_render_chart(bits_heat_map(study), "heat"),
        largest=escape(study.sizes[-1]),
        tables="".join(_render_table(table) for table in tables),
        checklist="".join(
            f'<li class="{"yes" if met else "no"}">{escape(text)}</li>' for text, met in checklist
        ),
        commands=escape(commands),
    )


def _render_chart(figure: go.Figure, name: str) -> str:
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return html


def _render_table(table: ReportTable) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f"<section><h2>{escape(table.title)}</h2><p>{escape(table.note)}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></section>"
    )
