"""Levels: the values that a projection allows each weight, once its choice is made.

A projection chooses a codebook, or scales. After that choice every weight is on its own: it is one
of its levels. A solver may then round weights one by one, each to the level that makes up best for
the errors of the others.
"""

from collections.abc import Callable
from typing import Self

from torch import Tensor

__all__ = ["Levels"]


class Levels:
    """Any value. A subclass allows fewer, and says which one a weight takes."""

    @property
    def any_value(self) -> bool:
        """Whether a weight may have any value."""
        return type(self) is Levels

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the levels of the weight with its dimensions in another order or shape.

        Args:
            change: Function that gives a tensor of the weight's shape the other one.
        """
        return self

    def best(self, values: Tensor, column: int, curvature: Tensor) -> Tensor:
        """Return the level of each of the values of one column: the nearest, or, where levels have
        a price, the one of least error and price.

        Args:
            values: Values of the weights ``[..., column]``.
            column: Number of the column.
            curvature: Second derivative of the error by each of them, of the same shape.
        """
        return values
