"""A target of latency: the fraction of the multiply-adds at which it is met, found by measuring."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.export.latency import LatencyRatio, forward_of, latency_ratio
from fitsmall.compressors.training.channels.network_units import NetworkUnits
from fitsmall.compressors.training.messages import warn
from fitsmall.compressors.training.sharding import of_first
from fitsmall.compressors.weights import twin_of

__all__ = ["LatencyTarget"]

# Relative distance from the target at which the search ends, and networks that it measures.
_TOLERANCE, _TRIES = 0.02, 5

# Attributes that a checkpoint saves.
_STATE = ("fraction", "left", "reached", "is_operated")

Going = Mapping[str, Tensor]


class LatencyTarget:
    """The search for the multiply-adds that a network may have, given its latency.

    Multiply-adds are what a choice of widths can count, and latency is what they are chosen for.
    Networks are measured, and the next one has the multiply-adds at which the line through two of
    them, or through one and the origin, meets the target.

    Args:
        keep: Target: latency as a fraction of that of the network before training.
        engine: One of :data:`~fitsmall.compressors.export.latency.LATENCY_ENGINES`.
        integers: Whether the network will have weights and inputs of 8 bits. That before training
            has floats.

    Attributes:
        fraction: Fraction of the multiply-adds that met the last target.
        left: Latency of the network as it is now, as a fraction of that before training.
        reached: The same for the network that was chosen last.
        is_operated: Whether units have left.
        weights: Names of the weights that become integers.
    """

    def __init__(self, keep: float, engine: str, integers: bool = False) -> None:
        self.keep, self.engine, self.integers = keep, engine, integers
        self.weights: Collection[str] = ()
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        self.fraction = self.keep
        self.left, self.reached, self.is_operated = 1.0, 1.0, False
        self._dense: Callable[[], object] | None = None

    def check(self, units: NetworkUnits, narrowest: Going) -> None:
        """Check that the engine runs the networks, and that the target can be reached.

        Args:
            units: The units of the networks.
            narrowest: All units that can go.

        Raises:
            ImportError: The engine is not installed.
            ValueError: It cannot run the networks, or the narrowest one takes too long.
        """
        self._dense = self._before(units)
        least = self._measure(units, narrowest).median
        if least > self.keep:
            raise ValueError(
                f"ChannelPruning: keep_latency={self.keep:g} cannot be reached, since the "
                f"narrowest network takes {least:.3f} of the time in {self.engine}: ask for more "
                "than that, or act on more layers"
            )

    def meet(
        self, units: NetworkUnits, target: float, choose: Callable[[float], Going]
    ) -> dict[str, Tensor]:
        """Return the choice of units that meets a target.

        Args:
            units: The units of the networks.
            target: Latency as a fraction of that before training.
            choose: Function from a fraction of the multiply-adds to the units that go.
        """
        if self._dense is None:
            self._dense = self._before(units)
        fraction, points, found = min(1.0, self.fraction), [], {}
        for _ in range(_TRIES):
            going = choose(fraction)
            ratio = self._measure(units, going)
            points.append((fraction, ratio.median))
            found[ratio.median] = (going, fraction, ratio)
            enough = fraction == 1.0 and ratio.median <= target  # nothing has to leave
            if enough or abs(ratio.median - target) <= _TOLERANCE * target:
                break
            fraction = _next(points, target)
        nearest = min(found, key=lambda median: abs(median - target))
        going, self.fraction, ratio = found[nearest]
        if ratio.spread > 0.05 * target:
            warn(
                f"ChannelPruning: latency in {self.engine} varies by {ratio.spread:.1%} of that "
                f"before training, and keep_latency={self.keep:g} may be missed by as much: run "
                "on a quiet machine, or with fewer threads"
            )
        self.reached = ratio.median
        return dict(going)

    def operated(self) -> None:
        """Take the network that was measured last for the present one."""
        self.left, self._dense, self.is_operated = self.reached, None, True

    def _measure(self, units: NetworkUnits, going: Going) -> LatencyRatio:
        """Return the latency without units, as a fraction of that before training."""
        assert self._dense is not None
        small = self._forward(units, going, self.integers)
        ratio = latency_ratio(small, self._dense)
        if ratio.spread > _TOLERANCE * ratio.median:  # measure again, for longer
            ratio = latency_ratio(small, self._dense, rounds=15)
        # All processes have to choose alike.
        median, spread = of_first(tuple(ratio))
        return LatencyRatio(self.left * median, self.left * spread)

    def _before(self, units: NetworkUnits) -> Callable[[], object]:
        """Return a function that runs all networks as they are now, and took :attr:`left`."""
        return self._forward(units, {}, self.integers and self.is_operated)

    def _forward(self, units: NetworkUnits, going: Going, integers: bool) -> Callable[[], object]:
        """Return a function that runs all networks, without the units that go."""
        runs: list[Callable[[], object]] = []
        for path, call in units.calls.items():
            network = twin_of(call.network).eval()
            if going and (cut := units.cut_of(path, going)):
                cut.apply(network)
            names = units.own_names(path, self.weights) if integers else ()
            with torch.no_grad():
                runs.append(forward_of(self.engine, network, call.args, call.kwargs, names))
        return lambda: [run() for run in runs]

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint saves."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        for name in _STATE:
            setattr(self, name, state[name])


def _next(points: list[tuple[float, float]], target: float) -> float:
    """Return the fraction at which a line through measured points meets a target.

    Example:
        >>> _next([(0.5, 0.6)], 0.5), _next([(0.5, 0.75), (0.25, 0.25)], 0.5)
        (0.4166666666666667, 0.375)
    """
    above = min((p for p in points if p[1] > target), key=lambda p: p[1], default=None)
    below = max((p for p in points if p[1] <= target), key=lambda p: p[1], default=None)
    if above and below:
        slope = (above[1] - below[1]) / (above[0] - below[0]) if above[0] != below[0] else math.inf
        return below[0] + (target - below[1]) / slope
    fraction, ratio = points[-1]
    return min(1.0, fraction * target / ratio)
