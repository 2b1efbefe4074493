"""Scores of units: how much each channel, head or hidden unit matters to the loss."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fitsmall.compressors.naming import lookup
from fitsmall.compressors.training.channels.network_units import NetworkUnits

__all__ = ["SAMPLES", "UNIT_CRITERIA", "UnitScores"]

# Number of gradients that are observed between two choices.
SAMPLES = 10

# Terms of a score: the part of one weight, given its gradient.
UNIT_CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda weight, gradient: weight * gradient,
    "hessian": lambda weight, gradient: (weight * gradient).square(),
    "magnitude": lambda weight, gradient: weight.square(),
}


class UnitScores:
    r"""Moving averages of how much units matter, by one of three criteria.

    With the weights ``w`` of a unit and their gradients ``g`` in a step:

    - ``"taylor"``: ``(sum of w g)^2``, the squared slope of the loss along the unit's scale
      (Molchanov et al., 2019);
    - ``"hessian"``: ``sum of (w g)^2``, the second-order cost with the empirical Fisher's diagonal;
    - ``"magnitude"``: ``sum of w^2``, as a fraction of the mean of its group.

    Args:
        criterion: Name of the criterion.

    Attributes:
        averages: Moving averages over steps, by group.

    Raises:
        ValueError: There is no such criterion.
    """

    def __init__(self, criterion: str) -> None:
        self.criterion = criterion
        self._of_weight = lookup("ChannelPruning criterion", criterion, UNIT_CRITERIA)
        self.averages: dict[str, Tensor] = {}
        self._step: dict[str, Tensor] = {}  # sums of the present step

    def observe(self, units: NetworkUnits, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Add the weights of a tensor to the sums of a step.

        Args:
            units: The units.
            name: Name of the tensor.
            weight: The tensor.
            gradient: Its gradient.
        """
        entries = self._of_weight(weight.float(), gradient.float())
        for group, place in units.places.get(name, []):
            own = units.groups[group].sums(place, entries)
            self._step[group] = self._step[group] + own if group in self._step else own

    def end_step(self) -> None:
        """Add the sums of a step to the averages."""
        for group, own in self._step.items():
            own = own.square() if self.criterion == "taylor" else own
            if group in self.averages:
                self.averages[group].lerp_(own, 1 / SAMPLES)
            else:
                self.averages[group] = own
        self._step = {}

    def discard_step(self) -> None:
        """Drop the sums of a step that is skipped."""
        self._step = {}

    def reset(self) -> None:
        """Forget all averages."""
        self.averages, self._step = {}, {}

    def of_groups(self) -> dict[str, Tensor]:
        """Return the scores of units by group; those of groups without gradients are missing.

        Example:
            >>> scores = UnitScores("magnitude")
            >>> scores.averages["conv1"] = torch.tensor([1.0, 3.0])
            >>> scores.of_groups()
            {'conv1': tensor([0.5000, 1.5000])}
        """
        if self.criterion != "magnitude":
            return dict(self.averages)
        return {group: own / own.mean().clamp_min(1e-30) for group, own in self.averages.items()}

    def load(self, averages: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over averages from a checkpoint."""
        self.averages = {group: own.to(device) for group, own in averages.items()}
        self._step = {}
