"""Allocation: how one model-wide sparsity becomes a number of kept weights per tensor.

An allocation takes the scores of every tensor and the sparsity of them all together. Scores are
looked up tensor by tensor, twice where a threshold is searched, so that a :class:`Lazy` mapping
never holds more than one tensor's scores: concatenated copies of all weights would run out of
memory on large models.
"""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from fitsmall.compressors.prune import kept

__all__ = ["ALLOCATIONS", "BY_SHAPE", "Allocation", "Lazy", "erk", "global_", "lamp", "uniform"]

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]

# Of the sample that brackets a threshold; a prime, so that it meets all columns of a matrix.
_STRIDE = 61


class Lazy(Mapping[str, Tensor]):
    """Tensors computed when they are looked up, and not kept.

    Example:
        >>> weights = {"a": torch.tensor([-2.0])}
        >>> Lazy(weights, lambda name: weights[name].abs())["a"]
        tensor([2.])
    """

    def __init__(self, names: Collection[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = names, compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """The same sparsity in every tensor.

    Example:
        >>> uniform({"a": torch.ones(4), "b": torch.ones(10)}, sparsity=0.5)
        {'a': 2, 'b': 5}
    """
    return {name: kept(scores[name].numel(), sparsity) for name in scores}


def global_(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """One threshold for all tensors; of equal scores the first tensor's survive.

    A sample brackets the threshold, and only the scores inside of the bracket are gathered to find
    it exactly; should the bracket miss it, a wider one is taken.

    Example:
        >>> global_({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}, sparsity=0.5)
        {'a': 1, 'b': 1}
    """
    sampled = {name: _sample(scores[name], name) for name in scores}
    keep = kept(sum(size for size, _ in sampled.values()), sparsity)
    if keep == 0:
        return dict.fromkeys(sampled, 0)
    sample = torch.cat([values for _, values in sampled.values()])
    descending = sample.sort(descending=True).values.tolist()
    # Four standard deviations of the rank that the threshold has in the sample, a binomial one.
    middle = keep / _STRIDE
    slack = 4 * (middle * max(0.0, 1 - middle / len(descending))) ** 0.5 + len(sampled)
    lowest = torch.finfo(torch.float32).min  # weights that are pruned for good score -inf
    while True:
        first, last = int(middle - slack), int(middle + slack) + 1
        high = descending[first] if first >= 0 else torch.inf
        low = max(lowest, descending[last] if last < len(descending) else -torch.inf)
        found = {name: _bracket(scores[name], low, high) for name in scores}
        missing = keep - sum(above for above, _, _ in found.values())
        if 0 < missing <= sum(int(counts.sum()) for _, _, counts in found.values()):
            return _take(found, missing)
        slack, lowest = 8 * slack, -torch.inf


def lamp(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """One threshold on ``s_u^2 / sum of s_v^2 over all v with s_v >= s_u`` of the same tensor.

    Layer-adaptive magnitude-based pruning (Lee et al., 2021): the relative cost of removing a
    weight when all smaller ones of its layer are gone; every layer's largest weight scores 1.

    Example:
        >>> lamp({"a": torch.tensor([100.0, 200.0]), "b": torch.tensor([1.0, 2.0])}, sparsity=0.5)
        {'a': 1, 'b': 1}
    """

    def adapt(name: str) -> Tensor:
        # A negative score, as movement gives it, is a removal that costs nothing.
        flat = scores[name].flatten().double().clamp_min(0)
        ascending, order = flat.square().sort(stable=True)
        survivors = ascending.flip(0).cumsum(0).flip(0)
        adapted = torch.empty_like(flat)
        adapted[order] = ascending / survivors.clamp_min(torch.finfo(torch.double).tiny)
        return adapted.float()

    return global_(Lazy(scores, adapt), sparsity)


def erk(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Density proportional to ``(sum of the dimensions) / (product of the dimensions)``, at most 1.

    Erdos-Renyi-Kernel (Mocanu et al., 2018; Evci et al., 2020): small layers stay denser.

    Example:
        >>> erk({"a": torch.ones(100, 10), "b": torch.ones(10, 10)}, sparsity=0.9)
        {'a': 93, 'b': 17}
    """
    shapes = {name: scores[name].shape for name in scores}
    numel = {name: shape.numel() for name, shape in shapes.items()}
    budget = (1.0 - sparsity) * sum(numel.values())
    kept(1, sparsity)  # raises for a sparsity that is no fraction
    full: set[str] = set()
    while True:
        free = {name: max(1, sum(shape)) for name, shape in shapes.items() if name not in full}
        left = budget - sum(numel[name] for name in full)
        scale = left / sum(free.values()) if free else 0.0
        over = {name for name, degree in free.items() if scale * degree > numel[name]}
        if not over:
            break
        full |= over
    return {name: numel[name] if name in full else round(scale * free[name]) for name in shapes}


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "global": global_,
    "erk": erk,
    "lamp": lamp,
}
# Those that look at the shapes of scores alone, so that they are known before training.
BY_SHAPE = frozenset({"uniform", "erk"})


# Tensors of scores are arguments only, so that each is freed before the next one is looked up.


def _sample(scores: Tensor, name: str) -> tuple[int, Tensor]:
    """Number of the scores, and some of them."""
    if scores.isnan().any():
        raise ValueError(f"scores of {name} hold NaN: did training diverge?")
    return scores.numel(), scores.flatten()[::_STRIDE].to("cpu", copy=True)


def _bracket(scores: Tensor, low: float, high: float) -> tuple[int, Tensor, Tensor]:
    """How many scores lie above ``high``; the different ones in [low, high], and their counts."""
    above = scores > high
    inside = scores[(scores >= low) & ~above]
    values, counts = inside.unique(return_counts=True)
    return int(above.count_nonzero()), values.cpu(), counts.cpu()


def _take(found: Mapping[str, tuple[int, Tensor, Tensor]], missing: int) -> dict[str, int]:
    """Add the ``missing`` largest scores of the bracket, ties in the order of the tensors."""
    values = torch.cat([values for _, values, _ in found.values()])
    counts = torch.cat([counts for _, _, counts in found.values()])
    descending, order = values.sort(descending=True)
    threshold = descending[int(torch.searchsorted(counts[order].cumsum(0), missing))]
    taken = {name: int(counts[mine > threshold].sum()) for name, (_, mine, counts) in found.items()}
    left = missing - sum(taken.values())
    for name, (above, mine, counts) in found.items():
        ties = min(left, int(counts[mine == threshold].sum()))
        taken[name] += above + ties
        left -= ties
    return taken
