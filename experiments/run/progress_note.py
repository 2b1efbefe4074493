"""A file that tells how far a training is. The display of a sweep reads it."""

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from fitsmall.compressors.training import Stage
from fitsmall.experiments.run.folder import write_json

__all__ = ["ProgressNote"]

_INTERVAL = 1.0  # seconds


class ProgressNote(pl.Callback):
    """Write the current step, the number of steps and the seconds left to a file, once a second.

    Args:
        path: JSON file to write. The callback leaves it there; the caller removes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.start_time = self.write_time = 0.0
        self.start_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start_time, self.write_time = time.time(), 0.0
        self.start_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        now = time.time()
        if now - self.write_time < _INTERVAL or not trainer.is_global_zero:
            return
        self.write_time = now
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        seconds_per_step = (now - self.start_time) / max(1, step - self.start_step)
        compresses = any(isinstance(callback, Stage) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        note = {
            "phase": "compressing" if compresses else "training",
            "step": step,
            "steps": steps,
            "left": seconds_per_step * max(0, steps - step),
            "time": now,
        }
        write_json(self.path, note)
