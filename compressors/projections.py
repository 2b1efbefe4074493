"""Projections: the nearest tensor that can be stored cheaply."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fitsmall.compressors.codes import Code, Sum

__all__ = ["Additive", "Chain", "Projection"]

# Turns of a sum at most, and the fraction of the error that a turn has to gain.
_TURNS, _GAIN = 100, 1e-4


class Projection(ABC):
    """Solves ``min over code of ||w - decode(code)||^2``.

    A projection is feasible and idempotent: its result can be stored exactly, and projecting it
    again changes nothing. It holds no state.
    """

    @abstractmethod
    def encode(self, weight: Tensor) -> Code:
        """The code nearest to ``weight``."""

    def project(self, weight: Tensor) -> Tensor:
        """The tensor nearest to ``weight`` that the code can hold."""
        return self.encode(weight).decode()

    def after(self, code: Code) -> Code:
        """The code of what an earlier projection left: its float leaf, coded by this one."""
        return code.map(self.encode)

    def __or__(self, then: "Projection") -> "Projection":
        """``first | then`` codes the float leaves of the first with the second.

        Example:
            >>> from fitsmall.compressors import KMeans, TopK
            >>> import torch
            >>> (TopK(0.5) | KMeans(1)).project(torch.tensor([3.0, -0.1, 0.2, 5.0]))
            tensor([4., 0., 0., 4.])
        """
        return Chain(self, then)

    def __add__(self, other: "Projection") -> "Projection":
        """``first + second`` finds two tensors that add up to the weight.

        Example:
            >>> from fitsmall.compressors import KMeans, TopK
            >>> import torch
            >>> (KMeans(1) + TopK(0.75)).project(torch.tensor([1.0, 1.0, 1.0, 9.0]))
            tensor([1., 1., 1., 9.])
        """
        return Additive(self, other)


@dataclass(frozen=True)
class Additive(Projection):
    """``min ||w - a - b||^2`` over what each of two projections can hold: low rank and a few
    weights of their own, or a codebook and a few exceptions.

    In turns each projects what the other leaves, until that gains nothing (Zhou and Tao, 2011,
    "GoDec"). Every turn comes closer, though not always to the nearest of all sums.
    """

    first: Projection
    second: Projection

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        best, error = None, math.inf
        rest = torch.zeros_like(weight)
        for _ in range(_TURNS):
            first = self.first.encode(weight - rest)
            second = self.second.encode(weight - first.decode())
            rest = second.decode()
            left = float((weight - first.decode() - rest).norm())
            if best is not None and left >= (1 - _GAIN) * error:
                break
            best, error = Sum(first, second), left
        assert best is not None
        return best


@dataclass(frozen=True)
class Chain(Projection):
    """``then`` applied to what ``first`` keeps, so pruned zeros stay exactly zero."""

    first: Projection
    then: Projection

    def encode(self, weight: Tensor) -> Code:
        return self.then.after(self.first.encode(weight))
