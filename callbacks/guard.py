"""An accuracy guard: compression pauses while the network recovers."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fitsmall.callbacks.driver import plan_of
from fitsmall.callbacks.monitored import MonitoredMetric
from fitsmall.compressors.training.messages import inform

__all__ = ["AccuracyGuard"]


class AccuracyGuard(pl.Callback):
    """A callback that pauses compression while a metric is worse than its best by a tolerance.

    After each validation the guard compares the metric with the best one so far. If it is worse by
    more than ``tolerance``, and any stage has begun, the plan's clock pauses: nothing more is
    pruned or moved towards its cluster, no other stage begins, and training continues at the
    strength that compression has reached. The clock resumes when the metric is within the tolerance
    again. All windows end later by the paused steps; a warning says so if training ends before
    they do.

    ``compression/paused`` is logged: 1 while the clock is paused, and 0 otherwise. Checkpoints save
    the decision, and it is the same on all processes.

    Args:
        monitor: Name of a metric that the validation logs.
        tolerance: Largest difference from the best, in units of the metric: 0.02 is two percentage
            points if the metric is an error rate in [0, 1].
        mode: ``"min"`` if it is an error, the default, or ``"max"`` if it is an accuracy. Metrics
            that are usually the larger the better, such as ``val/acc``, need one.
    """

    def __init__(
        self,
        monitor: str = "val/error",
        tolerance: float = 0.02,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(tolerance, int | float) and tolerance >= 0):
            raise MisconfigurationException(
                "AccuracyGuard: a tolerance is a number of at least 0, in units of the metric, got "
                f"{tolerance!r}"
            )
        self.metric, self.tolerance = MonitoredMetric(monitor, mode), tolerance
        self.best = math.inf
        self.paused = False
        self.fitting = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        if self.fitting and plan_of(trainer) is None:  # else an earlier fit goes on
            self.best, self.paused = math.inf, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = plan_of(trainer)
        if plan is None:
            raise MisconfigurationException(
                "AccuracyGuard: there is no compression to pause; add a stage to the Trainer"
            )
        if self.paused:
            plan.clock.pause()
        self.metric.expect(trainer, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan, metric = plan_of(trainer), self.metric.validated(trainer)
        if plan is None or metric is None:
            return
        # The metric may differ between processes, but all must make the same decision.
        mean = trainer.strategy.reduce(torch.tensor(metric, device=pl_module.device))
        loss = self.metric.loss(float(mean))
        self.best = min(self.best, loss)
        # With NaN the comparison is false, and so the metric is worse.
        worse = plan.has_begun and not loss - self.best <= self.tolerance
        if worse != plan.clock.paused and not plan.complete:
            inform(
                f"AccuracyGuard: {self.metric.name} is {metric:.4g}, its best "
                f"{self.metric.loss(self.best):.4g}: compression is "
                f"{'paused' if worse else 'resumed'} at step {plan.clock.steps:,}"
            )
        self.paused = worse
        if worse:
            plan.clock.pause()
        else:
            plan.clock.resume()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        plan = plan_of(trainer)
        if plan is not None:
            pl_module.log("compression/paused", float(plan.clock.paused))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "paused": self.paused}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fitting:
            self.best, self.paused = state_dict["best"], state_dict["paused"]
