"""Lightning's ModelCheckpoint and EarlyStopping, which ignore weights not yet fully compressed."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fitsmall.callbacks.driver import plan_of
from fitsmall.callbacks.monitored import MonitoredMetric

__all__ = ["EarlyStoppingOnceCompressed", "ModelCheckpointOnceCompressed"]


class _OnceCompressed(pl.Callback):
    """Calls no hook of a callback until every stage has reached its full strength.

    A metric that is not logged is an error after the first epoch that validates, and not only then.
    """

    monitor: Any  # text, or None for no metric
    _validated = False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if _compressed(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compressed(trainer):
            super().on_train_epoch_end(trainer, pl_module)
        elif self.monitor and (self._validated or not trainer.enable_validation):
            MonitoredMetric(self.monitor, "min").validated(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = self._validated or not trainer.sanity_checking
        if _compressed(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compressed(trainer):
            super().on_train_end(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if _compressed(trainer):
            super().on_exception(trainer, pl_module, exception)


class ModelCheckpointOnceCompressed(_OnceCompressed, ModelCheckpoint):
    """Lightning's ModelCheckpoint, from the moment on when every stage is at its full strength.

    The dense network at the beginning usually has a lower error than the compressed one at the end,
    and would be the best of all epochs. It takes ModelCheckpoint's arguments. For resuming add a
    plain ModelCheckpoint.
    """


class EarlyStoppingOnceCompressed(_OnceCompressed, EarlyStopping):
    """Lightning's EarlyStopping, from the moment on when every stage is at its full strength.

    It takes EarlyStopping's arguments.
    """


def _compressed(trainer: pl.Trainer) -> bool:
    plan = plan_of(trainer)
    return plan is None or plan.complete
