"""The choice of ranks: those of all layers together, at a price or within a budget."""

import heapq
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from fitsmall.compressors.projections.lowrank import Spectrum

__all__ = ["DENSE", "Options", "Rank", "choose_ranks", "price_of", "ranks_within"]


class Rank(NamedTuple):
    """The rank of a layer and the form of its matrix; a rank of None keeps the layer as it is."""

    form: str
    rank: int | None

    def __str__(self) -> str:
        return "dense" if self.rank is None else f"{self.rank} ({self.form})"


DENSE = Rank("channels", None)


class Options:
    r"""All ranks that a layer may have, each with its cost and its error ``||W - W_r||^2``.

    Args:
        spectra: Spectrum of the layer's weight in each form.
        units: Cost of one rank in each form.
        dense: Cost of the layer as it is, with an error of 0; ranks must cost less.

    Example:
        >>> weight = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.0]))
        >>> options = Options({"channels": Spectrum(weight)}, {"channels": 7.0}, dense=16.0)
        >>> options.cheapest(price=2.0), options.cheapest(price=4.0)
        (Rank(form='channels', rank=2), Rank(form='channels', rank=1))
    """

    def __init__(
        self, spectra: Mapping[str, Spectrum], units: Mapping[str, float], dense: float
    ) -> None:
        self.norm = max(spectrum.norm for spectrum in spectra.values())
        self.ranks, self.costs, errors = [DENSE], [dense], [0.0]
        for form, spectrum in spectra.items():
            for rank, tail in enumerate(spectrum.tails.tolist(), start=1):
                if rank * units[form] >= dense:
                    break
                self.ranks.append(Rank(form, rank))
                self.costs.append(rank * units[form])
                errors.append(tail)
        self._costs = torch.tensor(self.costs, dtype=torch.float64)
        self._errors = torch.tensor(errors, dtype=torch.float64)

    @property
    def least(self) -> float:
        """The lowest cost of all."""
        return min(self.costs)

    def cheapest(self, price: float) -> Rank:
        """Return the rank ``r`` that minimises ``price C(r) + error(r)``."""
        return self.ranks[self.best(price)]

    def cost(self, price: float) -> float:
        """Return the cost of :meth:`cheapest`."""
        return self.costs[self.best(price)]

    def best(self, price: float) -> int:
        """Return the number of :meth:`cheapest` among the options."""
        if math.isinf(price):
            return int(self._costs.argmin())
        return int((price * self._costs + self._errors).argmin())

    def improvement(self, number: int, room: float) -> tuple[float, int] | None:
        """Return the option that lowers the error most for its additional cost.

        Args:
            number: Number of the present option.
            room: Largest additional cost.

        Returns:
            Error saved per cost, and number of the option; None if nothing better fits.

        Example:
            >>> weight = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.0]))
            >>> options = Options({"channels": Spectrum(weight)}, {"channels": 8.0}, dense=32.0)
            >>> options.improvement(1, room=10.0)  # from rank 1 to rank 2
            (2.0, 2)
        """
        steps, saved = self._costs - self._costs[number], self._errors[number] - self._errors
        fits = (saved > 0) & (steps <= room)
        if not fits.any():
            return None
        ratios = (saved / steps.clamp_min(1e-300)).masked_fill(~fits, -math.inf)
        best = int(ratios.argmax())
        return float(ratios[best]), best


def choose_ranks(options: Mapping[str, Options], price: float) -> dict[str, Rank]:
    r"""Return the ranks that minimise ``price C(r) + sum over layers of ||W - W_r||^2``.

    The solution is in closed form, since each layer has its own term (Idelbayev and
    Carreira-Perpinan, 2020). In the paper a layer of full rank costs more than the layer as it is;
    here it stays as it is.
    """
    return {name: mine.cheapest(price) for name, mine in options.items()}


def price_of(options: Mapping[str, Options], budget: float) -> float:
    """Return the lowest price at which the chosen ranks fit into a budget, by bisection.

    Raises:
        ValueError: Even a rank of 1 in every layer costs more.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> options = {"a": Options({"channels": Spectrum(weight)}, {"channels": 7.0}, dense=16.0)}
        >>> choose_ranks(options, price_of(options, budget=7.5))
        {'a': Rank(form='channels', rank=1)}
    """

    def cost(price: float) -> float:
        return sum(mine.cost(price) for mine in options.values())

    if cost(0.0) <= budget:
        return 0.0
    least = sum(mine.least for mine in options.values())
    if least > budget:
        raise ValueError(f"a rank of 1 everywhere costs {least:,.0f}, above {budget:,.0f}")
    # At this price every layer takes its lowest cost.
    costs = [cost for mine in options.values() for cost in mine.costs if cost]
    high = 2 * max(mine.norm for mine in options.values()) / min(costs)
    high *= max(costs) / min(costs)
    low = 1e-15 * high
    for _ in range(50):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return high


def ranks_within(options: Mapping[str, Options], budget: float) -> dict[str, Rank]:
    """Return ranks whose cost is as near to a budget as whole ranks come.

    At one price for all layers the cost jumps where a layer goes from a low rank to dense, or many
    layers change at once, and much of a budget may be left. It is spent in turn on the rank that
    saves most error for its cost.

    Raises:
        ValueError: Even a rank of 1 in every layer costs more.

    Example:
        >>> options = {"a": Options({"channels": Spectrum(torch.eye(8))}, {"channels": 16.0}, 64.0)}
        >>> choose_ranks(options, price_of(options, budget=50.0))
        {'a': Rank(form='channels', rank=1)}
        >>> ranks_within(options, budget=50.0)
        {'a': Rank(form='channels', rank=3)}
    """
    price = price_of(options, budget)
    chosen = {name: mine.best(price) for name, mine in options.items()}
    room = budget - sum(mine.costs[chosen[name]] for name, mine in options.items())
    queue: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        if found := options[name].improvement(chosen[name], room):
            heapq.heappush(queue, (-found[0], name, found[1]))

    for name in options:
        offer(name)
    while queue:
        _, name, number = heapq.heappop(queue)
        step = options[name].costs[number] - options[name].costs[chosen[name]]
        if step <= room:
            chosen[name], room = number, room - step
        offer(name)
    return {name: mine.ranks[chosen[name]] for name, mine in options.items()}
