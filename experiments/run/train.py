"""What ``fitsmall train`` does for each job: nothing if it was done before, else a run, or all that
belongs to one budget."""

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

from fitsmall.experiments.run.budget import AMOUNTS, spend
from fitsmall.experiments.run.fingerprint import finished, write
from fitsmall.experiments.run.job import disband, run
from fitsmall.experiments.run.progress import NOTE

__all__ = ["main"]


@hydra.main(version_base="1.3", config_path="pkg://fitsmall.configs", config_name="train")
def main(config: DictConfig) -> float:
    """What Hydra runs for each job; returns the held-out error, which a sweeper may minimise."""
    job: Any = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    overrides = [*_own_configurations(job), *job.overrides.task]
    # Distributed training starts its other processes by the words and the folder of this one. They
    # must name the command, also where this is a process of a launcher, and this job alone.
    command = Path(sys.executable).with_name("fitsmall")
    sys.argv = [str(command) if command.is_file() else sys.argv[0], "train", *overrides]
    sys.modules["__main__"].__spec__ = None
    with read_write(job), open_dict(job):
        job.run.dir = str(folder)
    try:
        if job.mode == RunMode.MULTIRUN:
            parts = Path(job.sweep.dir).parts[-2:]
            config.group = config.group or "/".join(part for part in parts if part != "runs")
            return _one_of_many(config, overrides, folder)
        return _job(config, overrides)
    finally:
        (folder / NOTE).unlink(missing_ok=True)


def _own_configurations(job: Any) -> list[str]:
    """The words that say where configurations are beside those of this package."""
    paths = (s.path for s in job.runtime.config_sources if s.provider == "command-line")
    words = [f"--config-dir={path}" for path in paths]
    if job.job.config_name != "train":
        words.append(f"--config-name={job.job.config_name}")
    return words + [o for o in job.overrides.hydra if o.startswith("hydra.searchpath")]


def _one_of_many(config: DictConfig, overrides: list[str], folder: Path) -> float:
    """A job of a sweep, which goes on if it fails; what went wrong is to be found later."""
    failure, environment = folder / "error.txt", dict(os.environ)
    failure.unlink(missing_ok=True)
    try:
        with open(folder / "log.txt", "a") as log, _output_into(log):
            return _job(config, overrides)
    except Exception as error:
        command = shlex.join(["fitsmall", "train", *overrides, f"hydra.run.dir={folder}"])
        text = f"{command}\n\n{traceback.format_exc()}"
        if isinstance(error, InstantiationException) and error.__cause__:  # Hydra's end says less
            text += "".join(traceback.format_exception_only(error.__cause__))
        write(failure, text)
        raise
    finally:
        if dist.is_available() and dist.is_initialized():  # it has failed
            dist.destroy_process_group()
        # Where Lightning has left the number of this process and of all, the next job would take
        # itself for one of many that someone else had started.
        os.environ.clear()
        os.environ.update(environment)


def _job(config: DictConfig, overrides: list[str]) -> float:
    budgeted = any(config.budget[amount] is not None for amount in AMOUNTS)
    result = finished(config) or (spend if budgeted else run)(config, overrides)
    disband()
    return float(result["error_validation"])


@contextmanager
def _output_into(file: TextIO) -> Iterator[None]:
    """Send what a job prints, logs and warns of into a file: jobs share one terminal."""
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
