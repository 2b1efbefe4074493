"""A sweeper over a union of grids. A sweep that was stopped continues."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra_plugins.fitsmall.jobs import Job, JobSweeper
from rich.progress import track

__all__ = ["Grids"]


class Grids(JobSweeper):
    """Run every combination of the values of each grid.

    Two combinations with the same fingerprint run once. Values on the command line replace those
    of the grids. Jobs that have finished in the sweep's folder are not run again, and a job that
    fails does not stop the others.

    Args:
        params: Values that all grids share, by key, as on the command line: ``{"seed": "0,1,2"}``.
        grids: Further values of each grid.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        grids: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.params = dict(params or {})
        self.grids = [dict(grid) for grid in grids or [{}]]

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        folder, jobs = self.open_folder(), self._jobs(arguments)
        self.summarize_only(jobs)
        finished = sum(job.is_finished for job in jobs)
        print(f"{len(jobs)} jobs in {folder}, {finished} of them finished before")
        return [self.run_jobs(jobs)]

    def _jobs(self, arguments: list[str]) -> list[Job]:
        jobs: dict[str, Job] = {}
        for grid in self.grids:
            words = [f"{key}={value}" for key, value in {**self.params, **grid}.items()]
            axes = map(_values, self.parse_overrides(words + arguments))
            combinations = [*itertools.product(*axes)]
            quiet = not sys.stdout.isatty()
            for chosen in track(combinations, "composing jobs", transient=True, disable=quiet):
                job = self.make_job(list(chosen), len(jobs))
                jobs.setdefault(job.fingerprint, job)
        return list(jobs.values())


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{key}: a grid has values, not an interval: list values, or search with "
            "hydra/sweeper=search"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
