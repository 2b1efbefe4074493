"""Structures: which sets of weights live or die together.

A criterion scores weights, a structure sums the scores of a set, an allocation counts sets, and
the structure turns the number of sets that a tensor keeps into a mask of its weights.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Block", "NofM", "Structure", "Unstructured", "as_structure", "support"]


def support(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores; of equal ones the first in row-major order survive.

    The count is exact, and every process of a distributed run makes the same choice. A score of
    ``-inf`` never survives: fewer do if too few scores are above it.

    Args:
        scores: Tensor of any shape, without NaN.
        keep: Number of true entries, in [0, numel].

    Example:
        >>> support(torch.tensor([[1.0, 2.0], [2.0, 2.0]]), keep=2)
        tensor([[False,  True],
                [ True, False]])
    """
    _check(scores, keep)
    flat = scores.flatten()
    living = flat[flat > -torch.inf]
    if living.numel() <= keep:
        return scores > -torch.inf
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _largest(living, keep)
    mask = flat >= threshold
    surplus = int(mask.count_nonzero()) - keep
    if surplus:
        ties = flat == threshold
        mask &= ~ties | (ties.cumsum(0) <= ties.count_nonzero() - surplus)
    return mask.view(scores.shape)


class Structure(ABC):
    """Sets of weights that live or die together.

    A subclass says how the scores of weights become those of sets (:meth:`pool`), how a number of
    kept sets becomes a mask of weights (:meth:`mask`), and which shapes it cannot take
    (:meth:`refusal`). It holds no state.

    Example:
        >>> class Rows(Structure):
        ...     def pool(self, scores):
        ...         return scores.sum(1)
        ...     def mask(self, scores, keep):
        ...         return support(self.pool(scores), keep)[:, None].expand_as(scores)
        >>> Rows().mask(torch.tensor([[1.0, 2.0], [4.0, 0.0]]), keep=1)
        tensor([[False, False],
                [ True,  True]])
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the structure fixes, or None where it takes any."""
        return None

    def refusal(self, shape: torch.Size) -> str | None:
        """The reason why a tensor of this shape has no such sets, or None where it has."""
        return None

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Scores of the sets, sums over their weights; of any shape.

        A set that holds a score of ``-inf``, which is a weight pruned for good, scores ``-inf``.
        """

    @abstractmethod
    def mask(self, scores: Tensor, keep: int) -> Tensor:
        """Mask of the weights in the ``keep`` sets of the largest scores; of equal ones the first.

        Args:
            scores: Of the weights, without NaN; ``-inf`` never survives.
            keep: Number of sets, in [0, num_sets].
        """

    def num_sets(self, shape: torch.Size) -> int:
        """Number of sets in a tensor of a shape that is not refused.

        Example:
            >>> Block(4, 2).num_sets(torch.Size([8, 8]))
            8
        """
        return self.pool(torch.empty(shape, device="meta")).numel()


@dataclass(frozen=True)
class Unstructured(Structure):
    """Single weights.

    Example:
        >>> Unstructured().mask(torch.tensor([3.0, 1.0, 2.0]), keep=2)
        tensor([ True, False,  True])
    """

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        return support(scores, keep)


@dataclass(frozen=True)
class NofM(Structure):
    """N of M: of each ``m`` consecutive inputs, along dimension 1, at most ``n`` weights survive.

    GPUs with sparse tensor cores multiply by 2:4 matrices (Mishra et al., 2021). At the end the
    sparsity is ``1 - n / m`` in every tensor, so that there is nothing to allocate. On the way
    there ``keep`` weights give every group ``keep // groups`` of them, and one more to the groups
    whose next weight scores most.

    Args:
        n: Weights of a group that survive, from 1 to ``m - 1``.
        m: Weights of a group.

    Example:
        >>> scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 8.0, 7.0, 6.0]])
        >>> NofM(2, 4).mask(scores, keep=4).int()
        tensor([[1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.int32)
        >>> NofM(2, 4).mask(scores, keep=5).int()
        tensor([[1, 0, 1, 0, 0, 1, 1, 1]], dtype=torch.int32)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"{self} keeps n of m weights, with n from 1 to m - 1")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def refusal(self, shape: torch.Size) -> str | None:
        if len(shape) < 2:
            return "it has fewer than 2 dimensions"
        if shape[1] % self.m:
            return f"dimension 1 of its shape {tuple(shape)} is no multiple of {self.m}"
        return None

    def pool(self, scores: Tensor) -> Tensor:
        return scores

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        _check(scores, keep)
        rows, inputs, *sides = scores.shape
        # The m weights of a group last.
        groups = scores.reshape(rows, inputs // self.m, self.m, *sides).movedim(2, -1)
        every, more = divmod(keep, max(1, groups[..., 0].numel()))
        descending, order = groups.sort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)
        mask = (rank < every) & (groups > -torch.inf)
        if more:
            mask |= (rank == every) & support(descending[..., every], more).unsqueeze(-1)
        return mask.movedim(-1, 2).reshape(scores.shape)


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of the matrix ``weight.flatten(1)``, which sparse kernels for blocks (BSR) multiply.

    Args:
        rows: Rows of a block, consecutive outputs.
        columns: Columns of a block.

    Example:
        >>> scores = torch.tensor([[1.0, 2.0, 0.0, 9.0], [3.0, 4.0, 0.0, 0.0]])
        >>> Block(2, 2).pool(scores)
        tensor([[10.,  9.]])
        >>> Block(2, 2).mask(scores, keep=1).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0]], dtype=torch.int32)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (self.rows >= 1 and self.columns >= 1):
            raise ValueError(f"{self} has no weights: rows and columns are at least 1")

    def refusal(self, shape: torch.Size) -> str | None:
        if len(shape) < 2:
            return "it has fewer than 2 dimensions"
        rows, columns = shape[0], shape[1:].numel()
        if rows % self.rows or columns % self.columns:
            return (
                f"its matrix of {rows} x {columns} does not divide into blocks of "
                f"{self.rows} x {self.columns}"
            )
        return None

    def pool(self, scores: Tensor) -> Tensor:
        rows, columns = len(scores), scores.shape[1:].numel()
        blocks = scores.reshape(rows // self.rows, self.rows, columns // self.columns, self.columns)
        # Sums of half-precision scores in half precision would tie.
        return blocks.sum((1, 3), dtype=torch.promote_types(scores.dtype, torch.float32))

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        blocks = support(self.pool(scores), keep)
        matrix = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return matrix.view(scores.shape)


def as_structure(value: Structure) -> Structure:
    """The structure itself, checked to be one.

    Raises:
        TypeError: It is none.

    Example:
        >>> as_structure(NofM(2, 4))
        NofM(n=2, m=4)
    """
    if not isinstance(value, Structure):
        raise TypeError(
            "a structure is Unstructured(), NofM(2, 4), Block(4, 4) or an object of your own "
            f"subclass of Structure, got {value!r}"
        )
    return value


def _check(scores: Tensor, keep: int) -> None:
    """Refuse what no mask can be chosen from."""
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"cannot keep {keep} of {scores.numel()}")
    if scores.isnan().any():
        raise ValueError("scores hold NaN: did training diverge?")


def _largest(flat: Tensor, k: int) -> float:
    """The ``k``-th largest of some values."""
    if flat.device.type == "cpu" and flat.dtype != torch.bfloat16:
        # Ten times faster than torch.kthvalue.
        return float(np.partition(flat.numpy(), -k)[-k])
    return float(flat.kthvalue(flat.numel() - k + 1).values)
