"""A point of a study: one network, compressed in one way, with a run for each seed.

Comparisons of two points are paired by seed. A difference counts if it is larger than two standard
errors.
"""

import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scipy.stats import t as student

from fitsmall.compressors.naming import printable
from fitsmall.experiments.run.folder import read_result

__all__ = ["Comparison", "Point", "Verdict", "compare", "group_points", "read_results"]

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Point:
    """One network, compressed in one way.

    Args:
        size: Label of the network's size.
        compression: Label of the compression; ``none`` for a dense network.
        fine_tune: Whether the network was trained while it was compressed.
        runs: ``result.json`` by seed.
    """

    size: str
    compression: str
    fine_tune: bool
    runs: dict[int, dict[str, Any]]

    @property
    def errors(self) -> dict[int, float]:
        """Test error of each run, by seed."""
        return {seed: float(run["error"]) for seed, run in sorted(self.runs.items())}

    def mean(self, key: str = "error") -> float:
        """Mean over seeds of a number in ``result.json``."""
        return statistics.fmean(float(run[key]) for run in self.runs.values())

    def margin(self) -> float:
        """Half the width of the 95 % confidence interval of the mean test error.

        It is that of Student's t distribution, and infinite for a single seed.
        """
        count = len(self.runs)
        if count < 2:
            return math.inf
        standard_error = statistics.stdev(self.errors.values()) / math.sqrt(count)
        return float(student.ppf(0.975, count - 1)) * standard_error

    @property
    def is_dense(self) -> bool:
        """Whether the network is not compressed."""
        return self.compression == "none"

    @property
    def kind(self) -> str:
        """``dense``; or ``tuned`` if it was trained during compression; else ``not tuned``."""
        return "dense" if self.is_dense else "tuned" if self.fine_tune else "not tuned"

    @property
    def name(self) -> str:
        """Size and compression in words."""
        how = {"dense": "dense", "tuned": self.compression}
        return f"{self.size}: {how.get(self.kind, f'{self.compression}, not tuned')}"


@dataclass(frozen=True)
class Comparison:
    """Difference of the errors of two points, paired by seed.

    Args:
        mean: Mean difference; positive if the first point is better.
        error: Standard error of the mean; infinite for a single seed.
    """

    mean: float
    error: float

    @property
    def verdict(self) -> Verdict:
        """``undecided`` up to two standard errors; else ``holds`` if the first point is better.

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
    """Compare errors by seed.

    Args:
        better: Errors that are claimed to be lower, by seed.
        worse: Errors that are claimed to be higher, by seed.

    Returns:
        The comparison over common seeds, or None if there is none.

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


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read ``result.json`` of every run below a folder, and add each run's ``folder`` to it.

    Those that are damaged are left out, and named on standard error.
    """
    results = []
    for path in sorted(folder.rglob("result.json")):
        try:
            results.append({**read_result(path), "folder": str(path.parent)})
        except ValueError as error:
            print(printable(f"left out: {error}"), file=sys.stderr)
    return results


def group_points(results: Iterable[dict[str, Any]]) -> list[Point]:
    """Group runs by size, compression and fine-tuning.

    Args:
        results: Runs under one budget, as :func:`read_results` reads them.

    Raises:
        ValueError: Two runs of one point and seed have different fingerprints.
    """
    groups: dict[tuple[str, str, bool], dict[int, dict[str, Any]]] = defaultdict(dict)
    for run in results:
        runs = groups[run["size"], run["compression"], run["fine_tune"]]
        other = runs.setdefault(run["seed"], run)
        if other["fingerprint"] != run["fingerprint"]:
            raise ValueError(
                f"{other['folder']} and {run['folder']} have the same size, compression and seed, "
                "but different settings; name folders that hold only one of the two, and give "
                "each sweep its own hydra.sweep.dir"
            )
    return [Point(*key, runs) for key, runs in groups.items()]
