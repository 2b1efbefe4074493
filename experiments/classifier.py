"""Training of an image classifier, as anyone would write it: nothing here knows of compression."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import lightning.pytorch as pl
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassHammingDistance

__all__ = ["Classifier", "warmup_cosine"]

Batch = tuple[Tensor, Tensor]


def warmup_cosine(progress: float, warmup: float, floor: float) -> float:
    r"""Learning-rate factor: up in a line, then down half a cosine from 1 to ``floor``.

    Example:
        >>> [round(warmup_cosine(t, warmup=0.2, floor=0.1), 4) for t in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup:
        return progress / warmup
    fraction = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * fraction)) / 2


class Classifier(pl.LightningModule):
    r"""Minimise cross-entropy; log ``train/loss``, ``val/error``, ``test/error`` (fractions).

    Args:
        net: Images to logits.
        optimizer: Makes the optimizer, given the parameters.
        warmup: Fraction of training in which the learning rate rises.
        floor: Fraction of the learning rate that is left at the end.
        classes: Number of classes.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        warmup: float = 0.02,
        floor: float = 0.02,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.warmup, self.floor = warmup, floor
        # With micro averaging this is the fraction of wrong answers.
        self.error = MulticlassHammingDistance(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self._measure("val/error", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self._measure("test/error", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        total = self.trainer.estimated_stepping_batches
        # The first step counts as one: a learning rate of exactly zero would waste it.
        factor = partial(_factor, total=total, warmup=self.warmup, floor=self.floor)
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _measure(self, name: str, batch: Batch) -> None:
        images, labels = batch
        self.error(self(images), labels)
        self.log(name, self.error, on_step=False, on_epoch=True, prog_bar=True)


def _factor(step: int, total: float, warmup: float, floor: float) -> float:
    return warmup_cosine(min(1.0, (step + 1) / total), warmup, floor)
