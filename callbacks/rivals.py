"""Rivals: callbacks and strategies that would silently undo compression."""

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy

from fitsmall.callbacks.lightning_internals import require
from fitsmall.compressors.training.stage import Stage

__all__ = ["ProjectedAverage", "refuse_rivals"]


class ProjectedAverage(pl.Callback):
    """A marker of callbacks that average latents and use the projection of the average."""


def refuse_rivals(trainer: pl.Trainer, stages: Sequence[Stage]) -> None:
    """Refuse callbacks and strategies that cannot be combined with stages of compression.

    Raises:
        MisconfigurationException: The Trainer has one; the message names it and a remedy.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    new = [type(stage).__name__ for stage in stages if stage.replaces_parameters]
    if any(stage.replaces_layers for stage in stages) and isinstance(trainer.strategy, DDPStrategy):
        require("RankLearning and ChannelPruning under DDP")
    for callback in callbacks:
        name = type(callback).__name__
        averages = isinstance(callback, StochasticWeightAveraging | WeightAveraging)
        if averages and not isinstance(callback, ProjectedAverage):
            raise MisconfigurationException(
                f"{name} averages weights, and an average of sparse weights is not sparse, nor one "
                "of shared weights shared: use fitsmall.callbacks.EMA, which projects the average"
            )
        if averages and new:
            raise MisconfigurationException(
                f"{name} cannot average a network whose layers {new[0]} replaces: average in "
                "another training, after this one"
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"{name} keeps masks of its own, which other methods do not respect: use "
                "fitsmall.callbacks.GradualPruning"
            )
    sharded = {"FSDPStrategy", "DeepSpeedStrategy"}
    if sharded.intersection(base.__name__ for base in type(trainer.strategy).__mro__):
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} flattens all parameters into one, so that methods "
            "cannot find weights: use ModelParallelStrategy, which is FSDP2, or strategy='ddp'"
        )
