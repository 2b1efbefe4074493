"""The budget of a network's widths: what they cost, and which units go so that it is met."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.width_choice import choose_units, rising
from fitsmall.compressors.select import match
from fitsmall.compressors.training.channels.network_units import NetworkUnits
from fitsmall.compressors.training.channels.width_history import WidthHistory
from fitsmall.compressors.training.messages import warn
from fitsmall.compressors.training.sharding import of_first

__all__ = ["WidthBudget"]

# Multiple of the widths, and the most that it may be of a layer's own.
_ROUND_TO, _PART = 16, 8

# A budget that is missed by more than this fraction of the total is worth a warning.
_TOLERANCE = 0.02


class WidthBudget:
    """A fraction of the cost of a network, and the widths that it may have.

    Args:
        kind: Cost: ``"flops"`` or ``"size"``.
        keep: Fraction of the cost that is left in the end.
        round_to: Number of channels that widths are multiples of; None for 16, and an eighth of
            the width in narrow layers.
        overrides: Fractions of units to keep, by pattern of the names of groups.
        history: Widths before training and now.

    Attributes:
        totals: Cost of the whole network before training, by kind.
        positions: Positions of weights in the first call, by which all costs are counted: other
            batches may have other sizes.
    """

    def __init__(
        self,
        kind: str,
        keep: float,
        round_to: int | None,
        overrides: Mapping[str, float],
        history: WidthHistory,
    ) -> None:
        self.kind, self.keep, self.round_to = kind, keep, round_to
        self.overrides, self.history = overrides, history
        self.totals: dict[str, float] = {}
        self.positions: dict[str, float] = {}

    def begin(self, units: NetworkUnits, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the costs and widths before training, and check that units can leave.

        Raises:
            ValueError: There are no units, or their cost is unknown.
        """
        if not units.groups:
            raise ValueError(
                "ChannelPruning: leave the stage out, since no channels, heads or hidden units can "
                f"leave the network: {'; '.join(units.kept_whole()) or 'it has none'}"
            )
        self.positions = units.positions = of_first(units.positions)
        self.totals = {k: units.cost(parameters, k).total({}) for k in ("flops", "size")}
        self.history.begin({name: len(group.units) for name, group in units.groups.items()})
        if not self.totals[self.kind]:
            raise ValueError(
                "ChannelPruning: give keep_size instead of keep_flops: multiply-adds are counted "
                "where the network is traced, and it cannot be"
            )

    def left(
        self,
        units: NetworkUnits,
        parameters: Mapping[str, nn.Parameter],
        kind: str,
        going: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Return the fraction of a cost that is left, without units that go."""
        gone = {name: int(mask.sum()) for name, mask in (going or {}).items()}
        return units.cost(parameters, kind).total(gone) / self.totals[kind]

    def choose(
        self,
        units: NetworkUnits,
        parameters: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        fraction: float,
        done: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return the units that go within a fraction of the cost, or as near to it as can be.

        Args:
            units: The units.
            parameters: All parameters of the module.
            scores: How much each unit matters, by group; other groups stay whole.
            fraction: The fraction.
            done: Fraction of the units that overrides remove which go.
        """
        steps = {name: self._step_of(units, name) for name in units.groups}
        costs, budget = units.cost(parameters, self.kind), fraction * self.totals[self.kind]
        scores = {name: rising(own) for name, own in scores.items()}
        return choose_units(scores, costs, budget, steps, self._overridden(units, done))

    def narrowest(
        self, units: NetworkUnits, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """Return all units that can go.

        The removal of the fewest and of the most of them is tried: some kernels ask for multiples.

        Raises:
            ValueError: A network without them cannot run.
        """
        equal = {name: torch.zeros(len(group.units)) for name, group in units.groups.items()}
        most = self.choose(units, parameters, equal, 0.0)
        fewest = {name: torch.zeros_like(mask) for name, mask in most.items()}
        for name, mask in fewest.items():
            step = self._step_of(units, name)
            mask[: len(mask) % step or step] = most[name].any()
        for going in (fewest, most):
            try:
                units.cut(going)
            except ValueError as error:
                raise ValueError(
                    "ChannelPruning: set round_to to a larger multiple, or leave layers out with "
                    f"exclude=[...], since other widths are needed: {error}"
                ) from error
        return most

    def check(self, units: NetworkUnits, left: float) -> None:
        """Refuse a budget below what the narrowest network needs.

        Raises:
            ValueError: It is.
        """
        if left > self.keep:
            whole = "; ".join(units.kept_whole())
            fewer = "keep less by overrides, " if self.overrides else ""
            raise ValueError(
                f"ChannelPruning: keep_{self.kind}={self.keep:g} cannot be reached, since the "
                f"narrowest network has {left:.3f}: ask for more than that, act on more layers, "
                f"{fewer}or set round_to=1{f' ({whole})' if whole else ''}"
            )

    def report(self, left: float, target: float, waiting: list[str]) -> None:
        """Warn if the budget is missed."""
        if left > target + _TOLERANCE:
            warn(
                f"ChannelPruning: {left:.3f} of the {self.kind} is left, and not {target:.3f}: "
                f"{', '.join(waiting) or 'the overrides'} had no gradients, or keep their units"
            )

    def _step_of(self, units: NetworkUnits, name: str) -> int:
        """Return the number of units that go at once; a unit such as a head has several slices."""
        group = units.groups[name]
        before = self.history.before(name, len(group.units))
        step = math.ceil((self.round_to or _ROUND_TO) / group.slices)
        return step if self.round_to else max(1, min(step, before // _PART))

    def _overridden(self, units: NetworkUnits, done: float) -> dict[str, int]:
        """Return the number of units that go by the user's word, by group."""
        found = {}
        own = match(self.overrides, list(units.groups)) if self.overrides else {}
        for name, keep in own.items():
            now = len(units.groups[name].units)
            kept = max(1, round(self.history.before(name, now) * (1 - (1 - keep) * done)))
            found[name] = max(0, now - kept)
        return found
