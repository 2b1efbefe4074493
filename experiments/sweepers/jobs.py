"""What sweepers share: jobs, their folders, what was done before, and the display."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fitsmall.experiments.run.fingerprint import fingerprint, finished
from fitsmall.experiments.run.progress import Progress
from fitsmall.experiments.study.summary import Summary

__all__ = ["Job", "Jobs"]


class Job(NamedTuple):
    """A job of a sweep.

    Args:
        words: Its overrides.
        key: Fingerprint of its configuration.
        folder: Where it writes.
        numbered: Whether its folder is named by its place in the sweep, and moves with it.
        done: Whether it has finished there before.
    """

    words: list[str]
    key: str
    folder: Path
    numbered: bool
    done: bool


class Jobs(Sweeper):
    """Launches jobs that have not finished before; one that fails does not stop the others."""

    config: DictConfig
    context: HydraContext
    launcher: Launcher

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def open_folder(self) -> Path:
        """Make the sweep's own folder, which holds what Hydra was told."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return folder

    def parse(self, words: list[str]) -> list[Override]:
        """Overrides, of which the last one of a key counts, at the place of the first."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        return list({o.get_key_element(): o for o in parser.parse_overrides(words)}.values())

    def job(self, words: list[str], number: int) -> Job:
        """The job of these words."""
        config = self.context.config_loader.load_sweep_config(self.config, words)
        before = HydraConfig.instance().cfg
        try:
            numbered = _folder(config, number + 1) != (folder := _folder(config, number))
            # As the job itself finds it.
            with read_write(config.hydra), open_dict(config):
                config.hydra.runtime.output_dir = str(folder.absolute())
            HydraConfig.instance().set_config(config)
            return Job(words, fingerprint(config), folder, numbered, finished(config) is not None)
        finally:
            HydraConfig.instance().cfg = before

    def summarize(self, jobs: Sequence[Job]) -> None:
        """Let the summary be one of these alone: what else is in the folder is of other sweeps."""
        for callback in self.context.callbacks.callbacks:
            if isinstance(callback, Summary):
                callback.jobs = {job.folder: job.key for job in jobs}

    def launch(self, jobs: Sequence[Job], first: int = 0) -> Sequence[JobReturn]:
        """Run those that are not done, with a display of all."""
        common = set.intersection(*(set(job.words) for job in jobs))
        names = {
            job.folder: " ".join(word for word in job.words if word not in common) or "the only job"
            for job in jobs
        }
        # Without one of them, those behind it would have other numbers.
        left = [job.words for job in jobs if job.numbered or not job.done]
        with Progress(names, {job.folder for job in jobs if job.done}):
            return self.launcher.launch(left, initial_job_idx=first) if left else []


def _folder(config: DictConfig, number: int) -> Path:
    with read_write(config.hydra), open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
