"""The report of a study as a Markdown document."""

from datetime import date

from fitsmall.experiments.study.analysis import Study, format_budget
from fitsmall.experiments.study.report_table import ReportTable, escape_markdown

__all__ = ["describe_runs", "render_markdown"]


def render_markdown(
    study: Study,
    tables: list[ReportTable],
    conclusions: list[str],
    checklist: list[tuple[str, bool]],
) -> str:
    """The document, which shows ``envelope.svg`` from its own folder.

    Args:
        study: The study.
        tables: Its tables.
        conclusions: Sentences for the top.
        checklist: Requirements of a comparison, and whether the study meets them.
    """
    parts = [
        "\n".join(f"- {escape_markdown(line)}" for line in conclusions),
        escape_markdown(describe_runs(study)),
        "![Error against bytes](envelope.svg)",
        *(table.to_markdown() for table in tables),
        "### What a comparison should have (ShrinkBench)",
        "\n".join(f"- [{'x' if met else ' '}] {text}" for text, met in checklist),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def describe_runs(study: Study) -> str:
    """Number of runs, machines, software and dates, in two sentences."""
    groups = [[r for point in points for r in point.runs.values()] for _, points in study.budgets]
    runs = [run for group in groups for run in group]
    others = f", and {len(runs) - len(groups[0])} runs under others" if groups[1:] else ""
    origins = [run["provenance"] for run in runs]
    machines, software = (sorted({o[key] for o in origins}) for key in ("machine", "software"))
    dates = [date.fromisoformat(d) for d in sorted({o["date"] for o in origins})]
    first, last = (f"{day:%d %B %Y}" for day in (dates[0], dates[-1]))
    return (
        f"{len(study.points)} points, {len(groups[0])} runs under a budget of "
        f"{format_budget(study.budget)}, at least {study.seeds} of each{others}. Run on "
        f"{' and '.join(machines)} with {' and '.join(software)}; "
        f"{first if first == last else f'{first} to {last}'}."
    )
