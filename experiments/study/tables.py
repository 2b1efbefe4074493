"""The report of a study: tables, pictures, and a page that needs no network."""

import csv
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fitsmall.experiments.run.budget import AMOUNTS
from fitsmall.experiments.run.units import scale, shown, words
from fitsmall.experiments.study.envelope import draw
from fitsmall.experiments.study.markdown import markdown
from fitsmall.experiments.study.page import page
from fitsmall.experiments.study.points import (
    LARGE,
    Comparison,
    Point,
    Study,
    amount,
    compare,
    losses,
    read,
)
from fitsmall.experiments.study.sheet import Sheet

__all__ = ["report"]

EVERY_POINT = "Every point"

# What a verdict on the cost of compression means for those that were trained longer.
_LONGER = {"holds": "costs more", "fails": "costs less", "undecided": "undecided"}


def report(folders: Sequence[Path], output: Path, console: Console | None = None) -> Path:
    """Write ``report.html``, ``report.md``, ``points.csv`` and pictures into a folder, and print
    the tables.

    Args:
        folders: Where runs are, at any depth.
        output: Folder to write into.
        console: Where to print.

    Returns:
        The page.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: It holds no runs of a study.
    """
    console = console or Console()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: name the folder of a sweep")
    try:
        study = Study(run for folder in folders for run in read(folder))
    except ValueError as error:
        names = ", ".join(map(str, folders))
        raise ValueError(
            f"{names}: {error}; experiment=train_big_then_compress makes them"
        ) from None
    output.mkdir(parents=True, exist_ok=True)
    points(study, output / "points.csv")
    for kind in ("png", "svg"):
        draw(study, output / f"envelope.{kind}")
    tables, found, checks = sheets(study), conclusions(study), checklist(study)
    for sheet in tables:
        if sheet.title != EVERY_POINT:  # they are in the file, and on the page
            console.print(sheet.table(), "")
    for line in found:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    document = markdown(study, tables, found, checks)
    (output / "report.md").write_text(document, encoding="utf-8")
    path = output / "report.html"
    path.write_text(page(study, tables, found, checks), encoding="utf-8")
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return path


def points(study: Study, path: Path) -> None:
    """Write a line for each run of each point, those under other budgets included."""
    numbers = ["error", "error_validation", "bytes", "bytes_dense", "ratio", "steps", "seconds"]
    numbers += ["flops_per_step", "operations", "operations_needed", "folder"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "size", "compression", "fine_tune", "seed", *numbers])
        for budget, points in study.budgets:
            for point in points:
                for seed, run in sorted(point.runs.items()):
                    words = [amount(budget), point.size, point.compression, point.fine_tune, seed]
                    writer.writerow([*words, *(run[number] for number in numbers)])


def sheets(study: Study) -> list[Sheet]:
    """All tables, in the order in which they are read."""
    every = [_claims(study), _points(study), _faster(study)]
    every += [*_losses(study), *_controls(study)]
    return [sheet for sheet in every if sheet.rows]


def conclusions(study: Study) -> list[str]:
    """What the study says, in sentences."""
    claims = study.claims()
    found = []
    if study.diverged:
        found.append(f"Left out, since their error is not finite: {', '.join(study.diverged)}.")
    for rival, name in (
        ("dense", "the best dense one"),
        ("small", "the best of all that are smaller, however compressed,"),
    ):
        comparisons = [claim.against(getattr(claim, rival)) for claim in claims]
        verdicts = Counter(c.verdict for c in comparisons if c)
        found.append(
            f"A network of {LARGE} times the bytes or more, compressed, beats {name} of at most "
            f"as many bytes at {verdicts['holds']} of {verdicts.total()} budgets of bytes, loses "
            f"at {verdicts['fails']}, and cannot be told from it at {verdicts['undecided']}."
        )
    return found


def checklist(study: Study) -> list[tuple[str, bool]]:
    """What ShrinkBench asks of a comparison of pruned networks (Blalock et al., 2020)."""
    compressed = [point for point in study.points if not point.plain]
    dense = {point.size for point in study.points if point.plain}
    runs = [run for point in study.points for run in point.runs.values()]
    ratios = {round(point.mean("ratio")) for point in compressed}
    return [
        ("compression ratio and theoretical speed-up", all("operations" in run for run in runs)),
        ("a dense network of its own for each size", {p.size for p in compressed} <= dense),
        (f"five operating points or more: {len(ratios)} ratios", len(ratios) >= 5),
        (f"several seeds, with intervals: {study.seeds}", study.seeds >= 3),
        ("random pruning as the floor", any("random" in p.compression for p in compressed)),
    ]


def _claims(study: Study) -> Sheet:
    rows = []
    for claim in study.claims():
        row = [f"{claim.bytes:,}", claim.owner.name, _spread(study, claim.owner)]
        row.append(claim.large.name if claim.large else "none fits")
        for rival in (claim.dense, claim.small):
            row.append(_against(study, rival, claim.against(rival)))
        rows.append(row)
    return Sheet(
        "Who owns each number of bytes",
        "Chosen by the held-out error, stated in the test error: mean and 95 % interval over "
        "seeds; differences with their standard error, which hold beyond two of them. Where no "
        "dense network takes as many bytes, it has no rival.",
        [
            "bytes",
            "owner",
            words(study.metric),
            f"best of {LARGE} times the size",
            "better than dense by",
            "than smaller ones by",
        ],
        rows,
    )


