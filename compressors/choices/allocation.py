"""Allocation: how one model-wide sparsity becomes a number of kept sets of weights per tensor.

An allocation takes the scores of every tensor's sets (single weights, if no structure says
otherwise) and the sparsity of them all together. Scores are looked up tensor by tensor, twice
where a threshold is searched, so that a :class:`Lazy` mapping never holds more than one tensor's
scores: concatenated copies of all weights would run out of memory on large models.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from fitsmall.compressors.naming import lookup, name_of
from fitsmall.compressors.projections.prune import kept
from fitsmall.compressors.projections.structures import Structure

__all__ = [
    "ALLOCATIONS",
    "BY_SHAPE",
    "Allocation",
    "Lazy",
    "SetScores",
    "as_allocation",
    "erk",
    "global_",
    "lamp",
    "uniform",
]

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


class SetScores(Lazy):
    """Scores of the sets of every tensor, pooled from those of its weights when looked up.

    Args:
        structure: The sets.
        shapes: Shapes of the weights by name.
        compute: Scores of the weights of a name; by default ones without values, for allocations
            that look at shapes alone.

    Example:
        >>> from fitsmall.compressors import Block
        >>> shapes = {"fc": torch.Size([2, 4])}
        >>> scores = SetScores(Block(2, 2), shapes, lambda name: torch.ones(2, 4))
        >>> scores["fc"], scores.num_sets
        (tensor([[4., 4.]]), {'fc': 2})
    """

    def __init__(
        self,
        structure: Structure,
        shapes: Mapping[str, torch.Size],
        compute: Callable[[str], Tensor] | None = None,
    ) -> None:
        score = compute or (lambda name: torch.empty(shapes[name], device="meta"))
        super().__init__(shapes, lambda name: structure.pool(score(name)))
        self.shapes = shapes
        self.num_sets = {name: structure.num_sets(shape) for name, shape in shapes.items()}


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """The same sparsity in every tensor.

    Example:
        >>> uniform({"a": torch.ones(4), "b": torch.ones(10)}, sparsity=0.5)
        {'a': 2, 'b': 5}
    """
    return {name: kept(count, sparsity) for name, count in _num_sets(scores).items()}


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

    Erdos-Renyi-Kernel (Mocanu et al., 2018; Evci et al., 2020): small layers stay denser. The
    dimensions are those of the weights, whatever the sets.

    Example:
        >>> erk({"a": torch.ones(100, 10), "b": torch.ones(10, 10)}, sparsity=0.9)
        {'a': 93, 'b': 17}
    """
    if isinstance(scores, SetScores):
        shapes = scores.shapes
    else:
        shapes = {name: scores[name].shape for name in scores}
    num_sets = _num_sets(scores)
    # Kept sets at a scale of 1: density times sets.
    degrees = {
        name: max(1, sum(shape)) * num_sets[name] / max(1, shape.numel())
        for name, shape in shapes.items()
    }
    budget = (1.0 - sparsity) * sum(num_sets.values())
    kept(1, sparsity)  # raises for a sparsity that is no fraction
    full: set[str] = set()
    while True:
        free = {name: degree for name, degree in degrees.items() if name not in full}
        left = budget - sum(num_sets[name] for name in full)
        scale = left / sum(free.values()) if free else 0.0
        over = {name for name, degree in free.items() if scale * degree > num_sets[name]}
        if not over:
            break
        full |= over
    return {
        name: num_sets[name] if name in full else round(scale * free[name]) for name in num_sets
    }


@dataclass(frozen=True)
class Allocation:
    """A function that allocates, its result checked.

    Args:
        allocate: Function ``(scores by name, sparsity) -> number of kept sets by name``.
        by_shape: Whether it looks at the shapes of the scores alone, so that its numbers are known
            before training.

    Raises:
        TypeError: It is no function.

    Example:
        >>> Allocation(lambda scores, sparsity: dict.fromkeys(scores, 5))({"a": torch.ones(4)}, 0.5)
        Traceback (most recent call last):
        ValueError: allocation <lambda> keeps 5 of the 4 sets of a
    """

    allocate: Callable[[Mapping[str, Tensor], float], Mapping[str, int]]
    by_shape: bool = False

    def __post_init__(self) -> None:
        if not callable(self.allocate):
            raise TypeError(
                "an allocation is a name or a function (scores by name, sparsity) -> number of "
                f"kept sets by name, got {self.allocate!r}"
            )

    def __str__(self) -> str:
        return name_of(self.allocate)

    def __call__(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        """Number of kept sets by name, checked.

        Args:
            scores: Of the sets, by name.
            sparsity: Fraction of sets that are pruned, of all tensors together, in [0, 1].

        Raises:
            ValueError: A tensor is missing or unknown, its number is outside [0, number of sets],
                or all numbers together miss the sparsity by more than a set for each tensor.
            TypeError: The function returns no whole numbers by name.
        """
        num_sets = _num_sets(scores)
        if not num_sets:
            return {}
        keep = self.allocate(scores, sparsity)
        if not isinstance(keep, Mapping):
            raise TypeError(f"allocation {self} must return numbers by name, not {keep!r}")
        missing, unknown = num_sets.keys() - keep.keys(), keep.keys() - num_sets.keys()
        if missing or unknown:
            verb = "leaves out" if missing else "invents"
            raise ValueError(
                f"allocation {self} {verb} {min(missing or unknown)}: it must return a number for "
                "each of its tensors"
            )
        for name, count in keep.items():
            if not isinstance(count, Integral):
                raise TypeError(
                    f"allocation {self} must return whole numbers of sets, not {count!r} for {name}"
                )
            if not 0 <= count <= num_sets[name]:
                raise ValueError(
                    f"allocation {self} keeps {count} of the {num_sets[name]} sets of {name}"
                )
        total, of = sum(keep.values()), sum(num_sets.values())
        target = kept(of, sparsity)
        if abs(total - target) > len(num_sets):
            raise ValueError(
                f"allocation {self} keeps {total} of {of} sets, and a sparsity of {sparsity:g} "
                f"keeps {target}"
            )
        return {name: int(keep[name]) for name in num_sets}


ALLOCATIONS = {
    "uniform": Allocation(uniform, by_shape=True),
    "global": Allocation(global_),
    "erk": Allocation(erk, by_shape=True),
    "lamp": Allocation(lamp),
}
BY_SHAPE = frozenset(name for name, allocation in ALLOCATIONS.items() if allocation.by_shape)


def as_allocation(
    value: str | Allocation | Callable[[Mapping[str, Tensor], float], Mapping[str, int]],
) -> Allocation:
    """The allocation that a user means by a name, an allocation or a function.

    Raises:
        ValueError: There is no allocation of that name.
        TypeError: The value is none of the three.

    Example:
        >>> as_allocation("erk").by_shape
        True
    """
    if isinstance(value, Allocation):
        return value
    if isinstance(value, str):
        return lookup("allocation", value, ALLOCATIONS)
    return Allocation(value)


def _num_sets(scores: Mapping[str, Tensor]) -> Mapping[str, int]:
    """Number of sets by name, without their scores where it is known."""
    if isinstance(scores, SetScores):
        return scores.num_sets
    return {name: scores[name].numel() for name in scores}


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
