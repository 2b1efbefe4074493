"""Pruning: keep the weights that matter most, exactly as many as asked for."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fitsmall.compressors.codes import Code, Dense, Sparse
from fitsmall.compressors.projections import Projection

__all__ = ["TopK", "kept", "support"]


def kept(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights a sparsity leaves, rounded to the nearest.

    Example:
        >>> kept(1000, 0.95)
        50
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is a fraction in [0, 1], got {sparsity}")
    return round((1.0 - sparsity) * numel)


def support(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores; of equal ones the first in row-major order survive.

    The count is exact, and every process of a distributed run makes the same choice.

    Args:
        scores: Tensor of any shape, without NaN.
        keep: Number of true entries, in [0, numel].

    Example:
        >>> support(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), keep=2)
        tensor([[False,  True],
                [ True, False]])
    """
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"cannot keep {keep} of {scores.numel()} weights")
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.isnan().any():
        raise ValueError("scores hold NaN: did training diverge?")
    flat = scores.flatten()
    threshold = _largest(flat, keep)
    mask = flat >= threshold
    surplus = int(mask.count_nonzero()) - keep
    if surplus:
        ties = flat == threshold
        mask &= ~ties | (ties.cumsum(0) <= ties.count_nonzero() - surplus)
    return mask.view(scores.shape)


@dataclass(frozen=True)
class TopK(Projection):
    r"""Keep the largest weights: ``min ||w - v||^2`` subject to ``||v||_0 <= (1 - s) n``.

    Args:
        sparsity: Fraction ``s`` of the weights that become zero, in [0, 1].

    Example:
        >>> TopK(sparsity=0.5).project(torch.tensor([3.0, -1.0, 0.5, -2.0]))
        tensor([ 3.,  0.,  0., -2.])
    """

    sparsity: float

    def __post_init__(self) -> None:
        kept(1, self.sparsity)  # raises for what is no fraction

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        mask = support(weight.abs(), kept(weight.numel(), self.sparsity)) & (weight != 0)
        return Sparse(mask, Dense(weight[mask]))


def _largest(flat: Tensor, k: int) -> float:
    """The ``k``-th largest of some values."""
    flat = flat[flat > -torch.inf]  # many equal values would make the search slow
    if flat.numel() < k:
        return -torch.inf
    if flat.device.type == "cpu" and flat.dtype != torch.bfloat16:
        # Ten times faster than torch.kthvalue.
        return float(np.partition(flat.numpy(), -k)[-k])
    return float(flat.kthvalue(flat.numel() - k + 1).values)
