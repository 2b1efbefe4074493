"""What a sweep over sizes and compressions says: which network owns each number of bytes, and
whether large networks that are compressed beat small ones.

Everything is chosen by the held-out error and stated in the test error. A difference between two
networks is paired by seed, and counts beyond two standard errors.
"""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from scipy.stats import t as student

from fitsmall.experiments.run.budget import AMOUNTS
from fitsmall.experiments.run.figures import logged

__all__ = [
    "LARGE",
    "Claim",
    "Comparison",
    "Point",
    "Study",
    "amount",
    "compare",
    "curve",
    "losses",
    "read",
]

LARGE = 4  # times as many bytes as there are to spend, before compression

_AMOUNTS = 5  # at least
_SLACK = 1.02  # of bytes: files of one shape differ a little

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Point:
    """One network, compressed in one way: a run for each seed.

    Args:
        size: What networks of this size are called.
        compression: What was done to them.
        fine_tune: Whether training went on while it was done.
        runs: ``result.json`` by seed.
    """

    size: str
    compression: str
    fine_tune: bool
    runs: dict[int, dict[str, Any]]

    @property
    def errors(self) -> dict[int, float]:
        """The test error of each run, by seed."""
        return {seed: float(run["error"]) for seed, run in sorted(self.runs.items())}

    def mean(self, key: str = "error") -> float:
        """The mean of a number over seeds."""
        return statistics.fmean(float(run[key]) for run in self.runs.values())

    def interval(self) -> float:
        """Half the width of the 95 % confidence interval of the mean error, by Student's t;
        infinite for one seed."""
        count = len(self.runs)
        if count < 2:
            return math.inf
        spread = statistics.stdev(self.errors.values()) / math.sqrt(count)
        return float(student.ppf(0.975, count - 1)) * spread

    @property
    def plain(self) -> bool:
        """Whether it is the network as it is."""
        return self.compression == "none"

    @property
    def kind(self) -> str:
        """``dense``; ``tuned`` if training went on meanwhile, else ``not tuned``."""
        return "dense" if self.plain else "tuned" if self.fine_tune else "not tuned"

    @property
    def name(self) -> str:
        """Size and compression in words."""
        how = {"dense": "dense", "tuned": self.compression}
        return f"{self.size}: {how.get(self.kind, f'{self.compression}, not tuned')}"


@dataclass(frozen=True)
class Comparison:
    """How much better one point is than another, seed by seed.

    Args:
        mean: Mean of the differences of the error; positive if the first is better.
        error: Standard error of that mean; infinite for one seed.
    """

    mean: float
    error: float

    @property
    def verdict(self) -> Verdict:
        """``holds`` or ``fails`` beyond two standard errors, else ``undecided``.

        Example:
            >>> Comparison(0.5, 0.2).verdict, Comparison(-0.5, 0.2).verdict
            ('holds', 'fails')
            >>> Comparison(0.5, 0.3).verdict
            'undecided'
        """
        if abs(self.mean) <= 2 * self.error:
            return "undecided"
        return "holds" if self.mean > 0 else "fails"


def compare(better: Mapping[int, float], worse: Mapping[int, float]) -> Comparison | None:
    """Differences of errors, paired by seed; None without a common one.

    Example:
        >>> compare({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 3.5, 2: 4.5, 3: 9.0})
        Comparison(mean=1.3333333333333333, error=0.16666666666666666)
    """
    differences = [worse[seed] - better[seed] for seed in better.keys() & worse.keys()]
    if not differences:
        return None
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Comparison(mean, math.inf)
    return Comparison(mean, statistics.stdev(differences) / math.sqrt(len(differences)))


@dataclass(frozen=True)
class Claim:
    """At one number of bytes: the best large network that fits, against the best of others.

    Args:
        bytes: What there is to spend.
        owner: Of all points that fit, the best.
        large: Of networks that take four times as much or more before compression, the best.
        dense: Of networks as they are, the best, if there is one of as many bytes.
        small: Of all the others, however compressed, the best.
    """

    bytes: int
    owner: Point
    large: Point | None
    dense: Point | None
    small: Point | None

    def against(self, rival: Point | None) -> Comparison | None:
        """The large network against a rival; None if one of the two does not exist."""
        if self.large is None or rival is None:
            return None
        return compare(self.large.errors, rival.errors)


