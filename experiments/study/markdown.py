"""The report of a study as a document, to be kept beside the code."""

from datetime import date

from fitsmall.experiments.study.points import Study, amount
from fitsmall.experiments.study.sheet import Sheet

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
    """How much was run, and on what, with what, and when."""
    groups = [[r for point in points for r in point.runs.values()] for _, points in study.budgets]
    runs = [run for group in groups for run in group]
    others = f", and {len(runs) - len(groups[0])} runs under others" if groups[1:] else ""
    made = [run["provenance"] for run in runs]
    machines, software = (sorted({m[key] for m in made}) for key in ("machine", "software"))
    dates = [date.fromisoformat(d) for d in sorted({m["date"] for m in made})]
    first, last = (f"{day:%d %B %Y}" for day in (dates[0], dates[-1]))
    return (
        f"{len(study.points)} points, {len(groups[0])} runs under a budget of "
        f"{amount(study.budget)}, at least {study.seeds} of each{others}. Run on "
        f"{' and '.join(machines)} with {' and '.join(software)}; "
        f"{first if first == last else f'{first} to {last}'}."
    )
