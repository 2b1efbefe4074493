"""Training of an image classifier. Nothing here knows about compression."""

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.classification import MulticlassHammingDistance

from fitsmall.experiments.models.scheduled import ScheduledModule

__all__ = ["Classifier"]

Batch = tuple[Tensor, Tensor]


class Classifier(ScheduledModule):
    """Minimise the cross-entropy; log ``train/loss``, ``val/error`` and ``test/error``.

    Errors are fractions of wrong answers. The network maps images to logits.

    Args:
        args: Arguments of :class:`~fitsmall.experiments.models.scheduled.ScheduledModule`.
        classes: Number of classes.
        kwargs: Keyword arguments of the same class.
    """

    def __init__(self, *args: Any, classes: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # With micro averaging, the Hamming distance is the fraction of wrong answers.
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
        self._log_error("val/error", batch)

    def test_step(self, batch: Batch, index: int) -> None:
        self._log_error("test/error", batch)

    def _log_error(self, name: str, batch: Batch) -> None:
        images, labels = batch
        self.error(self(images), labels)
        self.log(name, self.error, on_step=False, on_epoch=True, prog_bar=True)
