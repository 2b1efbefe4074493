"""A LightningModule with a learning rate that warms up and decays along a cosine."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["ScheduledModule", "warmup_cosine"]


def warmup_cosine(progress: float, warmup: float, floor: float) -> float:
    r"""Factor of the learning rate: linear from 0 to 1, then half a cosine from 1 to ``floor``.

    Args:
        progress: Fraction of training.
        warmup: Fraction of training in which the factor rises.
        floor: Factor at the end.

    Example:
        >>> [round(warmup_cosine(t, warmup=0.2, floor=0.1), 4) for t in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup:
        return progress / warmup
    fraction = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * fraction)) / 2


class ScheduledModule(pl.LightningModule):
    """A network with its optimizer and the schedule of :func:`warmup_cosine`.

    Args:
        net: The network.
        optimizer: Function from the parameters to their optimizer.
        warmup: Fraction of training in which the learning rate rises.
        floor: Last learning rate, as a fraction of the highest one.
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
        # Steps count from one: a learning rate of zero would waste the first.
        factor = partial(_factor, total=total, warmup=self.warmup, floor=self.floor)
        schedule = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _factor(step: int, total: float, warmup: float, floor: float) -> float:
    return warmup_cosine(min(1.0, (step + 1) / total), warmup, floor)
