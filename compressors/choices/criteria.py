"""Criteria: how much a weight matters. Pure functions of the weight and of collected statistics.

Larger scores survive. A criterion names the statistics that it needs, any number of
:data:`STATISTICS`, and training collects only these.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from fitsmall.compressors.naming import lookup, name_of

__all__ = [
    "CRITERIA",
    "STATISTICS",
    "Criterion",
    "activation",
    "adam",
    "as_criterion",
    "gradient",
    "hessian",
    "magnitude",
    "movement",
    "random",
    "uniform_noise",
]

Statistics = Mapping[str, Tensor]

# Definitions by name. All have the weight's shape but for the norm, which broadcasts to it.
STATISTICS = {
    "gradient": "moving average of the gradient g",
    "squared_gradient": "moving average of g^2",
    "movement": "sum over steps of -w g",
    "input_norm": "root of the moving average of each input feature's summed squares",
    "uniform": "uniform numbers in [0, 1), the same in all of a run, see uniform_noise",
}


def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """``|w|``: the nearest sparse tensor keeps the largest ones (Han et al., 2015).

    Example:
        >>> magnitude(torch.tensor([2.0, -3.0]), {})
        tensor([2., 3.])
    """
    return weight.abs()


def gradient(weight: Tensor, statistics: Statistics) -> Tensor:
    """``|w E[g]|``: first-order Taylor estimate of the loss a removal costs (Molchanov, 2017).

    Example:
        >>> gradient(torch.tensor([2.0, -3.0]), {"gradient": torch.tensor([-1.0, 0.5])})
        tensor([2.0000, 1.5000])
    """
    return (weight * statistics["gradient"]).abs()


def activation(weight: Tensor, statistics: Statistics) -> Tensor:
    """``|w_ij| ||x_j||``: magnitude times the norm of the input it meets (Wanda, Sun et al., 2023).

    Example:
        >>> activation(torch.tensor([[2.0, -3.0]]), {"input_norm": torch.tensor([2.0, 1.0])})
        tensor([[4., 3.]])
    """
    return weight.abs() * statistics["input_norm"]


def hessian(weight: Tensor, statistics: Statistics) -> Tensor:
    """``w^2 E[g^2] / 2``: second-order cost, the Hessian's diagonal as the empirical Fisher
    (Optimal Brain Damage, LeCun et al., 1990).

    Example:
        >>> hessian(torch.tensor([2.0, -3.0]), {"squared_gradient": torch.tensor([1.0, 0.5])})
        tensor([2.0000, 2.2500])
    """
    return weight.square() * statistics["squared_gradient"] / 2


def adam(weight: Tensor, statistics: Statistics) -> Tensor:
    """``w^2 sqrt(E[g^2]) / 2``: second-order cost under the curvature that Adam assumes.

    Adam takes ``sqrt(E[g^2])`` for the diagonal of the Hessian when it divides by it. Between
    magnitude and :func:`hessian`, whose squared gradients vary over many orders of magnitude
    and leave too little to layers whose gradients are small.

    Example:
        >>> adam(torch.tensor([2.0, -3.0]), {"squared_gradient": torch.tensor([1.0, 0.25])})
        tensor([2.0000, 2.2500])
    """
    return weight.square() * statistics["squared_gradient"].sqrt() / 2


def movement(weight: Tensor, statistics: Statistics) -> Tensor:
    """``-sum w g``: weights that training drives away from zero (Sanh et al., 2020).

    Example:
        >>> movement(torch.tensor([2.0, -3.0]), {"movement": torch.tensor([-1.0, 4.0])})
        tensor([-1.,  4.])
    """
    return statistics["movement"]


def random(weight: Tensor, statistics: Statistics) -> Tensor:
    """A uniform number: the floor that every other criterion has to stay above (ShrinkBench,
    Blalock et al., 2020).

    Example:
        >>> random(torch.tensor([2.0, -3.0]), {"uniform": torch.tensor([0.75, 0.5])})
        tensor([0.7500, 0.5000])
    """
    return statistics["uniform"]


def uniform_noise(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on the name and the seed alone.

    Every process of a distributed run draws the same numbers, a resumed run draws them again, and
    another parameter or another seed gets others.

    Args:
        name: Name of the parameter.
        shape: Shape of the result, which lies on the CPU.
        seed: Seed of the run.

    Example:
        >>> uniform_noise("fc.weight", (2,), seed=0)
        tensor([0.9249, 0.8930])
    """
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.rand(torch.Size(shape), generator=generator)


