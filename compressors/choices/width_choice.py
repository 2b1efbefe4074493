"""The choice of widths: which units of all layers together leave a network, within a budget."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Term", "WidthCosts", "choose_units", "rising"]


@dataclass(frozen=True)
class Term:
    r"""The cost of one tensor, ``c prod over dims d of (s_d - sum over groups g of m_dg r_g)``.

    Args:
        cost: Cost ``c`` of one entry, such as its number of multiply-adds.
        sizes: Sizes ``s`` of the tensor.
        members: Number ``m`` of slices that a unit of a group has in a dimension, by dimension and
            name of the group.
    """

    cost: float
    sizes: Sequence[int]
    members: Mapping[tuple[int, str], int]

    def of(self, removed: Mapping[str, int]) -> float:
        """Return the cost after the removal of ``r_g`` units of each group.

        Example:
            >>> Term(2.0, (4, 3), {(0, "a"): 1}).of({"a": 1})
            18.0
        """
        sizes = [*self.sizes]
        for (dim, group), count in self.members.items():
            sizes[dim] -= count * removed.get(group, 0)
        return self.cost * math.prod(sizes)


class WidthCosts:
    """The cost of a network as a function of its widths.

    Args:
        terms: Costs of its tensors.
        rest: Cost of all that no unit belongs to.

    Example:
        >>> costs = WidthCosts([Term(1.0, (8, 3), {(0, "a"): 1})], rest=10.0)
        >>> costs.total({}), costs.total({"a": 4}), costs.saved({}, {"a": 4})
        (34.0, 22.0, 12.0)
    """

    def __init__(self, terms: Sequence[Term], rest: float = 0.0) -> None:
        self.terms, self.rest = terms, rest
        self._of_group: dict[str, list[Term]] = {}
        for term in terms:
            for group in dict.fromkeys(group for _, group in term.members):
                self._of_group.setdefault(group, []).append(term)

    def total(self, removed: Mapping[str, int]) -> float:
        """Return the cost after the removal of units, by group."""
        return self.rest + sum(term.of(removed) for term in self.terms)

    def saved(self, removed: Mapping[str, int], more: Mapping[str, int]) -> float:
        """Return what the removal of more units saves, after that of some."""
        both = {**removed, **{group: removed.get(group, 0) + n for group, n in more.items()}}
        terms = {id(term): term for group in more for term in self._of_group.get(group, [])}
        return sum(term.of(removed) - term.of(both) for term in terms.values())

    def neighbours(self, group: str) -> set[str]:
        """Return the groups whose costs depend on the width of a group, with itself."""
        return {other for term in self._of_group.get(group, []) for _, other in term.members}


def rising(scores: Tensor) -> Tensor:
    r"""Return scores of units that rise as others of their group leave.

    With the scores ``s`` of a group of units,

        r_u = s_u (sum of all s_v) / (sum of s_v over v with s_v >= s_u).

    Scores estimate what the removal of one unit costs. If others have left, those that remain carry
    more: with the sum ``T`` of the group's scores, units that leave ``t`` of it cost about
    ``T log(T / t)``, and not ``T - t``. The first ones count as they are, and the last one as the
    whole group, so that no layer vanishes. With ``T = 1`` it is the score of LAMP (Lee et al.,
    "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021).

    Args:
        scores: Score of each unit, at least 0.

    Example:
        >>> rising(torch.tensor([1.0, 6.0, 3.0]))
        tensor([ 1.0000, 10.0000,  3.3333])
    """
    values, order = scores.double().sort(stable=True)
    left = values.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(torch.double).tiny)
    found = torch.empty_like(values)
    found[order] = values * (values.sum() / left)
    return found.to(scores.dtype)


def choose_units(
    scores: Mapping[str, Tensor],
    costs: WidthCosts,
    budget: float,
    steps: Mapping[str, int],
    removed: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    r"""Return which units go, so that the cost of the others is within a budget.

    In turn those units go that matter least for what they save,

        min over groups g of  (sum of the scores of the next units of g) / (cost that they save),

    until the budget is met, or nothing more can go. Costs are those of the network as it is by
    then: a channel costs less after the layers before and after it have lost some of theirs. The
    last ratio is the price that all layers pay for a unit of cost. At least one step of each group
    stays.

    Args:
        scores: How much each unit matters, by group.
        costs: Costs as a function of the widths.
        budget: Largest cost.
        steps: Number of units of each group that go at once. Its width stays a multiple of it if it
            is one now; the first step takes what is above the last multiple.
        removed: Units of groups that go whatever they cost, those with the lowest scores first;
            other units of these groups stay.

    Returns:
        True where a unit goes, by group.

    Example:
        >>> costs = WidthCosts([Term(1.0, (4, 3), {(0, "a"): 1}), Term(1.0, (2, 9), {(0, "b"): 1})])
        >>> scores = {"a": torch.tensor([1.0, 9.0, 2.0, 8.0]), "b": torch.tensor([3.0, 30.0])}
        >>> choose_units(scores, costs, budget=16.0, steps={"a": 1, "b": 1})
        {'a': tensor([ True, False,  True, False]), 'b': tensor([ True, False])}
    """
    fixed = dict(removed or {})
    # A stable order, so that all processes agree on equal scores.
    orders = {group: own.double().cpu().sort(stable=True) for group, own in scores.items()}
    sums = {group: order.values.cumsum(0).tolist() for group, order in orders.items()}
    gone = {group: fixed.get(group, 0) for group in scores}

    def step_of(group: str) -> int:
        """Return the number of units in the next step of a group; 0 if there is none."""
        width, step = len(scores[group]) - gone[group], steps[group]
        own = width % step or step
        return own if group not in fixed and width > own else 0

    def ratio_of(group: str, step: int) -> float:
        before = sums[group][gone[group] - 1] if gone[group] else 0.0
        saved = costs.saved(gone, {group: step})
        rise = max(0.0, sums[group][gone[group] + step - 1] - before)
        return rise / saved if saved > 0 else math.inf

    def offer(group: str) -> None:
        version[group] += 1
        if step := step_of(group):
            heapq.heappush(queue, (ratio_of(group, step), group, version[group]))

    version = dict.fromkeys(scores, 0)
    queue: list[tuple[float, str, int]] = []
    cost = costs.total(gone)
    for group in scores:
        offer(group)
    while cost > budget and queue:
        _, group, number = heapq.heappop(queue)
        if number != version[group]:
            continue
        step = step_of(group)
        cost -= costs.saved(gone, {group: step})
        gone[group] += step
        for other in costs.neighbours(group) & scores.keys():
            offer(other)
    chosen = {}
    for group, order in orders.items():
        mask = torch.zeros(len(order.indices), dtype=torch.bool)
        mask[order.indices[: gone[group]]] = True
        chosen[group] = mask
    return chosen
