"""The job that Hydra runs for ``fitsmall train``, once or for each point of a sweep.

It does nothing if its result exists. Else it is one run, or with a budget a training and the
compression that follows it.
"""

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from fitsmall.experiments.run.budget import BUDGET_UNITS
from fitsmall.experiments.run.experiment import run_experiment
from fitsmall.experiments.run.folder import PROGRESS_FILE, find_result, write_text
from fitsmall.experiments.run.processes import end_process_group
from fitsmall.experiments.run.within_budget import run_within_budget

__all__ = ["main"]


@hydra.main(version_base="1.3", config_path="pkg://fitsmall.configs", config_name="train")
def main(config: DictConfig) -> float:
    """Run one job.

    Returns:
        The validation metric, which a sweeper may minimise.
    """
    job: Any = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    overrides = [*_config_search_words(job), *job.overrides.task]
    # Distributed training starts its other processes with the command line of this one. It must
    # name the command, even in a process of a launcher, and describe this job alone.
    command = Path(sys.executable).with_name("fitsmall")
    sys.argv = [str(command) if command.is_file() else sys.argv[0], "train", *overrides]
    sys.modules["__main__"].__spec__ = None
    with read_write(job), open_dict(job):
        job.run.dir = str(folder)
    try:
        if job.mode == RunMode.MULTIRUN:
            parts = Path(job.sweep.dir).parts[-2:]
            config.group = config.group or "/".join(part for part in parts if part != "runs")
            return _run_in_sweep(config, overrides, folder)
        return _run(config, overrides)
    finally:
        (folder / PROGRESS_FILE).unlink(missing_ok=True)


def _config_search_words(job: Any) -> list[str]:
    """Command-line words that name configurations outside this package."""
    paths = (s.path for s in job.runtime.config_sources if s.provider == "command-line")
    words = [f"--config-dir={path}" for path in paths]
    if job.job.config_name != "train":
        words.append(f"--config-name={job.job.config_name}")
    return words + [o for o in job.overrides.hydra if o.startswith("hydra.searchpath")]


def _run_in_sweep(config: DictConfig, overrides: list[str], folder: Path) -> float:
    """Run a job whose output goes to ``log.txt`` and whose error goes to ``error.txt``, and leave
    the process ready for the next job."""
    failure, environment = folder / "error.txt", dict(os.environ)
    failure.unlink(missing_ok=True)
    try:
        with open(folder / "log.txt", "a") as log, _output_to(log):
            return _run(config, overrides)
    except Exception as error:
        command = shlex.join(["fitsmall", "train", *overrides, f"hydra.run.dir={folder}"])
        text = f"{command}\n\n{traceback.format_exc()}"
        if isinstance(error, InstantiationException) and error.__cause__:
            # Hydra's message only names the call that failed.
            text += "".join(traceback.format_exception_only(error.__cause__))
        write_text(failure, text)
        raise
    finally:
        if dist.is_available() and dist.is_initialized():  # the job has failed
            dist.destroy_process_group()
        # Lightning leaves rank and world size in the environment. With them the next job would
        # take itself for a process that somebody else had started.
        os.environ.clear()
        os.environ.update(environment)


def _run(config: DictConfig, overrides: list[str]) -> float:
    has_budget = any(config.budget[unit] is not None for unit in BUDGET_UNITS)
    run = run_within_budget if has_budget else run_experiment
    result = find_result(config) or run(config, overrides)
    end_process_group()
    return float(result["error_validation"])


@contextmanager
def _output_to(file: TextIO) -> Iterator[None]:
    """Write prints, logs and warnings to a file: the jobs of a sweep share one terminal."""
    loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch", "lightning.fabric")]
    handlers = [
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
    ]
    streams = [handler.setStream(file) for handler in handlers]
    try:
        with redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            if stream is not None:
                handler.setStream(stream)
