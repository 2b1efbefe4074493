"""A note of how far a training is, for whoever watches the sweep that it belongs to."""

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from fitsmall.callbacks import Method
from fitsmall.experiments.run.fingerprint import record

__all__ = ["Note"]

_EVERY = 1.0  # seconds


class Note(pl.Callback):
    """Write step, steps, and the seconds that are left into a file, once a second.

    Args:
        path: File to write; whoever starts the training removes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.began = self.written = 0.0
        self.first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began, self.written, self.first = time.time(), 0.0, trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        now = time.time()
        if now - self.written < _EVERY or not trainer.is_global_zero:
            return
        self.written = now
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        pace = (now - self.began) / max(1, step - self.first)
        methods = any(isinstance(callback, Method) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        note = {
            "phase": "compressing" if methods else "training",
            "step": step,
            "steps": steps,
            "left": pace * max(0, steps - step),
            "time": now,
        }
        record(self.path, note)
