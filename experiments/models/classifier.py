"""Training of an image classifier: nothing here knows of compression."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.classification import MulticlassHammingDistance

from fitsmall.experiments.models.scheduled import Scheduled

__all__ = ["Classifier"]

Batch = tuple[Tensor, Tensor]


class Classifier(Scheduled):
    r"""Minimise cross-entropy; log ``train/loss``, ``val/error``, ``test/error`` (fractions).

    Args:
        args: Of :class:`~fitsmall.experiments.models.scheduled.Scheduled`; the network takes images
            to logits.
        classes: Number of classes.
        kwargs: As ``args``.
    """

    def __init__(self, *args: Any, classes: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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

    def _measure(self, name: str, batch: Batch) -> None:
        images, labels = batch
        self.error(self(images), labels)
        self.log(name, self.error, on_step=False, on_epoch=True, prog_bar=True)
