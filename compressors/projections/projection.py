"""Projections: the nearest tensor that can be stored cheaply."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Sum
from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.weights import Matrices

__all__ = ["Additive", "Chain", "Projection"]

# Turns of an Additive at most, and the fraction of the error that a turn has to gain.
_TURNS, _GAIN = 100, 1e-4


class Projection(ABC):
    """Solves ``min over code of ||w - decode(code)||^2``.

    A projection is feasible, its result can be stored exactly, and idempotent to rounding:
    projecting the result again changes nothing (but see :class:`Additive`). It has no state.
    """

    @abstractmethod
    def encode(self, weight: Tensor) -> Code:
        """The code nearest to ``weight``."""

    def project(self, weight: Tensor) -> Tensor:
        """The tensor nearest to ``weight`` that the code can hold."""
        return self.encode(weight).decode()

    def refusal(self, shape: torch.Size) -> str | None:
        """The reason why no tensor of this shape can be projected, or None if any can."""
        return None

    def support(self, weight: Tensor) -> Tensor:
        """The mask of the weights that may differ from zero: where the nearest tensor does."""
        return weight != 0

    def levels(self, weight: Tensor, importance: Tensor) -> Levels | None:
        """The values that each weight of the support may take.

        With this method :func:`~fitsmall.compressors.compress` fits the projection to data; without
        it, ``None``, weights are projected as they are.

        Args:
            weight: The weight, zero where it is pruned.
            importance: Positive weights of the squared errors, of the same shape.
        """
        return None

    def along(self, form: Matrices) -> "Projection":
        """The projection of a weight with these dimensions of outputs and inputs."""
        return self

    def after(self, code: Code) -> Code:
        """The code of an earlier projection, with its float leaves coded by this one."""
        return code.map(self.encode)

    def __or__(self, then: "Projection") -> "Projection":
        """``first | then`` codes the float leaves of the first with the second.

        Example:
            >>> from fitsmall.compressors import KMeans, TopK
            >>> import torch
            >>> (TopK(0.5) | KMeans(1)).project(torch.tensor([3.0, -0.1, 0.2, 5.0]))
            tensor([4., 0., 0., 4.])
        """
        return Chain(self, then) if isinstance(then, Projection) else NotImplemented

    def __add__(self, other: "Projection") -> "Projection":
        """``first + second`` finds two tensors that add up to the weight.

        Example:
            >>> from fitsmall.compressors import KMeans, TopK
            >>> import torch
            >>> (KMeans(1) + TopK(0.75)).project(torch.tensor([1.0, 1.0, 1.0, 9.0]))
            tensor([1., 1., 1., 9.])
        """
        return Additive(self, other) if isinstance(other, Projection) else NotImplemented


@dataclass(frozen=True)
class Additive(Projection):
    """``min ||w - a - b||^2`` over the tensors ``a`` and ``b`` that two projections can hold: low
    rank and a few weights of their own, or a codebook and a few exceptions.

    Each projects what the other leaves, in turns, until a turn gains next to nothing (Zhou and Tao,
    2011, "GoDec"). If both projections are exact, every turn comes closer, but it may miss the
    nearest of all sums, and find another sum when its result is projected again.

    Args:
        first: Projection of ``w - b``, which begins with ``b = 0``.
        second: Projection of ``w - a``.
    """

    first: Projection
    second: Projection

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        best = self._turn(weight, torch.zeros_like(weight))
        error = (weight - best.decode()).norm()
        for _ in range(1, _TURNS):
            found = self._turn(weight, best.second.decode())
            left = (weight - found.decode()).norm()
            if left >= (1 - _GAIN) * error:
                break
            best, error = found, left
        return best

    def along(self, form: Matrices) -> Projection:
        return Additive(self.first.along(form), self.second.along(form))

    def refusal(self, shape: torch.Size) -> str | None:
        return self.first.refusal(shape) or self.second.refusal(shape)

    def _turn(self, weight: Tensor, rest: Tensor) -> Sum:
        first = self.first.encode(weight - rest)
        return Sum(first, self.second.encode(weight - first.decode()))


@dataclass(frozen=True)
class Chain(Projection):
    """``then`` codes the float leaves of ``first``: pruned zeros stay exactly zero."""

    first: Projection
    then: Projection

    def encode(self, weight: Tensor) -> Code:
        return self.then.after(self.first.encode(weight))

    def along(self, form: Matrices) -> Projection:
        return Chain(self.first.along(form), self.then.along(form))

    def refusal(self, shape: torch.Size) -> str | None:
        return self.first.refusal(shape) or self.then.refusal(shape)

    def support(self, weight: Tensor) -> Tensor:
        first = self.first.support(weight)
        return first & self.then.support(weight * first)

    def levels(self, weight: Tensor, importance: Tensor) -> Levels | None:
        first = self.first.levels(weight, importance)
        if first is None or not first.any_value:
            return None
        return self.then.levels(weight, importance)
