"""Criteria: what makes a weight matter. Pure functions of the weight and of collected statistics.

Larger scores survive. A criterion names the statistics it needs, and only these are collected:

==================  ===========================================================  ==============
statistic           definition                                                   shape
==================  ===========================================================  ==============
gradient            moving average of the gradient ``g``                         the weight's
squared_gradient    moving average of ``g^2``                                    the weight's
movement            sum over steps of ``-w g``                                   the weight's
input_norm          root of the summed squares of each input feature             broadcastable
==================  ===========================================================  ==============
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CRITERIA",
    "Criterion",
    "activation",
    "adam",
    "gradient",
    "hessian",
    "magnitude",
    "movement",
    "random",
]

Statistics = Mapping[str, Tensor]


def magnitude(weight: Tensor, statistics: Statistics) -> Tensor:
    """``|w|``: what the nearest sparse tensor keeps (Han et al., 2015).

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
    """A uniform number, the same whenever it is asked for: the floor that every other criterion has
    to stay above (ShrinkBench, Blalock et al., 2020).

    Example:
        >>> random(torch.zeros(2, 2), {}).equal(random(torch.ones(2, 2), {}))
        True
    """
    generator = torch.Generator().manual_seed(weight.numel())
    return torch.rand(weight.shape, generator=generator).to(weight.device)


@dataclass(frozen=True)
class Criterion:
    """A score and the statistics it needs.

    Args:
        score: Function of the weight and its statistics; larger survives.
        statistics: Names from the table above.
    """

    score: Callable[[Tensor, Statistics], Tensor]
    statistics: tuple[str, ...] = ()


CRITERIA = {
    "magnitude": Criterion(magnitude),
    "gradient": Criterion(gradient, ("gradient",)),
    "activation": Criterion(activation, ("input_norm",)),
    "hessian": Criterion(hessian, ("squared_gradient",)),
    "adam": Criterion(adam, ("squared_gradient",)),
    "movement": Criterion(movement, ("movement",)),
    "random": Criterion(random),
}
