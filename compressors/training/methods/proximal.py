"""Learning-compression: training pulls weights towards their projection, more and more strongly."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fitsmall.compressors.choices.allocation import Lazy
from fitsmall.compressors.choices.schedules import Exponential, Schedule
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.training.sharding import gather, shard
from fitsmall.compressors.training.stage import Stage

__all__ = ["LearningCompression", "Proximal"]


class Proximal(Stage):
    r"""Minimise the loss subject to ``w = projection(w)``, by the LC algorithm.

    Carreira-Perpinan and Idelbayev (2017, 2018). The augmented Lagrangian of
    ``min L(w) subject to w = P(w)`` is minimised by alternation. In every optimizer step the loss
    moves the weights, and a proximal step pulls them back,

        w <- (1 - rho) w + rho (P + l / mu),     rho = eta mu / (1 + eta mu),

    and every ``every`` steps the projection and the multipliers are updated,

        P <- projection(w - l / mu),     l <- l - mu (w - P).

    ``rho``, the strength of the pull, grows from almost 0 to 1 through the window. From its end on
    weights are projected after every step, which is slow for projections that search. The pull is a
    step of its own, after the optimizer's: a penalty in the loss would be clipped with the
    gradients, and would diverge for large ``mu``.

    Args:
        schedule: ``rho`` as a function of progress through the window; 1 at its end.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which weights become their projection.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between projections.
        include: Patterns of parameter names that replace the default.
        exclude: Patterns of parameter names to leave out.
    """

    num_updates = 50

    def __init__(
        self,
        schedule: Schedule | None,
        start: float,
        stop: float,
        start_step: int | None,
        stop_step: int | None,
        every: int | None,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str],
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        self.schedule = self._schedule(schedule, Exponential())
        self.reset()

    @property
    def coupling(self) -> str:
        return "proximal"

    def strength(self, progress: float) -> float:
        return 1.0 if progress >= 1 else self.schedule(progress)

    def reset(self) -> None:
        # ``P + l / mu``, ``l / mu`` and ``eta mu``; tensors are this process's part of a weight.
        self.targets: dict[str, Tensor] = {}
        self.multipliers: dict[str, Tensor] = {}
        self.penalty = 0.0

    def has_choice(self, name: str) -> bool:
        return name in self.targets or math.isinf(self.penalty)

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        penalty = strength / (1 - strength) if strength < 1 else math.inf
        ratio = self.penalty / penalty if penalty else 0.0
        self.penalty = penalty
        parameters = self.selection.chosen

        def shifted(name: str) -> Tensor:
            scaled = self.multipliers.get(name)
            if scaled is None or not ratio:
                return weights[name]
            return weights[name] - ratio * gather(scaled, parameters[name])

        self.choose_projections(Lazy(weights, shifted))
        if math.isinf(penalty):
            self.targets, self.multipliers = {}, {}
            return
        for name in weights:
            weight = shifted(name)
            projected = self.nearest(name, weight)
            multiplier = projected - weight
            self.multipliers[name] = shard(multiplier, parameters[name])
            self.targets[name] = shard(projected + multiplier, parameters[name])

    def choose_projections(self, weights: Mapping[str, Tensor]) -> None:
        """Choose what :meth:`nearest` depends on, such as ranks, from all weights together."""

    @abstractmethod
    def nearest(self, name: str, weight: Tensor) -> Tensor:
        """Return the projection of a weight."""

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if math.isinf(self.penalty):
            parameter = self.selection.chosen[name]
            whole = gather(weight, parameter)
            try:
                projected = self.nearest(name, whole)
            except ValueError:
                if whole.isfinite().all():
                    raise
                return  # training diverged; a warning follows at its end
            weight.copy_(shard(projected, parameter))
        elif name in self.targets:
            weight.lerp_(self.targets[name], strength)

    def choices(self) -> dict[str, Any]:
        return {
            "penalty": self.penalty,
            **{
                kind: {
                    name: gather(tensor, self.parameters[name]) for name, tensor in tensors.items()
                }
                for kind, tensors in (("targets", self.targets), ("multipliers", self.multipliers))
            },
        }

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        parameters = dict(module.named_parameters())

        def own(kind: str) -> dict[str, Tensor]:
            return {
                name: shard(tensor.to(parameters[name].device), parameters[name])
                for name, tensor in choices[kind].items()
            }

        self.penalty = choices["penalty"]
        self.targets, self.multipliers = own("targets"), own("multipliers")


class LearningCompression(Proximal):
    """Pull weights to any projection, by the LC algorithm: see :class:`Proximal`.

    Args:
        projection: One projection for all selected parameters, such as ``TopK(0.9) | KMeans(16)``,
            or projections by pattern of parameter names; parameters without one are left out.
        schedule: ``rho`` as a function of progress through the window; 1 at its end.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which weights become their projection.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between projections; by default the window has 50.
        include: Patterns of parameter names that replace the default, all weights: see
            :func:`~fitsmall.compressors.select`.
        exclude: Patterns of parameter names to leave out.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors import TopK
        >>> from fitsmall.compressors.training import Plan
        >>> print(Plan([LearningCompression(TopK(0.9))], nn.Linear(20, 10), horizon=1000))
        Compression plan of 210 parameters
          LearningCompression: TopK(sparsity=0.9), proximal, steps 0 to 1,000
            acts on 95.2 %:
              weight  200  95.2 %
          left out (a bias or a norm): bias; 4.8 %, 40 bytes
    """

    order = 0
    followed = frozenset({"projection", "schedule", "every"})

    def __init__(
        self,
        projection: Projection | Mapping[str, Projection],
        schedule: Schedule | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__(schedule, start, stop, start_step, stop_step, every, include, exclude)
        by_pattern = {"*": projection} if isinstance(projection, Projection) else projection
        known = isinstance(by_pattern, Mapping) and all(
            isinstance(own, Projection) for own in by_pattern.values()
        )
        if not by_pattern or not known:
            raise ValueError(
                "LearningCompression: projection is a Projection of fitsmall.compressors, such as "
                f"TopK(0.9), or a mapping from patterns to projections, and got {projection!r}"
            )
        self.projection = dict(by_pattern)  # by pattern
        self.projections: dict[str, Projection] = {}

    def describe(self) -> str:
        return ", ".join(map(str, dict.fromkeys(self.projection.values())))

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self.projections = self.selection.match(self.projection)
        self.selection = self.selection.without(
            {
                name: "it has no projection"
                for name in self.selection.chosen
                if name not in self.projections
            }
        )

    def nearest(self, name: str, weight: Tensor) -> Tensor:
        return self.projections[name].project(weight)
