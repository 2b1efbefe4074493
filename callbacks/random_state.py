"""Exact resuming: the random state and the position in the data, saved in checkpoints."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist

from fitsmall.callbacks.lightning_internals import (
    batch_counts,
    before_first_fetch,
    count_epoch_that_begins,
    forget_last_save,
    loader_states,
    require,
    restore_logged_batches,
    run_missed_validation,
    stateful_loaders,
    validation_is_due,
)
from fitsmall.compressors.training.messages import warn
from fitsmall.compressors.training.sharding import processes

__all__ = ["RandomState"]


class RandomState(pl.Callback):
    """A callback that saves the random state of every process in checkpoints.

    The generators are those of Python, NumPy, and torch on the CPU and on every CUDA device. With a
    :class:`ResumableLoader`, or another loader whose order does not depend on them, a resumed
    training then equals the uninterrupted one bit for bit. That includes dropout, and augmentation
    in the training process.

    It also corrects four things that differ in a training that Lightning resumes: the position of
    stateful loaders where ``configure_optimizers`` asks for ``estimated_stepping_batches``, a
    checkpoint that ModelCheckpoint would write at the first batch, a random number that Lightning
    draws for the validation loader, and a validation that was due when the checkpoint was written,
    unless training ended there.

    Checkpoints do not hold accumulated gradients. Resuming from one that was written between two
    optimizer steps, for example by a validation, is not exact; a warning says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, Any] | None = None
        self.places: list[dict[str, int]] = []
        self.fitting = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        if self.fitting:
            require("RandomState")

    def state_dict(self) -> dict[str, Any]:
        _, world = processes()
        states = [_state()] * world
        if world > 1:
            dist.all_gather_object(states, states[0])
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fitting:
            self.saved = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        counts = batch_counts(trainer, checkpoint)
        checkpoint["callbacks"].setdefault(self.state_key, {}).update(
            logged=counts.logged,
            epoch=trainer.current_epoch,
            validate=bool(counts.pending) and validation_is_due(trainer),
        )
        if trainer.training and counts.accumulated and not counts.is_last_batch:
            warn(
                f"RandomState: a checkpoint was written {counts.accumulated} batches after step "
                f"{trainer.global_step:,}, without the gradients accumulated since then: resuming "
                "from it will not be exact; save with every_n_train_steps"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.fitting:
            self.places = loader_states(checkpoint)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for loader, place in zip(stateful_loaders(trainer), self.places, strict=False):
            loader.load_state_dict(place)
        self.places = []
        forget_last_save(trainer.checkpoint_callbacks, trainer.global_step)
        if trainer.global_step > 0:
            before_first_fetch(trainer, lambda: self._continue(trainer))
        if self.saved is None:
            return
        if len(self.saved["processes"]) != trainer.world_size:
            warn(
                f"RandomState: the checkpoint is from {len(self.saved['processes'])} processes, "
                f"and this training has {trainer.world_size}: random numbers will differ"
            )
        self._restore(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._catch_up(trainer)

    def _continue(self, trainer: pl.Trainer) -> None:
        """Continue just before the first batch is read, whose augmentation may draw numbers."""
        count_epoch_that_begins(trainer)
        self._catch_up(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        states = self.saved["processes"] if self.saved else []
        if len(states) == trainer.world_size:
            _set_state(states[trainer.global_rank])

    def _catch_up(self, trainer: pl.Trainer) -> None:
        """Restore random states and the step of logged values; run a validation that was due."""
        if self.saved is None:
            return
        self._restore(trainer)  # Lightning may have drawn a random number since on_train_start
        restore_logged_batches(trainer, self.saved["logged"])
        if self.saved["validate"]:
            run_missed_validation(trainer, self.saved["epoch"])
        self.saved = None


def _state() -> dict[str, Any]:
    """Return this process's state as plain numbers and tensors, for ``weights_only=True``."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_state(state: dict[str, Any]) -> None:
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
