"""Training of an image classifier, as anyone would write it: nothing here knows of compression."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
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

    With self-distillation the network, as it is at ``distill_start``, becomes the teacher of its
    later self (Hinton et al., 2015): the loss is
    ``(1 - a) H(y, p) + a T^2 KL(teacher_T || p_T)`` with softened predictions at temperature T.
    The teacher is dense if compression starts no earlier; it is no part of the state dict.

    Args:
        net: Images to logits.
        optimizer: Makes the optimizer, given the parameters.
        warmup: Fraction of training in which the learning rate rises.
        floor: Fraction of the learning rate that is left at the end.
        label_smoothing: Probability that is spread over all classes.
        distill: Weight ``a`` of the teacher in the loss.
        temperature: Temperature ``T`` of both predictions.
        distill_start: Fraction of training at which the teacher is copied.
        classes: Number of classes.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        warmup: float = 0.02,
        floor: float = 0.02,
        label_smoothing: float = 0.0,
        distill: float = 0.0,
        temperature: float = 4.0,
        distill_start: float = 0.1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.warmup, self.floor = warmup, floor
        self.label_smoothing = label_smoothing
        self.distill, self.temperature, self.distill_start = distill, temperature, distill_start
        # With micro averaging this is the fraction of wrong answers.
        self.error = MulticlassHammingDistance(classes, average="micro")
        # In a list, since a submodule would enter the state dict, and so the compressed file.
        self._teacher: list[nn.Module] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, index: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        for teacher in self._teacher:
            with torch.no_grad():
                target = F.log_softmax(teacher(images) / self.temperature, 1)
            soft = F.log_softmax(logits / self.temperature, 1)
            gap = F.kl_div(soft, target, reduction="batchmean", log_target=True)
            loss = (1 - self.distill) * loss + self.distill * self.temperature**2 * gap
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        total = self.trainer.estimated_stepping_batches
        if self.distill and not self._teacher and self.global_step >= self.distill_start * total:
            self._teacher.append(self._frozen())

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher"] = [teacher.state_dict() for teacher in self._teacher]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._teacher = [self._frozen() for _ in checkpoint["teacher"]]
        for teacher, state in zip(self._teacher, checkpoint["teacher"], strict=True):
            teacher.load_state_dict(state)

    def _frozen(self) -> nn.Module:
        return copy.deepcopy(self.net).eval().requires_grad_(False)

    def _measure(self, name: str, batch: Batch) -> None:
        images, labels = batch
        self.error(self(images), labels)
        self.log(name, self.error, on_step=False, on_epoch=True, prog_bar=True)


def _factor(step: int, total: float, warmup: float, floor: float) -> float:
    return warmup_cosine(min(1.0, (step + 1) / total), warmup, floor)
