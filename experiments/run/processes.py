"""Processes that train one network together, and jobs that need the same work done."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from fitsmall.experiments.run.folder import write_text

__all__ = ["end_process_group", "is_rank_zero", "make_once", "process_group_id"]

_POLL = 0.1  # seconds
_GROUP_ID = "FITSMALL_JOB"

T = TypeVar("T")


def is_rank_zero() -> bool:
    """True on the first of the processes that train together, and without others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def end_process_group() -> None:
    """Wait for the other processes and end the group; after it, each process works alone."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def make_once(path: Path, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """Do work that several jobs need in the first job that asks; the others wait for its result.

    All processes of that job call ``make``, since they train together. Rank zero tells the others
    to begin by a file with the id of their group: a cluster starts all processes at the same time,
    those of other jobs among them.

    Args:
        path: Where the result will be. The lock and the file for other ranks get its name with
            another suffix.
        find: Returns the result if it exists, else None.
        make: Makes the result, and returns it.
    """
    group = process_group_id()
    begun = path.with_suffix(".begun")
    if not is_rank_zero():
        while (found := find()) is None:
            if begun.is_file() and begun.read_text() == group:
                return make()
            time.sleep(_POLL)
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for {path}, which another job makes")
        lock.acquire()
    try:
        if (found := find()) is None:
            write_text(begun, group)
            found = make()
        return found
    finally:
        begun.unlink(missing_ok=True)
        lock.release()


def process_group_id() -> str:
    """A text that is equal for processes that train together, and for no others."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # alone it is the same for all runs by default
        names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"]
    elif "SLURM_JOB_ID" in os.environ:
        names = ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    else:  # processes that Lightning starts inherit the environment of the first
        os.environ.setdefault(_GROUP_ID, uuid.uuid4().hex)
        names = [_GROUP_ID]
    return " ".join(os.environ.get(name, "") for name in names)
