"""The tables of a study's report."""

import math
import statistics

from fitsmall.experiments.run.metric_format import (
    describe_metric,
    display_factor,
    format_metric,
)
from fitsmall.experiments.study.analysis import LARGE, Study, budget_unit, compression_costs
from fitsmall.experiments.study.points import Comparison, Point, compare
from fitsmall.experiments.study.report_table import ReportTable

__all__ = ["POINTS_TITLE", "study_tables"]

POINTS_TITLE = "Every point"

# Verdict on the claim that training longer makes compression cost more.
_LONGER = {"holds": "costs more", "fails": "costs less", "undecided": "undecided"}


def study_tables(study: Study) -> list[ReportTable]:
    """All tables that have rows, in reading order."""
    tables = [_claims_table(study), _points_table(study), _steps_table(study)]
    tables += [*_cost_tables(study), *_control_tables(study)]
    return [table for table in tables if table.rows]


def _claims_table(study: Study) -> ReportTable:
    rows = []
    for claim in study.claims():
        row = [f"{claim.bytes:,}", claim.owner.name, _format_error(study, claim.owner)]
        row.append(claim.large.name if claim.large else "none fits")
        for rival in (claim.dense, claim.small):
            row.append(_format_comparison(study, rival, claim.compare_with(rival)))
        rows.append(row)
    return ReportTable(
        "Who owns each number of bytes",
        "Networks are chosen by their held-out error and compared by their test error: mean and "
        "95 % interval over seeds. Differences have a standard error, and count beyond two of "
        "them. Where no dense network takes as many bytes, there is no dense rival.",
        [
            "bytes",
            "owner",
            describe_metric(study.metric),
            f"best of {LARGE} times the size",
            "better than dense by",
            "than smaller ones by",
        ],
        rows,
    )


def _points_table(study: Study) -> ReportTable:
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
                    _format_error(study, point),
                    f"{point.mean('steps'):,.0f}",
                    f"{point.mean('flops_per_step') * point.mean('steps'):.2g}",
                ]
            )
    name = describe_metric(study.metric)
    return ReportTable(
        POINTS_TITLE,
        "The speed-up is theoretical: all operations over those with non-zero weights.",
        ["network", "seeds", "bytes", "ratio", "speed-up", name, "steps", "FLOPs"],
        rows,
    )


def _steps_table(study: Study) -> ReportTable:
    target, steps = study.steps_to_common_error()
    smallest = study.sizes[0]
    rows = []
    for size in study.sizes:
        point = study.dense_point(size)
        if point is None or size not in steps:
            continue
        mean = statistics.fmean(steps[size].values())
        fewer = compare(steps[size], steps.get(smallest, {})) if size != smallest else None
        difference = "-"
        if fewer:
            difference = f"{_format_interval(fewer.mean, fewer.error, ',.0f')} {fewer.verdict}"
        rows.append(
            [
                size,
                f"{mean:,.0f}",
                f"{mean * point.mean('flops_per_step'):.2g}",
                f"{point.mean('steps'):,.0f}",
                difference,
            ]
        )
    error = f"{describe_metric(study.metric)} of {format_metric(study.metric, target)}"
    return ReportTable(
        f"Steps to a held-out {error}",
        f"The lowest one that all networks reach. Curves have {study.budget['validations']} "
        "points; differences have their standard error.",
        ["size", "steps", "FLOPs", "of steps in all", f"fewer than {smallest} by"],
        rows,
    )


def _cost_tables(study: Study) -> list[ReportTable]:
    tables = []
    for kind, when in (
        ("not tuned", "after training, without fine-tuning"),
        ("tuned", "within the budget"),
    ):
        rows = []
        for compression, by_size in compression_costs(study.points, kind).items():
            costs = {size: _format_cost(study, values) for size, values in by_size.items()}
            ends = [by_size[size] for size in study.sizes if size in by_size]
            trend = compare(ends[-1], ends[0]) if len(ends) > 1 else None
            row = [compression, *(costs.get(size, "-") for size in study.sizes)]
            rows.append([*row, trend.verdict if trend else "-"])
        tables.append(
            ReportTable(
                f"Cost of compression {when}",
                "Against the network that had the whole budget, with standard errors. The last "
                "column is about the claim that the largest network loses less than the smallest.",
                ["", *study.sizes, "large ones lose less"],
                rows,
            )
        )
    return tables


def _control_tables(study: Study) -> list[ReportTable]:
    """Cost of compression under other budgets, in the same unit as the main one."""
    unit = budget_unit(study.budget)
    costs = compression_costs(study.points, "not tuned")
    tables = []
    for budget, points in study.controls:
        if budget[unit] is None:
            continue
        share = budget[unit] * budget["scale"] / study.budget[unit] / study.budget["scale"]
        short_dense = {point.size: point for point in points if point.is_dense}
        rows: dict[tuple[int, str], list[str]] = {}
        for compression, by_size in compression_costs(points, "not tuned").items():
            for size, short_cost in by_size.items():
                dense, cost = study.dense_point(size), costs.get(compression, {}).get(size, {})
                more = compare(short_cost, cost)
                if dense is not None and more is not None:
                    rows[study.sizes.index(size), compression] = [
                        f"{size}: {compression}",
                        _format_error(study, short_dense[size]),
                        _format_error(study, dense),
                        _format_cost(study, short_cost),
                        _format_cost(study, cost),
                        f"{_format_value(study, more.mean, more.error)} {_LONGER[more.verdict]}",
                    ]
        tables.append(
            ReportTable(
                "Does the cost depend on the length of training?",
                f"The same networks trained for {share:g} of the budget and for all of it, and "
                "compressed after training.",
                ["network", f"dense, {share:g}", "dense", f"cost, {share:g}", "cost", "longer"],
                [rows[key] for key in sorted(rows)],
            )
        )
    return tables


def _format_comparison(study: Study, rival: Point | None, comparison: Comparison | None) -> str:
    if rival is None:
        return "no rival"
    if comparison is None:
        return "-"
    difference = _format_value(study, comparison.mean, comparison.error)
    share = comparison.mean / rival.mean()
    return f"{difference} ({100 * share:+.0f} %) {comparison.verdict}: {rival.name}"


def _format_error(study: Study, point: Point) -> str:
    return _format_value(study, point.mean(), point.margin())


def _format_cost(study: Study, values: dict[int, float]) -> str:
    cost = compare(dict.fromkeys(values, 0.0), values)
    return _format_value(study, cost.mean, cost.error) if cost else "-"


def _format_value(study: Study, value: float, spread: float) -> str:
    factor = display_factor(study.metric)
    return _format_interval(factor * value, factor * spread, ".2f" if factor == 100 else ".3f")


def _format_interval(value: float, spread: float, form: str) -> str:
    """A value with its spread, unless that is infinite."""
    return f"{value:{form}}" + ("" if math.isinf(spread) else f" ± {spread:{form}}")
