"""Training with a warm-up and half a cosine, as anyone would write it."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Scheduled", "warmup_cosine"]


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


class Scheduled(pl.LightningModule):
    """A network, its optimizer, and the learning rate of each step.

    Args:
        net: The network.
        optimizer: Makes the optimizer, given the parameters.
        warmup: Fraction of training in which the learning rate rises.
        floor: Fraction of the learning rate that is left at the end.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        warmup: float = 0.02,
        floor: float = 0.02,
    ) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.warmup, self.floor = warmup, floor

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


def _factor(step: int, total: float, warmup: float, floor: float) -> float:
    return warmup_cosine(min(1.0, (step + 1) / total), warmup, floor)