class Study:
    """The points of a sweep under its one budget, and those of other budgets beside.

    Those whose error is not finite are left out, and listed as ``diverged``.

    Args:
        results: ``result.json`` of each run, with its ``folder``, as :func:`read` finds them.

    Raises:
        ValueError: There are no runs; they measure different things; or two of them are of one
            size, compression and seed, but differ in other settings.
    """

    def __init__(self, results: Iterable[dict[str, Any]]) -> None:
        results = [result for result in results if "size" in result]
        self.diverged = [run["folder"] for run in results if not _finite(run)]
        results = [run for run in results if _finite(run)]
        if not results:
            raise ValueError("no finished run that belongs to a budget")
        metrics = {str(result["metric"]) for result in results}
        if len(metrics) > 1:
            raise ValueError(f"runs measure different things: {', '.join(sorted(metrics))}")
        (self.metric,) = metrics
        budgets = Counter(json.dumps(result["budget"], sort_keys=True) for result in results)
        main = budgets.most_common(1)[0][0]
        self.budget: dict[str, Any] = json.loads(main)
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            groups[json.dumps(result["budget"], sort_keys=True)].append(result)
        self.points = _points(groups.pop(main))
        self.controls = [(json.loads(budget), _points(runs)) for budget, runs in groups.items()]

    @property
    def budgets(self) -> list[tuple[dict[str, Any], list[Point]]]:
        """Each budget with its points, the one that is compared first."""
        return [(self.budget, self.points), *self.controls]

    @property
    def sizes(self) -> list[str]:
        """From small to large."""
        dense = {point.size: point.mean("bytes_dense") for point in self.points}
        return sorted(dense, key=lambda size: dense[size])

    @property
    def seeds(self) -> int:
        """The fewest seeds of any point."""
        return min(len(point.runs) for point in self.points)

    def amounts(self) -> list[int]:
        """Bytes at which networks are compared: of every network as it is; and between them, until
        there are enough."""
        found = self._measured()
        while 1 < len(found) < _AMOUNTS:
            middle = {round(math.sqrt(a * b)) for a, b in pairwise(found)} - {*found}
            if not middle:
                break
            found = sorted({*found, *middle})
        return found

    def _measured(self) -> list[int]:
        return sorted({round(point.mean("bytes")) for point in self.points if point.plain})

    def _large(self, most: float) -> list[Point]:
        return [point for point in self.points if point.mean("bytes_dense") >= LARGE * most]

    def best(self, points: Iterable[Point], most: float) -> Point | None:
        """Of the points that fit, the one with the least held-out error."""
        fitting = [point for point in points if point.mean("bytes") <= _SLACK * most]
        return min(fitting, key=lambda point: point.mean("error_validation"), default=None)

    def envelope(self, size: str) -> list[Point]:
        """The points of one size that no smaller file beats, from small to large."""
        own = sorted((p for p in self.points if p.size == size), key=lambda p: p.mean("bytes"))
        best: list[Point] = []
        for point in own:
            if not best or point.mean("error_validation") < best[-1].mean("error_validation"):
                best.append(point)
        return best

    def claims(self) -> list[Claim]:
        """What holds at each of the :meth:`amounts`. Where no dense network takes as many bytes,
        the best of those that take fewer is no rival of equal bytes, and there is none."""
        found, measured = [], self._measured()
        for most in self.amounts():
            large = self._large(most)
            small = [point for point in self.points if point not in large]
            dense = [p for p in self.points if p.plain and most in measured]
            owner = self.best(self.points, most)
            assert owner is not None, "amounts are sizes of files"
            rivals = (self.best(points, most) for points in (large, dense, small))
            found.append(Claim(most, owner, *rivals))
        return found

    def dense(self, size: str) -> Point | None:
        """The network of a size as it is."""
        return next((p for p in self.points if p.plain and p.size == size), None)

    def steps_to(self) -> tuple[float, dict[str, dict[int, float]]]:
        """The held-out error that every network reaches, and the steps that each size needs for
        it, by seed; no sizes where runs have left no curve."""
        curves = {
            point.size: {
                seed: curve(Path(run["folder"]), self.metric)
                for seed, run in sorted(point.runs.items())
            }
            for point in self.points
            if point.plain
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


def _points(results: list[dict[str, Any]]) -> list[Point]:
    groups: dict[tuple[str, str, bool], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in results:
        runs = groups[run["size"], run["compression"], run["fine_tune"]]
        other = runs.setdefault(run["seed"], run)
        if other["fingerprint"] != run["fingerprint"]:
            raise ValueError(
                f"{other['folder']} and {run['folder']} are of one size, compression and seed, "
                "but differ in other settings; name folders that hold one of the two, and give "
                "each a hydra.sweep.dir of its own"
            )
    return [Point(*key, runs) for key, runs in groups.items()]


def _finite(run: dict[str, Any]) -> bool:
    return math.isfinite(run["error"]) and math.isfinite(run["error_validation"])


def losses(points: Sequence[Point], kind: str) -> dict[str, dict[str, dict[int, float]]]:
    """How much worse each compression of a kind makes each size than the network that had the
    whole budget, by compression, size and seed."""
    dense = {point.size: point.errors for point in points if point.plain}
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(dict)
    for point in points:
        if point.kind == kind and point.size in dense:
            whole = dense[point.size]
            found[point.compression][point.size] = {
                seed: error - whole[seed] for seed, error in point.errors.items() if seed in whole
            }
    return dict(found)


def amount(budget: Mapping[str, Any]) -> str:
    """How much a budget is.

    Example:
        >>> amount({"flops": None, "seconds": None, "steps": 2000, "scale": 0.25})
        '500 steps'
    """
    (kind,) = (kind for kind in AMOUNTS if budget[kind] is not None)
    return f"{budget[kind] * budget['scale']:,.6g} {kind}"


def read(folder: Path) -> list[dict[str, Any]]:
    """``result.json`` of every run below a folder, each with the folder that it is in."""
    return [
        {**json.loads(path.read_text()), "folder": str(path.parent)}
        for path in sorted(folder.rglob("result.json"))
    ]


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """Steps and held-out errors of a run, from its ``metrics.csv``; empty without one."""
    rows, key = logged(folder / "metrics.csv"), f"val/{metric}"
    return [(int(row["step"]) + 1, row[key]) for row in rows if key in row]
