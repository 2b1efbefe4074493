"""N:M structure of a mask: in every group of M weights N are kept.

The weights of a group are at equal distances in a row: neighbouring inputs of a linear layer, or
the same place in the kernels of neighbouring channels. A group of which exactly 2 of 4 are kept has
6 patterns, so that its mask costs log₂(6)/4 = 0.65 bits a weight instead of 1.
"""

from math import comb, log2
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["LARGEST_GROUP", "NO_GROUPS", "Groups", "find_groups"]

LARGEST_GROUP = 16
_LARGEST_SPACING = 128  # weights of a kernel

# After so many groups a mask without structure is recognized.
_FEW = 64


class Groups(NamedTuple):
    """Groups of ``size`` weights, ``spacing`` apart, of which ``least`` to ``most`` are kept."""

    size: int
    most: int
    least: int
    spacing: int

    @property
    def bits(self) -> float:
        """Bits a weight, if all patterns of a group are equally likely."""
        patterns = sum(comb(self.size, kept) for kept in range(self.least, self.most + 1))
        return log2(patterns) / self.size


NO_GROUPS = Groups(0, 0, 0, 1)


def find_groups(symbols: NDArray[Any]) -> Groups:
    """The groups that leave the fewest patterns for the symbols of a matrix that are not zero.

    At least half of them keep as many weights as any of them does. The others may keep fewer: a
    quantizer rounds some of the kept weights to zero.

    Args:
        symbols: Matrix of integers; rows are output units.

    Example:
        >>> find_groups(np.array([[0, 1, 1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]]))
        Groups(size=4, most=2, least=2, spacing=1)
        >>> find_groups(np.array([[1, 1, 1, 0, 0, 1, 0, 0]]))
        Groups(size=4, most=2, least=2, spacing=2)
    """
    width = symbols.shape[1]
    found = []
    size = 2
    while size <= LARGEST_GROUP and width % size == 0:
        for spacing in range(1, min(_LARGEST_SPACING, width // size) + 1):
            if width % (size * spacing) == 0:
                least, most = _kept(symbols, size, spacing)
                if 0 < most < size:
                    found.append(Groups(size, most, least, spacing))
        size *= 2
    return min(found, key=lambda groups: groups.bits, default=NO_GROUPS)


@njit(cache=True)
def _kept(symbols: Any, size: int, spacing: int) -> tuple[int, int]:
    """Least and most symbols that are not zero in a group; 0 of 0 if that differs too often."""
    histogram = np.zeros(size + 1, np.int64)
    groups = most = 0
    for i in range(symbols.shape[0]):
        for start in range(0, symbols.shape[1], size * spacing):
            for first in range(start, start + spacing):
                kept = 0
                for member in range(size):
                    kept += symbols[i, first + member * spacing] != 0
                histogram[kept] += 1
                most = max(most, kept)
            groups += spacing
            if groups >= _FEW and 2 * histogram[most] < groups:
                return 0, 0
    least = 0
    while histogram[least] == 0:
        least += 1
    return least, (most if 2 * histogram[most] >= groups else 0)
