"""The stages of compression as callbacks of a Trainer, with the same arguments."""

import lightning.pytorch as pl

from fitsmall.callbacks.checkpoint import CompressedCheckpoint
from fitsmall.callbacks.driver import StageCallback
from fitsmall.compressors import training

__all__ = [
    "ChannelPruning",
    "GradualPruning",
    "LearningCompression",
    "QuantizationAwareTraining",
    "RankLearning",
    "SizeTarget",
    "WeightSharing",
]


class ChannelPruning(StageCallback, training.ChannelPruning):
    __doc__ = training.ChannelPruning.__doc__


class GradualPruning(StageCallback, training.GradualPruning):
    __doc__ = training.GradualPruning.__doc__


class WeightSharing(StageCallback, training.WeightSharing):
    __doc__ = training.WeightSharing.__doc__


class QuantizationAwareTraining(StageCallback, training.QuantizationAwareTraining):
    __doc__ = training.QuantizationAwareTraining.__doc__


class RankLearning(StageCallback, training.RankLearning):
    __doc__ = training.RankLearning.__doc__


class LearningCompression(StageCallback, training.LearningCompression):
    __doc__ = training.LearningCompression.__doc__


class SizeTarget(StageCallback, training.SizeTarget):
    __doc__ = training.SizeTarget.__doc__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The size is that of the file which the Trainer's callback writes.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CompressedCheckpoint):
                self.coder = callback.coder
        super().setup(trainer, pl_module, stage)
