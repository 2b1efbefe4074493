"""A product of two matrices that has the same bits on every processor."""

import torch
from torch import Tensor

__all__ = ["product"]

# Sums that are kept at once, so that they stay in the processor's cache.
_BLOCK = 2**17


def product(left: Tensor, right: Tensor) -> Tensor:
    r"""``left right``, the same bit for bit whatever computes it.

    A matrix multiplication adds in an order that depends on the processor and the number of
    threads, so its last bits do too. Here the terms ``left[i, k] right[k, j]`` are computed in
    double precision, added for ``k`` = 0, 1, ... in turn, and the sum is rounded to the dtype (to
    half precision by way of single precision). IEEE 754 gives each of these operations one result.
    It leaves two things open: the bits of a NaN, and processors that are set to flush subnormal
    numbers to zero.

    Args:
        left: Floating-point matrix of ``m x r``.
        right: Matrix of ``r x n`` of the same dtype, on the same device.

    Example:
        >>> product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.5]]))
        tensor([[4.]])
    """
    rows, columns = len(left), right.shape[1]
    whole = left.new_empty(rows, columns)
    height = max(1, _BLOCK // max(1, columns))
    for top in range(0, rows, height):
        block = left[top : top + height].double()
        total = block.new_zeros(len(block), columns)
        term = torch.empty_like(total)
        for k in range(len(right)):
            # Two operations on purpose: one that fuses them would round differently.
            torch.mul(block[:, k, None], right[k].double(), out=term)
            total += term
        whole[top : top + height] = total if left.dtype == torch.float64 else total.float()
    return whole
