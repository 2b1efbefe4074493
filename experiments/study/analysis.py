"""The analysis of a study: which network is best at each number of bytes.

Does a large network that is compressed beat a smaller one? Networks are chosen by their validation
error, and compared by their test error.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fitsmall.experiments.run.budget import BUDGET_UNITS
from fitsmall.experiments.run.curves import step_curve
from fitsmall.experiments.study.points import Comparison, Point, compare, group_points

__all__ = ["LARGE", "Claim", "Study", "budget_unit", "compression_costs", "format_budget"]

LARGE = 4  # a network is large if it takes this many times the bytes before compression

_MIN_LIMITS = 5  # with fewer limits of bytes, means between them are added
_TOLERANCE = 1.02  # of a byte limit: files of networks of equal size differ a little


@dataclass(frozen=True)
class Claim:
    """The best networks within one limit of bytes.

    Args:
        bytes: The limit.
        owner: Best of all.
        large: Best of the large ones, which take :data:`LARGE` times the limit or more before
            compression; None if none fits.
        dense: Best of the dense ones; None unless one of them has the size of the limit.
        small: Best of all that are not large; None if none fits.
    """

    bytes: int
    owner: Point
    large: Point | None
    dense: Point | None
    small: Point | None

    def compare_with(self, rival: Point | None) -> Comparison | None:
        """Compare the large network with a rival; None if one of the two does not exist."""
        if self.large is None or rival is None:
            return None
        return compare(self.large.errors, rival.errors)


class Study:
    """The points of a sweep, by budget.

    The budget with the most runs is the main one, and its points are compared. Points under other
    budgets are controls. Runs whose error is not finite are left out, and listed in ``diverged``.

    Args:
        results: Runs, as :func:`~fitsmall.experiments.study.points.read_results` reads them.

    Raises:
        ValueError: No run belongs to a budget, runs have different metrics, or two runs have the
            same size, compression and seed but different settings.
    """

    def __init__(self, results: Iterable[dict[str, Any]]) -> None:
        results = [result for result in results if "size" in result]
        self.diverged = [run["folder"] for run in results if not _is_finite(run)]
        results = [run for run in results if _is_finite(run)]
        if not results:
            raise ValueError("no finished run that belongs to a budget")
        metrics = {str(result["metric"]) for result in results}
        if len(metrics) > 1:
            raise ValueError(f"runs have different metrics: {', '.join(sorted(metrics))}")
        (self.metric,) = metrics
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            groups[json.dumps(result["budget"], sort_keys=True)].append(result)
        main = max(groups, key=lambda budget: len(groups[budget]))
        self.budget: dict[str, Any] = json.loads(main)
        self.points = group_points(groups.pop(main))
        self.controls = [(json.loads(key), group_points(runs)) for key, runs in groups.items()]

    @property
    def budgets(self) -> list[tuple[dict[str, Any], list[Point]]]:
        """All budgets with their points, the main one first."""
        return [(self.budget, self.points), *self.controls]

    @property
    def sizes(self) -> list[str]:
        """Labels of sizes, from small to large."""
        bytes_dense = {point.size: point.mean("bytes_dense") for point in self.points}
        return sorted(bytes_dense, key=lambda size: bytes_dense[size])

    @property
    def seeds(self) -> int:
        """The least number of seeds of any point."""
        return min(len(point.runs) for point in self.points)

    def dense_point(self, size: str) -> Point | None:
        """The dense network of a size."""
        return next((p for p in self.points if p.is_dense and p.size == size), None)

    def byte_limits(self) -> list[int]:
        """Bytes at which networks are compared: the size of each dense network.

        If those are few, their geometric means are added.
        """
        limits = self._dense_bytes()
        while 1 < len(limits) < _MIN_LIMITS:
            between = {round(math.sqrt(a * b)) for a, b in pairwise(limits)} - {*limits}
            if not between:
                break
            limits = sorted({*limits, *between})
        return limits

    def best_within(self, points: Iterable[Point], limit: float) -> Point | None:
        """The point with the least validation error among those within a limit of bytes."""
        fitting = [point for point in points if point.mean("bytes") <= _TOLERANCE * limit]
        return min(fitting, key=lambda point: point.mean("error_validation"), default=None)

    def claims(self) -> list[Claim]:
        """The best networks at each of the :meth:`byte_limits`.

        Between the sizes of two dense networks there is no dense rival: the smaller one has fewer
        bytes, and would be too easy to beat.
        """
        claims, dense_bytes = [], self._dense_bytes()
        for limit in self.byte_limits():
            large = [p for p in self.points if p.mean("bytes_dense") >= LARGE * limit]
            small = [p for p in self.points if p not in large]
            dense = [p for p in self.points if p.is_dense and limit in dense_bytes]
            owner = self.best_within(self.points, limit)
            assert owner is not None, "the limits are sizes of files"
            rivals = (self.best_within(points, limit) for points in (large, dense, small))
            claims.append(Claim(limit, owner, *rivals))
        return claims

    def envelope(self, size: str) -> list[Point]:
        """The points of one size that have a lower validation error than all smaller files."""
        own = sorted((p for p in self.points if p.size == size), key=lambda p: p.mean("bytes"))
        best: list[Point] = []
        for point in own:
            if not best or point.mean("error_validation") < best[-1].mean("error_validation"):
                best.append(point)
        return best

    def steps_to_common_error(self) -> tuple[float, dict[str, dict[int, float]]]:
        """Steps that dense networks need for the lowest validation error that all of them reach.

        Returns:
            That error, and the steps by size and seed. Without curves: NaN, and no sizes.
        """
        curves = {
            point.size: {
                seed: step_curve(Path(run["folder"]) / "metrics.csv", self.metric)
                for seed, run in sorted(point.runs.items())
            }
            for point in self.points
            if point.is_dense
        }
        if not curves or not all(all(runs.values()) for runs in curves.values()):
            return math.nan, {}
        target = max(
            min(error for _, error in run) for runs in curves.values() for run in runs.values()
        )
        return target, {
            size: {
                seed: next(float(step) for step, error in run if error <= target)
                for seed, run in runs.items()
            }
            for size, runs in curves.items()
        }

    def _dense_bytes(self) -> list[int]:
        return sorted({round(point.mean("bytes")) for point in self.points if point.is_dense})


def compression_costs(points: Sequence[Point], kind: str) -> dict[str, dict[str, dict[int, float]]]:
    """Increase of the test error by compression, against the dense network of the same budget.

    Args:
        points: Points under one budget.
        kind: ``"tuned"`` or ``"not tuned"``, see :attr:`Point.kind`.

    Returns:
        Increases by compression, size and seed.
    """
    dense = {point.size: point.errors for point in points if point.is_dense}
    costs: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
    for point in points:
        if point.kind == kind and point.size in dense:
            before = dense[point.size]
            costs[point.compression][point.size] = {
                seed: error - before[seed] for seed, error in point.errors.items() if seed in before
            }
    return dict(costs)


def budget_unit(budget: Mapping[str, Any]) -> str:
    """The unit in which a budget is given: flops, seconds or steps."""
    (unit,) = (unit for unit in BUDGET_UNITS if budget[unit] is not None)
    return unit


def format_budget(budget: Mapping[str, Any]) -> str:
    """Amount and unit of a budget.

    Example:
        >>> format_budget({"flops": None, "seconds": None, "steps": 2000, "scale": 0.25})
        '500 steps'
    """
    unit = budget_unit(budget)
    return f"{budget[unit] * budget['scale']:,.6g} {unit}"


def _is_finite(run: Mapping[str, Any]) -> bool:
    return math.isfinite(run["error"]) and math.isfinite(run["error_validation"])