@dataclass(frozen=True)
class Criterion:
    """A score and the statistics that it needs.

    Args:
        score: Function ``(weight, statistics) -> score`` of the weight's shape; larger survives.
        statistics: Names from :data:`STATISTICS`; the function gets these alone.

    Raises:
        TypeError: The score is no function, or the statistics are no names.
        ValueError: There is no such statistic.

    Example:
        >>> def saliency(weight, statistics):
        ...     return weight.square() * statistics["squared_gradient"] + statistics["movement"]
        >>> criterion = Criterion(saliency, statistics=("squared_gradient", "movement"))
        >>> gathered = {"squared_gradient": torch.tensor([3.0]), "movement": torch.tensor([-1.0])}
        >>> criterion(torch.tensor([2.0]), gathered)
        tensor([11.])
    """

    score: Callable[[Tensor, Statistics], Tensor]
    statistics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not callable(self.score):
            raise TypeError(
                "a criterion is a name, a function (weight, statistics) -> score, or a Criterion "
                f"of such a function and its statistics, got {self.score!r}"
            )
        if isinstance(self.statistics, str):
            raise TypeError(
                f"criterion {self}: statistics are a tuple of names, write "
                f"statistics={(self.statistics,)}"
            )
        # From YAML they come as a list.
        object.__setattr__(self, "statistics", tuple(self.statistics))
        for name in self.statistics:
            lookup(f"statistic of {self}", name, STATISTICS)

    def __str__(self) -> str:
        return name_of(self.score)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Scores of the weights, checked.

        Args:
            weight: Tensor of any shape.
            statistics: At least those that the criterion needs.

        Raises:
            ValueError: The scores have another shape than the weight, a statistic is missing, or
                the function looks up one that the criterion does not declare.
            TypeError: The function returns no tensor of floating-point numbers.
        """
        missing = [name for name in self.statistics if name not in statistics]
        if missing:
            raise ValueError(f"criterion {self} needs statistics that are missing: {missing}")
        scores = self.score(weight, _Declared(self, statistics))
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise TypeError(
                f"criterion {self} must return a tensor of floating-point scores, not "
                f"{scores.dtype if isinstance(scores, Tensor) else scores!r}"
            )
        if scores.shape != weight.shape:
            raise ValueError(
                f"criterion {self} must return one score for each weight: the weight has shape "
                f"{tuple(weight.shape)}, its scores {tuple(scores.shape)}"
            )
        return scores


class _Declared(dict[str, Tensor]):
    """The statistics that a criterion declares; looking up another one says how to declare it."""

    def __init__(self, criterion: Criterion, statistics: Statistics) -> None:
        super().__init__({name: statistics[name] for name in criterion.statistics})
        self._criterion = criterion

    def __missing__(self, name: str) -> Tensor:
        lookup(f"statistic of {self._criterion}", name, STATISTICS)
        raise ValueError(
            f"criterion {self._criterion} looks up the statistic {name!r} and does not declare it: "
            f"write Criterion({self._criterion}, statistics={(*self, name)})"
        )


CRITERIA = {
    "magnitude": Criterion(magnitude),
    "gradient": Criterion(gradient, ("gradient",)),
    "activation": Criterion(activation, ("input_norm",)),
    "hessian": Criterion(hessian, ("squared_gradient",)),
    "adam": Criterion(adam, ("squared_gradient",)),
    "movement": Criterion(movement, ("movement",)),
    "random": Criterion(random, ("uniform",)),
}


def as_criterion(value: str | Criterion | Callable[[Tensor, Statistics], Tensor]) -> Criterion:
    """The criterion that a user means by a name, a criterion, or a function without statistics.

    Raises:
        ValueError: There is no criterion of that name.
        TypeError: The value is none of the three.

    Example:
        >>> as_criterion("hessian").statistics
        ('squared_gradient',)
        >>> as_criterion(lambda weight, statistics: -weight)(torch.tensor([2.0]), {})
        tensor([-2.])
    """
    if isinstance(value, Criterion):
        return value
    if isinstance(value, str):
        return lookup("criterion", value, CRITERIA)
    return Criterion(value)
