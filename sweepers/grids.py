"""A union of grids, which goes on where it was stopped."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pressfit.experiments.fingerprint import fingerprint, finished
from pressfit.experiments.progress import Progress

__all__ = ["Grids"]


class Grids(Sweeper):
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
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        jobs = self._jobs(arguments)
        left = [words for words, _, done in jobs if not done]
        print(f"{len(jobs)} jobs in {folder}, {len(jobs) - len(left)} of them finished before")
        common = set.intersection(*(set(words) for words, _, _ in jobs))
        names = {
            path: " ".join(word for word in words if word not in common) or "the only job"
            for words, path, _ in jobs
        }
        with Progress(names):
            return [self.launcher.launch(left, initial_job_idx=0)] if left else []

    def _jobs(self, arguments: list[str]) -> list[tuple[list[str], Path, bool]]:
        """The words of each job, its folder, and whether it is done."""
        found: dict[str, tuple[list[str], Path, bool]] = {}
        for words in self._combinations(arguments):
            config, numbered = self._compose(words, len(found))
            key = fingerprint(config)
            # A sweep whose folders are numbers has no way to tell what was done in them.
            found.setdefault(
                key, (words, Path(config.folder), not numbered and finished(config) is not None)
            )
        return list(found.values())

    def _combinations(self, arguments: list[str]) -> list[list[str]]:
        assert self.context is not None
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        combinations = []
        for grid in self.grids:
            words = [f"{key}={value}" for key, value in {**self.params, **grid}.items()]
            # By key, so that the last one counts, at the place of the first.
            values = {
                o.get_key_element(): _values(o) for o in parser.parse_overrides(words + arguments)
            }
            combinations += [list(chosen) for chosen in itertools.product(*values.values())]
        return combinations

    def _compose(self, words: list[str], number: int) -> tuple[DictConfig, bool]:
        """A job's configuration with its folder, and whether that depends on the job's number."""
        assert self.context is not None
        assert self.config is not None
        config = self.context.config_loader.load_sweep_config(self.config, words)
        before = HydraConfig.instance().cfg
        folders = []
        try:
            for id in (number, number + 1):
                with read_write(config.hydra), open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = id
                HydraConfig.instance().set_config(config)
                sweep = config.hydra.sweep
                folders.append(str(Path(str(sweep.dir)) / str(sweep.subdir)))
            with read_write(config.hydra), open_dict(config):
                config.hydra.runtime.output_dir = folders[0]
                config.folder = folders[0]
        finally:
            HydraConfig.instance().cfg = before
        return config, folders[0] != folders[1]


def _values(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise HydraException(
            f"{key}: a grid has values, and {override.get_value_element_as_str()} is an interval: "
            "name them, or search with hydra/sweeper=optuna"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
