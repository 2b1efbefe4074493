"""Learning-compression: training pulls weights towards their projection, ever more strongly."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fitsmall.callbacks.method import Method
from fitsmall.compressors.allocation import Lazy
from fitsmall.compressors.projections import Projection
from fitsmall.compressors.schedules import Exponential, Schedule
from fitsmall.compressors.select import match
from fitsmall.compressors.training.sharding import gather, shard

__all__ = ["LearningCompression", "Proximal"]


class Proximal(Method):
    r"""Minimise the loss subject to ``w = projection(w)``, by the LC algorithm.

    Carreira-Perpinan and Idelbayev (2017, 2018). The augmented Lagrangian of
    ``min L(w) subject to w = P(w)`` is met in turns. In every optimizer step the loss moves the
    weights, and a proximal step pulls them back,

        w <- (1 - rho) w + rho (P + l / mu),     rho = eta mu / (1 + eta mu),

    and every ``every`` steps come the projection and the multipliers,

        P <- projection(w - l / mu),     l <- l - mu (w - P).

    ``rho``, the strength of the pull, grows from almost 0 to 1 through the window. From its end on
    weights are projected after every step, which takes time with projections that search. The pull
    is a step of its own, behind the optimizer's: as a penalty in the loss it would be clipped with
    the gradients, and diverge where ``mu`` is large.

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

    times = 50

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
    def straight_through(self) -> bool:
        return False

    @property
    def manner(self) -> str:
        return "proximal"

    def strength(self, progress: float) -> float:
        return 1.0 if progress >= 1 else self.schedule(progress)

    def reset(self) -> None:
        # The targets ``P + l / mu``, and ``l / mu``; of this process's part of a weight.
        self.targets: dict[str, Tensor] = {}
        self.multipliers: dict[str, Tensor] = {}
        self.penalty = 0.0

    def holds(self, name: str) -> bool:
        return name in self.targets or math.isinf(self.penalty)

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        penalty = strength / (1 - strength) if strength < 1 else math.inf  # eta mu
        ratio, self.penalty = self.penalty / penalty, penalty
        parameters = self.selection.chosen

        def shifted(name: str) -> Tensor:
            scaled = self.multipliers.get(name)
            if scaled is None or not ratio:
                return weights[name]
            return weights[name] - ratio * gather(scaled, parameters[name])

        self.prepare(Lazy(weights, shifted))
        if math.isinf(penalty):
            self.targets, self.multipliers = {}, {}
            return
        for name in weights:
            weight = shifted(name)
            projected = self.nearest(name, weight)
            multiplier = projected - weight
            self.multipliers[name] = shard(multiplier, parameters[name])
            self.targets[name] = shard(projected + multiplier, parameters[name])

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        """Choose anew what :meth:`nearest` depends on, from all weights together."""

    @abstractmethod
    def nearest(self, name: str, weight: Tensor) -> Tensor:
        """The projection of a weight."""

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if math.isinf(self.penalty):
            parameter = self.selection.chosen[name]
            whole = gather(weight, parameter)
            try:
                projected = self.nearest(name, whole)
            except ValueError:
                if whole.isfinite().all():
                    raise
                return  # training diverged, which is said at its end
            weight.copy_(shard(projected, parameter))
        elif name in self.targets:
            weight.lerp_(self.targets[name], strength)

    def choices(self) -> dict[str, Any]:
        chosen = self.selection.chosen
        return {
            "penalty": self.penalty,
            **{
                kind: {name: gather(tensor, chosen[name]) for name, tensor in tensors.items()}
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
        projection: One for all selected parameters, as ``TopK(0.9) | KMeans(16)``, or projections
            by pattern; parameters that no pattern matches are left out.
        schedule: ``rho`` as a function of progress through the window; 1 at its end.
        start: Fraction of training at which the pull begins.
        stop: Fraction of training at which weights become their projection.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between projections; by default 50 are spread over the window.
        include: Patterns of parameter names that replace the default, the weights of Linear,
            Conv, Embedding and attention layers.
        exclude: Patterns of parameter names to leave out.

    Example:
        >>> from fitsmall.callbacks import Plan
        >>> from fitsmall.compressors import TopK
        >>> print(Plan([LearningCompression(TopK(0.9))], nn.Linear(20, 10), horizon=1000))
        Compression plan
          LearningCompression: TopK(sparsity=0.9), proximal, steps 0 to 1,000
            1 tensors, 200 weights: weight
          left out (not the weight of a Linear, Conv, Embedding or attention layer): bias
    """

    place = 0

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
            raise MisconfigurationException(
                "LearningCompression: a projection is TopK(0.9), KMeans(16) or another of "
                f"fitsmall.compressors, or several by pattern, and got {projection!r}"
            )
        self.by_pattern = dict(by_pattern)
        self.projections: dict[str, Projection] = {}

    def describe(self) -> str:
        return ", ".join(map(str, dict.fromkeys(self.by_pattern.values())))

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self.projections = match(self.by_pattern, list(self.selection.chosen))
        self.selection = self.selection.without(
            {
                name: "it has no projection"
                for name in self.selection.chosen
                if name not in self.projections
            }
        )

    def nearest(self, name: str, weight: Tensor) -> Tensor:
        return self.projections[name].project(weight)
