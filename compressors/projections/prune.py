"""Pruning: keep the weights that matter most, exactly as many as asked for."""

import math
from dataclasses import dataclass, field, replace

import torch
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
from fitsmall.compressors.weights import Matrices

__all__ = ["TopK", "keep_slices_", "kept", "support"]


def kept(numel: int, sparsity: float) -> int:
    """How many of ``numel`` weights a sparsity leaves, rounded to the nearest.

    Example:
        >>> kept(1000, 0.95)
        50
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is a fraction in [0, 1], got {sparsity}")
    return round((1.0 - sparsity) * numel)


def keep_slices_(mask: Tensor, weight: Tensor, axis: int) -> None:
    """Keep the largest weights of each slice that has none left, along a dimension.

    Example:
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> keep_slices_(mask, torch.tensor([[5.0, 1.0], [0.1, -0.2]]), axis=0)
        >>> mask.int()
        tensor([[1, 0],
                [0, 1]], dtype=torch.int32)
    """
    kept, slices = (tensor.movedim(axis, 0) for tensor in (mask, weight))
    for index in (~kept.flatten(1).any(1)).nonzero().flatten().tolist():
        kept[index] = slices[index].abs() == slices[index].abs().max()


@dataclass(frozen=True)
class TopK(Projection):
    """Keep the largest sets of weights: ``min ||w - v||^2`` where at most ``(1 - s) n`` of the
    ``n`` sets of ``v`` are not zero.

    Args:
        sparsity: Fraction ``s`` of the sets that become zero, in [0, 1].
        structure: The sets: single weights, blocks, or weights of which at most N of M survive.
        form: Dimensions of the weight; by default those of a Linear layer or a convolution. Sets
            other than single weights are those of each matrix, and every matrix keeps as many.

    Raises:
        ValueError: The sparsity is no fraction or not the one that the structure fixes; at a
            projection, the structure refuses the shape of the tensor.

    Example:
        >>> from fitsmall.compressors import Block
        >>> TopK(sparsity=0.5).project(torch.tensor([3.0, -1.0, 0.5, -2.0]))
        tensor([ 3.,  0.,  0., -2.])
        >>> TopK(0.5, Block(1, 2)).project(torch.tensor([[3.0, -1.0, 0.5, -2.0]]))
        tensor([[ 3., -1.,  0.,  0.]])
    """

    sparsity: float
    structure: Structure = field(default_factory=Unstructured)
    form: Matrices = field(default=Matrices(""), repr=False)

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

    def along(self, form: Matrices) -> Projection:
        return replace(self, form=form)

    def refusal(self, shape: torch.Size) -> str | None:
        reason = self.structure.refusal(self.form.matrix_shape(shape))
        return reason and f"{self.structure} cannot prune the tensor: {reason}"

    def encode(self, weight: Tensor) -> Sparse:
        weight = weight.detach()
        mask = self._mask(weight) & (weight != 0)
        if self.form.normed is not None:
            keep_slices_(mask, weight, self.form.normed)
        return Sparse(mask, Dense(weight[mask]))

    def _mask(self, weight: Tensor) -> Tensor:
        if self.structure == Unstructured():
            # Magnitudes rank single weights as squares do, without underflow or a wider copy.
            return self.structure.mask(weight.abs(), kept(weight.numel(), self.sparsity))
        if reason := self.refusal(weight.shape):
            raise ValueError(reason)
        shape = self.form.matrix_shape(weight.shape)
        keep = kept(self.structure.num_sets(shape), self.sparsity)
        scores = self.form.split(weight.double().square())
        masks = torch.stack([self.structure.mask(matrix, keep) for matrix in scores])
        return self.form.join(masks).contiguous()

    def support(self, weight: Tensor) -> Tensor:
        return self.encode(weight).mask

    def levels(self, weight: Tensor, importance: Tensor) -> Levels:
        return Levels()
