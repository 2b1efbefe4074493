"""Allocation: how one model-wide sparsity becomes a number of kept weights per tensor.

An allocation takes the scores of every tensor and the sparsity of them all together. Scores are
looked up tensor by tensor, twice where a threshold is searched, so that a :class:`Lazy` mapping
never holds more than one tensor's scores: concatenated copies of all weights would run out of
memory on large models.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pressfit.compressors.prune import kept

__all__ = ["ALLOCATIONS", "Allocation", "Lazy", "erk", "global_", "lamp", "uniform"]

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]

_BLOCK = 2**20


class Lazy(Mapping[str, Tensor]):
    """Tensors computed when they are looked up, and not kept.

    Example:
        >>> weights = {"a": torch.tensor([-2.0])}
        >>> Lazy(weights, lambda name: weights[name].abs())["a"]
        tensor([2.])
    """

    def __init__(self, names: Mapping[str, object], compute: Callable[[str], Tensor]) -> None:
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

    The threshold is found exactly by radix selection: floats are mapped to integers of the same
    order, a histogram of their upper 16 bits finds the bucket, one of the lower 16 bits the value.

    Example:
        >>> global_({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}, sparsity=0.5)
        {'a': 1, 'b': 1}
    """
    numel = {name: scores[name].numel() for name in scores}
    keep = kept(sum(numel.values()), sparsity)
    if keep == 0:
        return dict.fromkeys(numel, 0)
    upper = torch.zeros(2**16, dtype=torch.long)
    for _, keys in _keys(scores):
        upper += torch.bincount((keys >> 16) + 2**15, minlength=2**16).cpu()
    bucket, above = _crossing(upper, keep)
    lower = torch.zeros(2**16, dtype=torch.long)
    for _, keys in _keys(scores):
        inside = keys[keys >> 16 == bucket - 2**15]
        lower += torch.bincount(inside & 0xFFFF, minlength=2**16).cpu()
    low, _ = _crossing(lower, keep - above)
    threshold = (bucket - 2**15 << 16) + low
    counts, ties = dict.fromkeys(numel, 0), dict.fromkeys(numel, 0)
    for name, keys in _keys(scores):
        counts[name] += int((keys > threshold).sum())
        ties[name] += int((keys == threshold).sum())
    left = keep - sum(counts.values())
    for name, tied in ties.items():
        taken = min(left, tied)
        counts[name] += taken
        left -= taken
    return counts


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
        free = {name: sum(shape) for name, shape in shapes.items() if name not in full}
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


def _keys(scores: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Blocks of 32-bit integers in the order of the float scores, tensor by tensor."""
    for name in scores:
        # The tensor is an argument only, so that it is freed before the next one is looked up.
        yield from ((name, keys) for keys in _ordered(scores[name], name))


def _ordered(scores: Tensor, name: str) -> Iterator[Tensor]:
    if scores.isnan().any():
        raise ValueError(f"scores of {name} hold NaN: did training diverge?")
    for block in scores.flatten().split(_BLOCK):
        # Adding +0 turns -0 into +0: equal scores must have equal keys.
        bits = (block.float() + 0.0).view(torch.int32)
        # The integers of negative floats run backwards: flip all bits but the sign.
        yield bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _crossing(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bucket that holds the ``keep``-th largest key, and how many keys lie above it."""
    from_top = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, keep))
    bucket = histogram.numel() - 1 - position
    return bucket, int(from_top[position] - histogram[bucket])
