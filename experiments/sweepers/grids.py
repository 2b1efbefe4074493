"""A union of grids, which goes on where it was stopped."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra_plugins.fitsmall.jobs import Job, Jobs
from rich.progress import track

__all__ = ["Grids"]


class Grids(Jobs):
    """Every combination of the values of each grid; combinations that mean the same run once.

    What is given on the command line replaces what a grid says of the same key. Runs that have
    finished in this sweep's folder are not launched again, and one that fails does not stop the
    others.

    Args:
        params: Values of every grid, by key, as on the command line: ``{"seed": "0,1,2"}``.
        grids: Values of each grid on top.
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
        self.summarize(jobs)
        done = sum(job.done for job in jobs)
        print(f"{len(jobs)} jobs in {folder}, {done} of them finished before")
        return [self.launch(jobs)]

    def _jobs(self, arguments: list[str]) -> list[Job]:
        found: dict[str, Job] = {}
        for grid in self.grids:
            words = [f"{key}={value}" for key, value in {**self.params, **grid}.items()]
            values = map(_values, self.parse(words + arguments))
            chosen_values = [*itertools.product(*values)]
            quiet = not sys.stdout.isatty()
            for chosen in track(chosen_values, "composing jobs", transient=True, disable=quiet):
                job = self.job(list(chosen), len(found))
                found.setdefault(job.key, job)
        return list(found.values())


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{key}: a grid has values, not an interval: name values, or search with "
            "hydra/sweeper=search"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
