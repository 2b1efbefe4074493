"""Blocks of a tensor, and the integers behind their floats: the coarsest grid that holds them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["blocked", "lattice", "spread", "unblocked"]

# Integers that fit a signed byte, and may be negated.
LARGEST = 127

_BLOCK = 2**16


def lattice(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Steps and integers of a matrix, ``blocks[i, j] = steps[i] integers[i, j]``, or None.

    The step of a row is the greatest common divisor of its values, which are integers times a power
    of two, as all floats are. A row that was quantized with a step of few digits, such as a
    bfloat16 times 8-bit integers in a float32, has integers that are no larger than those; any
    other row has larger ones than 127, and then nothing is returned. Nor is it for -0.

    Args:
        blocks: Matrix of floats.

    Example:
        >>> lattice(torch.tensor([[0.75, -0.25, 0.0], [3.0, 3.0, 6.0]]))
        (tensor([0.2500, 3.0000]), tensor([[ 3, -1,  0],
                [ 1,  1,  2]], dtype=torch.int8))
        >>> lattice(torch.tensor([[0.1, 0.2, 0.7]])) is None
        True
    """
    rows = max(1, _BLOCK // max(1, blocks.shape[1]))
    steps, integers = [], []
    for part in blocks.split(rows):
        found = _common(part.double().numpy())
        if found is None:
            return None
        steps.append(torch.from_numpy(found[0]).to(blocks.dtype))
        integers.append(torch.from_numpy(found[1]))
    return torch.cat(steps), torch.cat(integers)


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


def spread(steps: Tensor, shape: Sequence[int]) -> Tensor:
    """Steps of blocks, broadcast over a shape.

    Example:
        >>> spread(torch.tensor([[1.0, 2.0]]), (3, 4))
        tensor([[1., 1., 2., 2.]])
    """
    for dimension, (blocks, size) in enumerate(zip(steps.shape, shape, strict=True)):
        if 1 < blocks < size:
            steps = steps.repeat_interleave(size // blocks, dimension)
    return steps


def _common(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int8]] | None:
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
