"""The best weights, once they are compressed: what counts before would be a dense network."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from fitsmall.callbacks.method import plan_of

__all__ = ["EarlyStoppingOnceCompressed", "ModelCheckpointOnceCompressed"]


class _OnceCompressed(pl.Callback):
    """Hides a training from a callback until every method has reached its full strength."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if _compressed(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compressed(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
    """Lightning's ModelCheckpoint, which sees nothing of the training until every method has
    reached its full strength.

    A dense network has a lower error than the compressed one that it becomes: the best of all
    epochs would come from before. It takes ModelCheckpoint's arguments; for resuming keep a plain
    ModelCheckpoint beside it.
    """


class EarlyStoppingOnceCompressed(_OnceCompressed, EarlyStopping):
    """Lightning's EarlyStopping, whose patience begins when every method has reached its full
    strength. It takes EarlyStopping's arguments."""


def _compressed(trainer: pl.Trainer) -> bool:
    plan = plan_of(trainer)
    return plan is None or plan.complete
