"""Projections: the nearest tensor that can be stored cheaply."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from pressfit.compressors.codes import Code

__all__ = ["Chain", "Projection"]


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
            >>> from pressfit.compressors import KMeans, TopK
            >>> import torch
            >>> (TopK(0.5) | KMeans(1)).project(torch.tensor([3.0, -0.1, 0.2, 5.0]))
            tensor([4., 0., 0., 4.])
        """
        return Chain(self, then)


@dataclass(frozen=True)
class Chain(Projection):
    """``then`` applied to what ``first`` keeps, so pruned zeros stay exactly zero."""

    first: Projection
    then: Projection

    def encode(self, weight: Tensor) -> Code:
        return self.then.after(self.first.encode(weight))
