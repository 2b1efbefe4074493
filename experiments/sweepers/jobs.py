"""The jobs of a sweep: their folders, the results of an earlier sweep, and the progress display."""

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
from hydra_plugins.fitsmall.progress import Progress
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fitsmall.experiments.run.fingerprint import fingerprint
from fitsmall.experiments.run.folder import find_result
from fitsmall.experiments.study.summary import Summary

__all__ = ["Job", "JobSweeper"]


class Job(NamedTuple):
    """One job of a sweep.

    Args:
        overrides: Overrides of its configuration.
        fingerprint: Fingerprint of its configuration.
        folder: Folder that it writes to.
        is_numbered: Whether the folder's name is the job's number, which changes with the sweep.
        is_finished: Whether the folder already holds its result.
    """

    overrides: list[str]
    fingerprint: str
    folder: Path
    is_numbered: bool
    is_finished: bool


class JobSweeper(Sweeper):
    """Run the jobs of a sweep that have no result yet; a job that fails does not stop the others.

    Subclasses choose the jobs in ``sweep``.
    """

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
        """Create the sweep's folder, and record the sweep's configuration in it."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return folder

    def parse_overrides(self, words: list[str]) -> list[Override]:
        """Parse overrides. If a key occurs twice, its last value stands at its first position."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        return list({o.get_key_element(): o for o in parser.parse_overrides(words)}.values())

    def make_job(self, overrides: list[str], number: int) -> Job:
        """Compose a job's configuration and look for its result.

        Args:
            overrides: Overrides of the job.
            number: Its number in the sweep.
        """
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        hydra_config = HydraConfig.instance()
        before = hydra_config.cfg
        try:
            next_folder, folder = _folder(config, number + 1), _folder(config, number)
            # The running job has this value too.
            with read_write(config.hydra), open_dict(config):
                config.hydra.runtime.output_dir = str(folder.absolute())
            hydra_config.set_config(config)
            is_finished = find_result(config) is not None
            is_numbered = folder != next_folder
            return Job(overrides, fingerprint(config), folder, is_numbered, is_finished)
        finally:
            hydra_config.cfg = before

    def summarize_only(self, jobs: Sequence[Job]) -> None:
        """Restrict the summary to these jobs: the folder may hold results of other sweeps."""
        for callback in self.context.callbacks.callbacks:
            if isinstance(callback, Summary):
                callback.jobs = {job.folder: job.fingerprint for job in jobs}

    def run_jobs(self, jobs: Sequence[Job], first: int = 0) -> Sequence[JobReturn]:
        """Run the jobs that are not finished, and display the progress of all.

        Args:
            jobs: Jobs with consecutive numbers.
            first: Number of the first one.
        """
        common = set.intersection(*(set(job.overrides) for job in jobs))
        labels = {
            job.folder: " ".join(o for o in job.overrides if o not in common) or "the only job"
            for job in jobs
        }
        # A finished job in a numbered folder keeps its turn, or those after it would change folder.
        open_jobs = [job.overrides for job in jobs if job.is_numbered or not job.is_finished]
        with Progress(labels, {job.folder for job in jobs if job.is_finished}):
            return self.launcher.launch(open_jobs, initial_job_idx=first) if open_jobs else []


def _folder(config: DictConfig, number: int) -> Path:
    """Give a configuration this number, and return the folder that follows from it."""
    with read_write(config.hydra), open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    HydraConfig.instance().set_config(config)
    return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
