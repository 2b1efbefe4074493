"""Blocks of a tensor, and the coarsest grid that holds the floats of each block."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["blocked", "lattice", "spread", "unblocked"]

# The largest integer of a signed byte that can also be negated.
LARGEST = 127

# Values that are looked at together, so that temporaries stay small.
_BLOCK = 2**16


def lattice(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scales and integers of a matrix, ``blocks[i, j] = scales[i] integers[i, j]``, or None.

    The scale of a row is the greatest common divisor of its values: every float is an integer times
    a power of two. A row that was quantized with a scale of few digits, such as a bfloat16 times
    8-bit integers in float32, has integers no larger than those.

    Args:
        blocks: Matrix of floats, one block in each row.

    Returns:
        Scales of the rows and the matrix of int8 integers; None if a row needs integers above 127,
        or holds -0, NaN or infinity.

    Example:
        >>> lattice(torch.tensor([[0.75, -0.25, 0.0], [3.0, 3.0, 6.0]]))
        (tensor([0.2500, 3.0000]), tensor([[ 3, -1,  0],
                [ 1,  1,  2]], dtype=torch.int8))
        >>> lattice(torch.tensor([[0.1, 0.2, 0.7]])) is None
        True
    """
    rows = max(1, _BLOCK // max(1, blocks.shape[1]))
    scales, integers = [], []
    for part in blocks.split(rows):
        found = _common_divisors(part.double().numpy())
        if found is None:
            return None
        scales.append(torch.from_numpy(found[0]).to(blocks.dtype))
        integers.append(torch.from_numpy(found[1]))
    return torch.cat(scales), torch.cat(integers)


def blocked(tensor: Tensor, blocks: Sequence[int]) -> Tensor:
    """A row for each block of a tensor, which ``blocks`` divides evenly along every dimension.

    Example:
        >>> blocked(torch.arange(8).view(2, 4), (2, 2))
        tensor([[0, 1],
                [2, 3],
                [4, 5],
                [6, 7]])
        >>> blocked(torch.arange(8).view(2, 4), (1, 4))
        tensor([[0, 4],
                [1, 5],
                [2, 6],
                [3, 7]])
    """
    sizes = [
        n for size, count in zip(tensor.shape, blocks, strict=True) for n in (count, size // count)
    ]
    outer, inner = range(0, 2 * tensor.dim(), 2), range(1, 2 * tensor.dim(), 2)
    return tensor.reshape(sizes).permute(*outer, *inner).reshape(math.prod(blocks), -1)


def unblocked(rows: Tensor, blocks: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The tensor that :func:`blocked` cut."""
    inner = [size // count for size, count in zip(shape, blocks, strict=True)]
    order = [d for k in range(len(shape)) for d in (k, len(shape) + k)]
    return rows.view(*blocks, *inner).permute(order).reshape(tuple(shape))


def spread(scales: Tensor, shape: Sequence[int]) -> Tensor:
    """The scales of blocks, repeated so that they broadcast over a tensor of this shape.

    Example:
        >>> spread(torch.tensor([[1.0, 2.0]]), (3, 4))
        tensor([[1., 1., 2., 2.]])
    """
    for dimension, (blocks, size) in enumerate(zip(scales.shape, shape, strict=True)):
        if 1 < blocks < size:
            scales = scales.repeat_interleave(size // blocks, dimension)
    return scales


def _common_divisors(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int8]] | None:
    """Greatest common divisor of each row, and the row divided by it."""
    if not np.isfinite(values).all() or (np.signbit(values) & (values == 0)).any():
        return None
    mantissas, exponents = np.frexp(values)
    digits = np.ldexp(mantissas, 53).astype(np.int64)
    _, trailing = np.frexp((digits & -digits).astype(np.float64))
    lowest = np.where(digits != 0, exponents + trailing - 54, np.iinfo(np.int32).max)
    units = lowest.min(axis=1, initial=np.iinfo(np.int32).max, keepdims=True)
    units[units == np.iinfo(np.int32).max] = 0  # of rows of zeros
    wholes = np.ldexp(values, -units)
    if (np.abs(wholes) >= 2**62).any():
        return None
    divisors = np.gcd.reduce(wholes.astype(np.int64), axis=1, keepdims=True)
    integers = wholes.astype(np.int64) // np.maximum(divisors, 1)
    if (np.abs(integers) > LARGEST).any():
        return None
    return np.ldexp(divisors.astype(np.float64), units)[:, 0], integers.astype(np.int8)
