"""The cheapest code of a tensor that is exact, found by looking at its values."""

import math

import torch
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Dense, Integer, Lookup, Sparse
from fitsmall.compressors.codes.dtypes import CODED, INTEGERS
from fitsmall.compressors.codes.lattice import blocked, lattice, unblocked
from fitsmall.compressors.file.coding import MAX_LEVELS

__all__ = ["exact"]

# Weights that are looked at together, so that temporaries stay small next to the tensor.
_BLOCK = 2**20

# Fewest weights in a group that share a scale.
_SMALLEST_GROUP = 8


def exact(tensor: Tensor) -> Code:
    """The cheapest code that gives ``tensor`` back bit for bit, found by looking at its values.

    Zeros make it sparse, few distinct values give it a codebook, values on a grid for each output
    channel make it integers, and anything else stays dense, so a tensor needs no record of how it
    was compressed. It is read in blocks: temporaries stay below the tensor's own size.

    Example:
        >>> code = exact(torch.tensor([0.0, 0.3, 0.0, 0.3, -0.7, 0.3, 0.0, 0.3]))
        >>> code.mask.long(), code.values.index.long(), code.values.codebook.decode()
        (tensor([0, 1, 0, 1, 1, 1, 0, 1]), tensor([1, 1, 0, 1, 1]), tensor([-0.7000,  0.3000]))
    """
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() < 2 or tensor.dtype not in CODED:
        return Dense(tensor)
    bits = tensor.view(INTEGERS[tensor.dtype.itemsize])
    mask = bits != 0
    kept = int(mask.count_nonzero())  # a sum would make integers of all
    levels = _levels(bits.flatten(), limit=min(MAX_LEVELS, kept // 2))
    integers = _integers(tensor)
    if integers is not None and _is_smaller(integers, kept, levels):
        return integers
    if levels is not None:
        codebook, order = levels.view(tensor.dtype).sort(stable=True)
        index = _index(bits.flatten(), levels, order.argsort())
        if kept == tensor.numel():
            return Lookup(Dense(codebook), index.view(tensor.shape))
        return Sparse(mask, Lookup(Dense(codebook), index))
    # A mask costs at most one bit a weight, and pays when it saves more.
    if 8 * tensor.dtype.itemsize * (tensor.numel() - kept) > tensor.numel():
        return Sparse(mask, Dense(tensor[mask]))
    return Dense(tensor)


def _integers(tensor: Tensor) -> Integer | None:
    """The tensor as integers times a scale for each channel, or for each group of a row."""
    if tensor.dim() < 2 or not tensor.numel() or not tensor.is_floating_point():
        return None
    rows, columns, *others = tensor.shape
    one = [1] * len(others)
    # Output channels, also those of transposed convolutions.
    layouts = [[rows, 1, *one], [1, columns, *one]]
    layouts += [[rows, count, *one] for count in _groups(columns)]
    layouts += [[count, columns, *one] for count in _groups(rows)]
    if len(others) == 1:  # fused experts, a matrix each, with outputs first or last
        layouts += [[rows, columns, 1], [rows, 1, *others]]
        layouts += [[rows, columns, count] for count in _groups(*others)]
        layouts += [[rows, count, *others] for count in _groups(columns)]
    for blocks in layouts:
        count = math.prod(blocks)
        # In most tensors the first block shows already that there is no grid.
        first = tensor[tuple(slice(n // k) for n, k in zip(tensor.shape, blocks, strict=True))]
        if not 1 < count <= tensor.numel() // 4 or lattice(first.reshape(1, -1)) is None:
            continue
        if found := lattice(blocked(tensor, blocks)):
            scales, integers = found
            return Integer(Dense(scales.view(blocks)), unblocked(integers, blocks, tensor.shape))
    return None


def _groups(inputs: int) -> list[int]:
    """The numbers of equal groups that inputs can form, the largest groups first."""
    sizes = range(inputs // 2, _SMALLEST_GROUP - 1, -1)
    return [inputs // size for size in sizes if inputs % size == 0]


def _is_smaller(code: Integer, kept: int, levels: Tensor | None) -> bool:
    """Whether integers and their scales take less than indexes and a codebook of ``levels``.

    Where there is none, as of few weights, these would be stored as floats.
    """
    integer, scales = math.log2(max(1, sum(code.bounds))), code.scales.shape.numel()
    if levels is None:
        width = 8 * code.scales.dtype.itemsize
        return kept * integer + width * scales < kept * width
    saved = math.log2(max(1, len(levels))) - integer
    return code.integers.numel() * saved + 16 * len(levels) > 16 * scales


def _levels(bits: Tensor, limit: int) -> Tensor | None:
    """The distinct non-zero bit patterns, ascending, or None when there are more than ``limit``."""
    levels = bits.new_empty(0)
    for block in bits.split(_BLOCK):
        levels = torch.cat([levels, block[block != 0].unique()]).unique()
        if levels.numel() > limit:
            return None
    return levels


def _index(bits: Tensor, levels: Tensor, ranks: Tensor) -> Tensor:
    """The rank of every non-zero bit pattern among the levels."""
    ranks = ranks.to(torch.uint8 if levels.numel() <= 256 else torch.int32)
    blocks = (block[block != 0] for block in bits.split(_BLOCK))
    return torch.cat([ranks[torch.searchsorted(levels, block)] for block in blocks])
