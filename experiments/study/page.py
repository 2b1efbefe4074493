"""The page of a study: one file that opens without a network."""

import shlex
from html import escape
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fitsmall.experiments.run.units import words
from fitsmall.experiments.study.charts import heat_map, pareto, timeline
from fitsmall.experiments.study.markdown import facts
from fitsmall.experiments.study.points import Study
from fitsmall.experiments.study.sheet import Sheet

__all__ = ["page"]


def page(
    study: Study, sheets: list[Sheet], conclusions: list[str], checklist: list[tuple[str, bool]]
) -> str:
    """The page as HTML.

    Args:
        study: What its charts show.
        sheets: Its tables.
        conclusions: Sentences at its top.
        checklist: What a comparison should have, and whether this one does.
    """
    points = [point for _, points in study.budgets for point in points]
    runs = [run for point in points for _, run in sorted(point.runs.items())]
    commands = "\n".join(shlex.join(["fitsmall", "train", *run["overrides"]]) for run in runs)
    return _PAGE.substitute(
        plotly=get_plotlyjs(),
        name=escape(words(study.metric).capitalize()),
        facts=escape(facts(study)),
        conclusions="".join(f"<li>{escape(line)}</li>" for line in conclusions),
        pareto=_chart(pareto(study), "pareto"),
        timeline=_chart(timeline(study), "timeline"),
        heat=_chart(heat_map(study), "heat"),
        largest=escape(study.sizes[-1]),
        tables="".join(_table(sheet) for sheet in sheets),
        checklist="".join(
            f'<li class="{"yes" if met else "no"}">{escape(text)}</li>' for text, met in checklist
        ),
        commands=escape(commands),
    )


def _chart(figure: go.Figure, name: str) -> str:
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return html


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in sheet.head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows
    )
    return (
        f"<section><h2>{escape(sheet.title)}</h2><p>{escape(sheet.note)}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></section>"
    )


_PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
