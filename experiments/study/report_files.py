"""The files of a study's report: a page, a document, pictures, and a CSV of all runs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fitsmall.compressors.naming import printable
from fitsmall.experiments.study.analysis import Study, format_budget
from fitsmall.experiments.study.conclusions import checklist, conclusions
from fitsmall.experiments.study.envelope import draw_envelopes
from fitsmall.experiments.study.markdown import render_markdown
from fitsmall.experiments.study.page import render_page
from fitsmall.experiments.study.points import read_results
from fitsmall.experiments.study.tables import POINTS_TITLE, study_tables

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], output: Path, console: Console | None = None) -> Path:
    """Write ``report.html``, ``report.md``, ``points.csv`` and pictures, and print the tables.

    Args:
        folders: Folders with runs at any depth.
        output: Folder to write to.
        console: Where to print.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: The folders hold no runs of one study.
    """
    console = console or Console()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: name the folder of a sweep")
    try:
        study = Study(run for folder in folders for run in read_results(folder))
    except ValueError as error:
        names = ", ".join(map(str, folders))
        raise ValueError(
            f"{names}: {error}; experiment=train_big_then_compress makes such runs"
        ) from None
    output.mkdir(parents=True, exist_ok=True)
    _write_runs(study, output / "points.csv")
    for suffix in ("png", "svg"):
        draw_envelopes(study, output / f"envelope.{suffix}")
    tables, sentences, checks = study_tables(study), conclusions(study), checklist(study)
    for table in tables:
        if table.title != POINTS_TITLE:  # the longest one is in the files only
            console.print(table.to_rich(), "")
    for line in sentences:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    document = render_markdown(study, tables, sentences, checks)
    (output / "report.md").write_text(document, encoding="utf-8")
    page = output / "report.html"
    page.write_text(render_page(study, tables, sentences, checks), encoding="utf-8")
    console.print(str(page), markup=False, highlight=False, soft_wrap=True)
    return page


def _write_runs(study: Study, path: Path) -> None:
    """Write a line for each run under any budget."""
    numbers = ["error", "error_validation", "bytes", "bytes_dense", "ratio", "steps", "seconds"]
    numbers += ["flops_per_step", "operations", "operations_needed", "folder"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "size", "compression", "fine_tune", "seed", *numbers])
        for budget, points in study.budgets:
            for point in points:
                labels = [format_budget(budget), point.size, point.compression, point.fine_tune]
                for seed, run in sorted(point.runs.items()):
                    cells = [*labels, seed, *(run[number] for number in numbers)]
                    writer.writerow(map(_cell, cells))


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula.

    Example:
        >>> _cell("=1+1"), _cell("64-10"), _cell(-0.5)
        ("'=1+1", '64-10', -0.5)
    """
    text = printable(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(("=", "+", "-", "@")) else text
