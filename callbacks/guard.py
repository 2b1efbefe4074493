"""An accuracy guard: compression waits while the network recovers."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fitsmall.callbacks.method import plan_of
from fitsmall.callbacks.monitored import Metric

__all__ = ["AccuracyGuard"]


class AccuracyGuard(pl.Callback):
    """Hold all schedules while a metric is worse than its best by more than a tolerance.

    After each validation the metric is compared with the best one so far. While it is worse by more
    than ``tolerance``, and some method has begun, all windows stand still: nothing more is pruned
    or moved towards its cluster, no other method begins, and training goes on at the strength that
    has been reached. They go on when the metric is back within the tolerance. The steps in between
    push the rest of the windows back, so that a training may end before they do; it says so then.

    ``compression/held`` is logged, 1 while schedules stand still. What was decided is saved in
    checkpoints, and the same on all processes.

    Args:
        monitor: Name of the metric of the validation.
        tolerance: Most that it may be worse than the best, in its own units: 0.02 is two
            percentage points of an error that is a fraction.
        mode: ``"min"`` if it is an error, ``"max"`` if it is an accuracy.
    """

    def __init__(
        self,
        monitor: str = "val/error",
        tolerance: float = 0.02,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__()
        if not tolerance >= 0:
            raise MisconfigurationException(
                f"AccuracyGuard: a tolerance is no less than 0, got {tolerance}"
            )
        self.metric, self.tolerance = Metric(monitor, mode), tolerance
        self.best = math.inf
        self.holding = False
        self.fitting = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        if self.fitting and not trainer.global_step:
            self.best, self.holding = math.inf, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = plan_of(trainer)
        if plan is None:
            raise MisconfigurationException(
                "AccuracyGuard: there is no compression to hold; add a method to the Trainer"
            )
        plan.holding = self.holding
        self.metric.expect(trainer, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan, metric = plan_of(trainer), self.metric.validated(trainer)
        if plan is None or metric is None:
            return
        # Each process may have a metric of its own, and all have to decide alike.
        mean = trainer.strategy.reduce(torch.tensor(metric, device=pl_module.device))
        loss = self.metric.loss(float(mean))
        self.best = min(self.best, loss)
        # A metric that is no number holds, too.
        begun = any(method.chosen_at is not None for method in plan.methods)
        worse = begun and not loss - self.best <= self.tolerance
        if worse != self.holding and not plan.complete:
            what = "held" if worse else "going on"
            pl.utilities.rank_zero_info(
                f"AccuracyGuard: {self.metric.name} is {metric:.4g}, its best "
                f"{self.metric.loss(self.best):.4g}: compression is {what} at step {plan.step:,}"
            )
        self.holding = plan.holding = worse

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("compression/held", float(self.holding))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "holding": self.holding}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fitting:
            self.best, self.holding = state_dict["best"], state_dict["holding"]
