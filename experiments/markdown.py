"""The report of a study as a document, to be kept beside the code."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version

from pressfit.experiments.budget import AMOUNTS
from pressfit.experiments.sheet import Sheet
from pressfit.experiments.study import Study

__all__ = ["facts", "markdown"]


def markdown(
    study: Study, sheets: list[Sheet], conclusions: list[str], checklist: list[tuple[str, bool]]
) -> str:
    """The report as Markdown, beside ``envelope.svg``.

    Args:
        study: What it is about.
        sheets: Its tables.
        conclusions: Sentences at its top.
        checklist: What a comparison should have, and whether this one does.
    """
    parts = [
        "\n".join(f"- {line}" for line in conclusions),
        facts(study),
        "![Error against bytes](envelope.svg)",
        *(sheet.markdown() for sheet in sheets),
        "### What a comparison should have (ShrinkBench)",
        "\n".join(f"- [{'x' if met else ' '}] {text}" for text, met in checklist),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def facts(study: Study) -> str:
    """How much was run, and what has reported it, and when: runs can be of other machines."""
    runs = sum(len(point.runs) for point in study.points)
    (budget,) = (f"{study.budget[a]:,.6g} {a}" for a in AMOUNTS if study.budget[a] is not None)
    return (
        f"{len(study.points)} points, {runs} runs, at least {study.seeds} of each, a budget of "
        f"{budget}. Reported by pressfit {version('pressfit')}, torch {version('torch')}, Python "
        f"{platform.python_version()}, {platform.machine()}; "
        f"{datetime.now(UTC).strftime('%d %B %Y')}."
    )
