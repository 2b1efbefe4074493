"""Pruning: keep the weights that matter most, exactly as many as asked for."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from fitsmall.compressors.codes.code import Dense, Sparse
from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.projections.structures import (
    Structure,
    Unstructured,
    as_structure,
    support,
)

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


@dataclass(frozen=True)
class TopK(Projection):
    """Keep the largest sets of weights: ``min ||w - v||^2`` where at most ``(1 - s) n`` of the
    ``n`` sets of ``v`` are not zero.

    Args:
        sparsity: Fraction ``s`` of the sets that become zero, in [0, 1].
        structure: The sets: single weights, blocks, or weights of which at most N of M survive.

    Raises:
        ValueError: The sparsity is no fraction or not the one that the structure fixes; at a
            projection, the structure refuses the shape of the tensor.

    Example:
        >>> import torch
        >>> from fitsmall.compressors import Block
        >>> TopK(sparsity=0.5).project(torch.tensor([3.0, -1.0, 0.5, -2.0]))
        tensor([ 3.,  0.,  0., -2.])
        >>> TopK(0.5, Block(1, 2)).project(torch.tensor([[3.0, -1.0, 0.5, -2.0]]))
        tensor([[ 3., -1.,  0.,  0.]])
    """

    sparsity: float
    structure: Structure = field(default_factory=Unstructured)

    def __post_init__(self) -> None:
        kept(1, self.sparsity)  # raises for what is no fraction
        fixed = as_structure(self.structure).sparsity
        if fixed is not None and not math.isclose(self.sparsity, fixed, rel_tol=1e-12):
            raise ValueError(
                f"{self.structure} has a sparsity of {fixed:g} and no other, got {self.sparsity:g}"
            )

    def __repr__(self) -> str:
        structure = "" if self.structure == Unstructured() else f", structure={self.structure}"
        return f"TopK(sparsity={self.sparsity}{structure})"

    def encode(self, weight: Tensor) -> Sparse:
        weight = weight.detach()
        reason = self.structure.refusal(weight.shape)
        if reason is not None:
            raise ValueError(f"{self.structure} cannot prune the tensor: {reason}")
        # Magnitudes rank single weights as squares do, without underflow or a wider copy.
        single = self.structure == Unstructured()
        scores = weight.abs() if single else weight.double().square()
        keep = kept(self.structure.num_sets(weight.shape), self.sparsity)
        mask = self.structure.mask(scores, keep) & (weight != 0)
        return Sparse(mask, Dense(weight[mask]))

    def support(self, weight: Tensor) -> Tensor:
        return self.encode(weight).mask

    def levels(self, weight: Tensor, importance: Tensor) -> Levels:
        return Levels()
