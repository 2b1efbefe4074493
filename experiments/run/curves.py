"""Curves of a run, read from the ``metrics.csv`` in its folder.

A run may log elsewhere: without the file, all curves are empty.
"""

import csv
from collections import defaultdict
from pathlib import Path

__all__ = ["layer_curves", "read_metrics", "size_curve", "step_curve"]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``, without their empty cells."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]


def step_curve(path: Path, metric: str) -> list[tuple[int, float]]:
    """Optimizer steps and the validation metric after them.

    Args:
        path: The ``metrics.csv``.
        metric: Name of the metric, which is logged as ``val/METRIC``.
    """
    key = f"val/{metric}"
    return [(int(row["step"]) + 1, row[key]) for row in read_metrics(path) if key in row]


def size_curve(path: Path, metric: str = "error") -> list[tuple[float, float]]:
    """Estimated bytes of the compressed file and the validation metric, after each epoch.

    Args:
        path: The ``metrics.csv``.
        metric: Name of the metric, which is logged as ``val/METRIC``.
    """
    keys = ("compression/bytes", f"val/{metric}")
    points = (tuple(row[key] for key in keys) for row in _epochs(path) if row.keys() >= {*keys})
    return [(size, error) for size, error in points]


def layer_curves(path: Path, kind: str) -> dict[str, list[float]]:
    """Value of a metric of each layer after each epoch.

    Args:
        path: The ``metrics.csv``.
        kind: ``"rank"``, which is 0 for a layer that two factors would not make smaller;
            ``"units"``, the channels, heads or hidden units that are not chosen to leave; or
            ``"kept"``, the fraction of them.
    """
    curves: dict[str, list[float]] = defaultdict(list)
    for row in _epochs(path):
        for key, value in row.items():
            before, prefix, layer = key.rpartition(f"compression/{kind}/")
            if prefix and not before:
                curves[layer.removesuffix(".weight").removeprefix("net.")].append(value)
    return dict(curves)


def _epochs(path: Path) -> list[dict[str, float]]:
    """All values logged in each epoch, which may stand in several rows."""
    epochs: dict[float, dict[str, float]] = defaultdict(dict)
    for row in read_metrics(path):
        epochs[row["epoch"]] |= row
    return list(epochs.values())
