"""The smallest file that keeps a metric: sizes are tried in training, and taken back."""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from fitsmall.callbacks.averaging import EMA
from fitsmall.callbacks.driver import plan_of
from fitsmall.callbacks.monitored import MonitoredMetric
from fitsmall.callbacks.outcomes import Outcome
from fitsmall.compressors.training.latents import find_latent
from fitsmall.compressors.training.messages import inform, warn
from fitsmall.compressors.training.methods.size_target import SizeTarget
from fitsmall.compressors.training.sharding import local

__all__ = ["AccuracyFloor"]

# Attributes that a checkpoint saves.
_STATE = ("given", "dense", "failed", "chances", "good", "last")

# The first size, as a fraction of the dense one.
_FIRST = 0.05
# The longest step to a smaller size, and the least part of its logarithm that is taken.
_STEP, _LEAST = 0.75, 0.1
# Where the least size is reached, the aim is at least so much of it.
_LOWEST = 0.8
# Validations that a size gets before it has failed.
_CHANCES = 3
# A size that failed is tried again once one holds that is so near to it: training has gone on.
_NEAR = 1.05


class AccuracyFloor:
    r"""Move the size that a stage aims at, so that a metric stays within a tolerance.

    The metric of the dense network is its best value before the stage begins. From then on every
    validation sees the weights at their levels, as the file would have them. If the metric is
    within the tolerance, the network is remembered, and a smaller size is tried. The less of the
    tolerance is left, the smaller the step: with a loss ``l``, the next size is

    .. math:: s' = 0.75^x s, \qquad x = \frac{l_\mathrm{dense} + \mathrm{max\_drop} - l}
              {\mathrm{max\_drop}} \text{ within } [0.1, 1].

    If the metric is beyond the tolerance three times in a row, the size has failed: training goes
    back to the network that was remembered, and the next size is the geometric mean of the two. At
    the end of the window the smallest one that held is taken. After that only the values of the
    levels train, and a validation beyond the tolerance takes them back.

    Args:
        stage: Stage without a size of its own.
        metric: Metric that validations log.
        max_drop: Largest difference from the dense network's metric, in the metric's units.
        dense: The dense network's metric, if it is known.
    """

    def __init__(
        self, stage: SizeTarget, metric: MonitoredMetric, max_drop: float, dense: float | None
    ) -> None:
        if not (isinstance(max_drop, int | float) and max_drop >= 0):
            raise ValueError(
                "Compress: max_drop is a difference of at least 0, in units of the metric, got "
                f"{max_drop!r}"
            )
        self.stage, self.metric, self.max_drop, self.given = stage, metric, max_drop, dense
        self.reset()

    def reset(self) -> None:
        """Forget everything of an earlier training."""
        self.dense = math.inf if self.given is None else self.metric.loss(self.given)
        self.failed = 0.0  # smallest size that failed lately, in bytes
        self.chances = _CHANCES
        self.good: dict[str, Any] = {}
        self.last = math.nan
        self._floats: dict[str, Tensor] = {}
        self._told = False

    @property
    def limit(self) -> float:
        """Largest loss that is within the tolerance."""
        return self.dense + self.max_drop

    def begin(self, trainer: pl.Trainer) -> None:
        """Check that the Trainer can keep a floor.

        Raises:
            MisconfigurationException: It cannot.
        """
        if any(isinstance(callback, EMA) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "Compress: max_drop looks at the weights that train, and EMA shows validations an "
                "average: leave EMA out, or give a size"
            )
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "Compress: max_drop needs validations: give fit a validation loader, and the "
                "module a validation_step"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "Compress: max_drop remembers whole networks, and this training shards them: give "
                "a size, or use one device or DDP"
            )
        if not self.stage.aim:
            self.stage.aim = int(_FIRST * self.stage.dense)
        if not self.good and self.given is not None:
            self._remember(trainer, self.given)
        first = self.stage.window.first
        batches = trainer.val_check_batch  # None if the time decides
        if math.isinf(self.dense) and not self.stage.clock.steps and batches is not None:
            epochs = (trainer.check_val_every_n_epoch or 1) - 1
            batches += epochs * trainer.num_training_batches if epochs else 0
            if first < batches / trainer.accumulate_grad_batches < math.inf:
                raise self._unknown(first)

    def _unknown(self, first: int) -> MisconfigurationException:
        return MisconfigurationException(
            f"Compress: no validation before step {first:,} tells what {self.metric.name} is "
            "without compression: validate earlier (Trainer(val_check_interval=...)), begin later "
            "(start=...), or give dense=..."
        )

    def _check_examples(self, examples: int) -> None:
        """Warn if held-out data are too few to see the tolerance.

        A rate ``p`` of ``n`` examples has the standard error ``sqrt(p (1 - p) / n)``.
        """
        rate = self.metric.loss(self.dense)
        variance = rate * (1 - rate)
        is_rate = variance > 0 and re.search("err|acc", self.metric.name, re.IGNORECASE)
        if not is_rate or not examples or not self.max_drop:
            return
        needed = round(variance / self.max_drop**2)
        if examples < needed:
            warn(
                f"Compress: {self.metric.name} of {rate:.4g} on {examples:,} examples has a "
                f"standard error of {math.sqrt(variance / examples):.2g}, and max_drop is "
                f"{self.max_drop:g}: chance may decide; validate on {needed:,} or more, or allow a "
                "larger max_drop"
            )

    @torch.no_grad()
    def show_levels_(self, trainer: pl.Trainer) -> None:
        """Move the weights to their levels, for a validation."""
        plan = plan_of(trainer)
        if plan is None or trainer.sanity_checking:
            return
        self.stage.keep_nearest(plan.latents())
        for name in self.stage.clusterings:
            weight = local(self.stage.parameters[name])
            self._floats[name] = weight.detach().clone()
            weight.copy_(self.stage.levels(name))

    @torch.no_grad()
    def show_floats_(self) -> None:
        """Move the weights back."""
        for name, floats in self._floats.items():
            local(self.stage.parameters[name]).copy_(floats)
        self._floats = {}

    def judge(self, trainer: pl.Trainer, device: torch.device) -> None:
        """Take note of a validation, and choose the next size.

        Raises:
            MisconfigurationException: The metric was not logged, or never before the stage began.
        """
        value = self.metric.validated(trainer)
        plan, stage = plan_of(trainer), self.stage
        if value is None or plan is None:
            return
        mean = trainer.strategy.reduce(torch.tensor(value, device=device))
        loss = self.last = self.metric.loss(float(mean))
        if plan.clock.now <= stage.window.first:
            if self.given is None:
                self.dense = min(self.dense, loss)
            self._remember(trainer, value)
            return
        if math.isinf(self.dense):
            raise self._unknown(stage.window.first)
        if not self._told:
            self._told = True
            self._check_examples(_examples(trainer))
        if not stage.clusterings:
            return
        size, holds = stage.bytes, loss <= self.limit
        if holds:
            self._remember(trainer, value)
        if plan.clock.now >= stage.window.last:
            if not holds:
                self.restore_(trainer)
                self.last = self.metric.loss(self.good.get("metric", value))
            return
        aim = min(max(stage.aim, _LOWEST * size), size)
        self.chances = _CHANCES if holds else self.chances - 1
        if holds:
            if aim < _NEAR * self.failed:
                self.failed = 0.0
            left = (self.limit - loss) / self.max_drop if self.max_drop else 1.0
            smaller = aim * _STEP ** min(max(left, _LEAST), 1.0)
            stage.aim = int(max(smaller, math.sqrt(aim * self.failed)))
        elif not self.chances:
            self.failed, self.chances = float(aim), _CHANCES
            self.restore_(trainer)
            stage.aim = int(math.sqrt(aim * self.good.get("aim", stage.dense)))
        else:
            return
        inform(
            f"Compress: {size:,} bytes {'keep' if holds else 'do not keep'} "
            f"{self.metric.name}, {value:.4g} against {self.metric.loss(self.dense):.4g}; next "
            f"{stage.aim:,}"
        )

    def end_window(self, trainer: pl.Trainer) -> None:
        """Go back to the smallest network that held, just before the window ends."""
        plan = plan_of(trainer)
        if plan is not None and plan.clock.now == self.stage.window.last - 1:
            self.restore_(trainer)

    @property
    def compressed(self) -> bool:
        """Whether the window has ended, with a size that held."""
        ended = self.stage.clock.now >= self.stage.window.last
        return ended and bool(self.good.get("clusterings"))

    def report(self) -> None:
        """Tell what was reached, when training ends."""
        value, dense = self.metric.loss(self.last), self.metric.loss(self.dense)
        if not self.compressed:
            warn(
                f"Compress: no size kept {self.metric.name} within {self.max_drop:g} of "
                f"{dense:.4g} until training ended: allow a larger max_drop, train longer, or "
                "validate more often"
            )
        elif not self.last <= self.limit:
            warn(
                f"Compress: {self.metric.name} is {value:.4g} at the end, beyond {self.max_drop:g} "
                f"of {dense:.4g}; it was {self.good['metric']:.4g} when the size was chosen"
            )
        else:
            inform(
                f"Compress: {self.stage.bytes:,} bytes at a {self.metric.name} of {value:.4g}, "
                f"within {self.max_drop:g} of {dense:.4g}"
            )

    def outcome(self) -> Outcome:
        """Return what became of the metric, after training."""
        value, dense = self.metric.loss(self.last), self.metric.loss(self.dense)
        wanted = f"within {self.max_drop:g} of {dense:.4g}"
        met = self.last <= self.limit and self.compressed
        return Outcome(self.metric.name, wanted, f"{value:.4g}", met)

    # The network that was remembered.

    def _remember(self, trainer: pl.Trainer, value: float) -> None:
        """Copy the network, its latents and moments, and what was chosen for it."""
        plan, stage = plan_of(trainer), self.stage
        assert plan is not None
        state = plan.module.state_dict()
        self.good = {
            "bytes": stage.bytes,
            "aim": stage.aim if stage.clusterings else stage.dense,
            "metric": value,
            "tensors": {name: t.clone() for name, t in state.items() if isinstance(t, Tensor)},
            "latents": {name: latent.clone() for name, latent in plan.latents().items()},
            "moments": [
                {key: moment.clone() for key, moment in mine.items()} for mine in _moments(trainer)
            ],
            "clusterings": {name: dict(mine) for name, mine in stage.clusterings.items()},
            "masks": dict(stage.masks),
        }

    @torch.no_grad()
    def restore_(self, trainer: pl.Trainer) -> None:
        """Bring back the network that was remembered, if it still fits.

        A network whose layers have become smaller since then stays as it is, and so do parameters
        that joined training later.
        """
        plan, stage, good = plan_of(trainer), self.stage, self.good
        assert plan is not None
        state = plan.module.state_dict()
        tensors = good.get("tensors", {}).items()
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in tensors):
            self.good = good = {}
        if not good:
            return
        for name, tensor in good["tensors"].items():
            state[name].copy_(tensor)
        for name, latent in plan.latents().items():
            latent.copy_(good["latents"].get(name, state[name]))
        for now, then in zip(_moments(trainer), good["moments"], strict=False):
            for key in now.keys() & then.keys():
                now[key].copy_(then[key])
        stage.clusterings = {
            name: {key: tensor.to(state[name].device) for key, tensor in mine.items()}
            for name, mine in good["clusterings"].items()
        }
        stage.masks = {name: mask.to(state[name].device) for name, mask in good["masks"].items()}
        stage.bytes = good["bytes"]
        if plan.clock.now >= stage.window.last:
            for name in stage.clusterings:
                local(stage.parameters[name]).copy_(stage.levels(name))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint saves; the network that was remembered among it."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


def _examples(trainer: pl.Trainer) -> int:
    """Return the number of examples that a validation sees; 0 if the loaders do not tell."""
    loaders = trainer.val_dataloaders
    examples = 0.0
    for loader, batches in zip(
        loaders if isinstance(loaders, list | tuple) else [loaders],
        trainer.num_val_batches,
        strict=False,
    ):
        try:
            examples += len(loader.dataset) * min(1.0, batches / len(loader))
        except (AttributeError, TypeError, ZeroDivisionError):
            return 0
    return round(examples)


def _moments(trainer: pl.Trainer) -> list[dict[str, Tensor]]:
    """Return what the optimizers keep for each parameter, without its latent."""
    moments = []
    for optimizer in trainer.optimizers:
        for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
            state, latent = optimizer.state.get(parameter, {}), find_latent(optimizer, parameter)
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            moments.append({key: t for key, t in tensors.items() if t is not latent})
    return moments
