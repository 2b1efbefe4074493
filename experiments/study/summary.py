"""The summary of a sweep: mean and standard deviation over seeds."""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitsmall.experiments.run.folder import read_result
from fitsmall.experiments.run.metric_format import describe_metric, display_factor

__all__ = ["Summary", "summarize"]

MEASURES = ("error", "error_dense", "bytes", "ratio", "seconds")


def summarize(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation of runs that differ only in their seed.

    Args:
        results: ``result.json`` of each run.

    Returns:
        For each set of overrides: its seeds, its metric, and ``mean`` and ``std`` of each number.
        ``std`` is None for a single run; a number that no run has is None.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[tuple(o for o in result["overrides"] if not o.startswith("seed="))].append(result)
    return [
        {
            "overrides": list(overrides),
            "seeds": [run["seed"] for run in runs],
            "metric": runs[0]["metric"],
        }
        | {measure: _mean_and_std([run[measure] for run in runs]) for measure in MEASURES}
        for overrides, runs in groups.items()
    ]


class Summary(Callback):
    """Write ``summary.json`` to the folder of a sweep when it ends, print it, and list failures.

    The sweepers of this package set ``jobs``, the fingerprint of each job by its folder. With
    another sweeper, all results in the sweep's folder count.
    """

    def __init__(self) -> None:
        self.jobs: dict[Path, str] | None = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = self.jobs
        folders = sorted(p for p in folder.iterdir() if p.is_dir()) if jobs is None else [*jobs]
        paths = [job / "result.json" for job in folders]
        results = [(p.parent, read_result(p)) for p in paths if p.is_file()]
        groups = summarize(r for job, r in results if jobs is None or r["fingerprint"] == jobs[job])
        (folder / "summary.json").write_text(json.dumps(groups, indent=2) + "\n")
        Console().print(_table(groups))
        print(folder / "summary.json")
        if failed := [job / "error.txt" for job in folders if (job / "error.txt").is_file()]:
            print(f"{len(failed)} failed; run the same command to try again:", file=sys.stderr)
            for path in failed:
                print(f"  {path}: {path.read_text().strip().splitlines()[-1]}", file=sys.stderr)
            sys.exit(1)


def _mean_and_std(values: list[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std}


def _table(groups: list[dict[str, Any]]) -> Table:
    shared = set.intersection(*(set(group["overrides"]) for group in groups)) if groups else set()
    common = [o for o in groups[0]["overrides"] if o in shared] if groups else []
    table = Table(title=escape(" ".join(common)) or None)
    metrics = {group["metric"] for group in groups}
    metric = describe_metric(*metrics) if len(metrics) == 1 else "error"
    unit = " %" if all(display_factor(m) == 100 for m in metrics) else ""
    for column in ("run", "seeds", f"{metric}{unit}", f"dense{unit}", "bytes", "ratio", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for group in groups:
        factor = display_factor(group["metric"])
        digits = 2 if factor == 100 else 3
        table.add_row(
            escape(" ".join(o for o in group["overrides"] if o not in shared)) or "-",
            str(len(group["seeds"])),
            _format_cell(group["error"], factor, digits),
            _format_cell(group["error_dense"], factor, digits),
            _format_cell(group["bytes"], 1, 0),
            _format_cell(group["ratio"], 1, 1),
            _format_cell(group["seconds"], 1, 1),
        )
    return table


def _format_cell(number: dict[str, float | None] | None, factor: float, digits: int) -> str:
    if number is None:
        return "-"
    mean, std = number["mean"], number["std"]
    assert mean is not None, "a group has runs"
    around = "" if std is None else f" ± {factor * std:,.{digits}f}"
    return f"{factor * mean:,.{digits}f}{around}"