def _against(study: Study, rival: Point | None, comparison: Comparison | None) -> str:
    if rival is None:
        return "no rival"
    if comparison is None:
        return "-"
    difference = _number(study, comparison.mean, comparison.error)
    share = comparison.mean / rival.mean()
    return f"{difference} ({100 * share:+.0f} %) {comparison.verdict}: {rival.name}"


def _points(study: Study) -> Sheet:
    rows = []
    for size in study.sizes:
        own = [point for point in study.points if point.size == size]
        for point in sorted(own, key=lambda point: -point.mean("bytes")):
            rows.append(
                [
                    point.name,
                    str(len(point.runs)),
                    f"{point.mean('bytes'):,.0f}",
                    f"{point.mean('ratio'):.1f}",
                    f"{point.mean('operations') / point.mean('operations_needed'):.1f}",
                    _spread(study, point),
                    f"{point.mean('steps'):,.0f}",
                    f"{point.mean('flops_per_step') * point.mean('steps'):.2g}",
                ]
            )
    name = words(study.metric)
    return Sheet(
        EVERY_POINT,
        "The speed-up is theoretical: operations over those whose weight is not zero.",
        ["network", "seeds", "bytes", "ratio", "speed-up", name, "steps", "FLOPs"],
        rows,
    )


def _faster(study: Study) -> Sheet:
    target, steps = study.steps_to()
    smallest = study.sizes[0]
    rows = []
    for size in study.sizes:
        point = study.dense(size)
        if point is None or size not in steps:
            continue
        mean = statistics.fmean(steps[size].values())
        fewer = compare(steps[size], steps.get(smallest, {})) if size != smallest else None
        rows.append(
            [
                size,
                f"{mean:,.0f}",
                f"{mean * point.mean('flops_per_step'):.2g}",
                f"{point.mean('steps'):,.0f}",
                f"{_about(fewer.mean, fewer.error, ',.0f')} {fewer.verdict}" if fewer else "-",
            ]
        )
    return Sheet(
        f"Steps to a held-out {words(study.metric)} of {shown(study.metric, target)}",
        f"All reach it. A curve has {study.budget['validations']} points; differences with their "
        "standard error.",
        ["size", "steps", "FLOPs", "of steps in all", f"fewer than {smallest} by"],
        rows,
    )


def _losses(study: Study) -> list[Sheet]:
    found = []
    for kind, when in (
        ("not tuned", "behind the training, without fine-tuning"),
        ("tuned", "within the budget"),
    ):
        rows = []
        for compression, by_size in losses(study.points, kind).items():
            spreads = {size: _mean(study, values) for size, values in by_size.items()}
            ends = [by_size[size] for size in study.sizes if size in by_size]
            trend = compare(ends[-1], ends[0]) if len(ends) > 1 else None
            row = [compression, *(spreads.get(size, "-") for size in study.sizes)]
            rows.append([*row, trend.verdict if trend else "-"])
        found.append(
            Sheet(
                f"What compression {when} costs",
                "Against the network that had the whole budget, with standard errors. The last "
                "column: the largest loses less than the smallest.",
                ["", *study.sizes, "large ones lose less"],
                rows,
            )
        )
    return found


def _controls(study: Study) -> list[Sheet]:
    """The losses under other budgets: does training longer change them?"""
    (kind,) = (name for name in AMOUNTS if study.budget[name] is not None)
    whole = losses(study.points, "not tuned")
    found = []
    for budget, points in study.controls:
        if budget[kind] is None:
            continue
        share = budget[kind] * budget["scale"] / study.budget[kind] / study.budget["scale"]
        dense = {point.size: point for point in points if point.plain}
        rows: dict[tuple[int, str], list[str]] = {}
        for compression, by_size in losses(points, "not tuned").items():
            for size, values in by_size.items():
                plain, longer = study.dense(size), whole.get(compression, {}).get(size, {})
                more = compare(values, longer)
                if plain is not None and more is not None:
                    rows[study.sizes.index(size), compression] = [
                        f"{size}: {compression}",
                        _spread(study, dense[size]),
                        _spread(study, plain),
                        _mean(study, values),
                        _mean(study, longer),
                        f"{_number(study, more.mean, more.error)} {_LONGER[more.verdict]}",
                    ]
        found.append(
            Sheet(
                "Does the cost depend on the length of training?",
                f"The same networks trained for {share:g} of the budget, and for all of it, and "
                "compressed behind it.",
                ["network", f"dense, {share:g}", "dense", f"cost, {share:g}", "cost", "longer"],
                [rows[key] for key in sorted(rows)],
            )
        )
    return found


def _spread(study: Study, point: Point) -> str:
    return _number(study, point.mean(), point.interval())


def _mean(study: Study, values: dict[int, float]) -> str:
    loss = compare(dict.fromkeys(values, 0.0), values)
    return _number(study, loss.mean, loss.error) if loss else "-"


def _number(study: Study, value: float, spread: float) -> str:
    factor = scale(study.metric)
    return _about(factor * value, factor * spread, ".2f" if factor == 100 else ".3f")


def _about(value: float, spread: float, form: str) -> str:
    """A number with its spread, if that is known."""
    return f"{value:{form}}" + ("" if math.isinf(spread) else f" ± {spread:{form}}")
