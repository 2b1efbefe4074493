"""Codes: tensors in stored form.

Every code says how to get the tensor back (:meth:`Code.decode`) and what it costs
(:meth:`Code.bits`). Codes nest through their float leaves: the values of a :class:`Sparse` can be
a :class:`Lookup`, and the codebook of a :class:`Lookup` can be a :class:`Dense` of fewer bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitsmall.compressors.file.coding import CODERS
from fitsmall.compressors.lattice import blocked, lattice, spread, unblocked

__all__ = [
    "Code",
    "Dense",
    "Integer",
    "Lookup",
    "Sparse",
    "Sum",
    "exact",
    "matrix_shape",
    "same_bits",
]

# A codebook pays for itself only while it is small against the weights it replaces; the index
# streams hold 16-bit symbols, of which 0 means "zero".
MAX_LEVELS = 2**16 - 1

# Types that can be compared and looked up; the others are stored as they are.
CODED = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)

# Coding more symbols than this only to estimate a size would take seconds; rows are sampled.
ESTIMATE_SYMBOLS = 2**22

_BLOCK = 2**20

# Fewest weights in a group that share a step.
_SMALLEST_GROUP = 8

# By dtype: those that hold some of its values exactly, narrowest first.
NARROWER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.int64: (torch.int8, torch.int16, torch.int32),
    torch.int32: (torch.int8, torch.int16),
}

# By bytes: the integer type that shows the bits of a float.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Code(ABC):
    """A tensor in stored form."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The tensor that is stored."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""

    @abstractmethod
    def bits(self) -> float:
        """Estimated size in the file, in bits, without the tensor's name and shape."""

    @abstractmethod
    def map(self, encode: Callable[[Tensor], "Code"]) -> "Code":
        """The same code with its float leaf coded by ``encode``."""


@dataclass(frozen=True, eq=False)
class Dense(Code):
    """The values as they are, in the narrowest of their own precision's formats that is exact.

    Args:
        values: Tensor of any shape and dtype.

    Example:
        >>> Dense(torch.tensor([0.5, -1.0])).bits()  # both fit bfloat16
        32.0
        >>> Dense(torch.tensor([0.1, -1.0])).bits()
        64.0
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def storage(self) -> torch.dtype:
        """Narrowest dtype that holds every value exactly."""
        for narrow in NARROWER.get(self.values.dtype, ()):
            if same_bits(self.values.to(narrow).to(self.values.dtype), self.values):
                return narrow
        return self.values.dtype

    def decode(self) -> Tensor:
        return self.values

    def bits(self) -> float:
        return 8.0 * self.values.numel() * self.storage.itemsize

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return encode(self.values)


@dataclass(frozen=True, eq=False)
class Lookup(Code):
    """Few distinct values: ``w_i = codebook[index_i]``.

    Args:
        codebook: Code of the 1-D tensor of ``K`` values, ascending.
        index: Integer tensor of the weight's shape, values in [0, K).

    Example:
        >>> Lookup(Dense(torch.tensor([-1.0, 2.0])), torch.tensor([[0, 1], [1, 1]])).decode()
        tensor([[-1.,  2.],
                [ 2.,  2.]])
    """

    codebook: Code
    index: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.index.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.codebook.dtype

    def decode(self) -> Tensor:
        levels = self.codebook.decode()
        return levels.index_select(0, self.index.flatten().int()).view(self.index.shape)

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """Index matrix, rows are output units: ``index + 1``, since symbol 0 means zero."""
        levels = self.codebook.decode().numel()
        symbols: NDArray[np.unsignedinteger] = self.index.cpu().numpy().astype(_symbol_type(levels))
        return _matrix(symbols + symbols.dtype.type(1))

    def bits(self) -> float:
        levels = self.codebook.decode().numel()
        return _stream_bits(self.symbols(), levels + 1) + self.codebook.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Lookup(self.codebook.map(encode), self.index)


@dataclass(frozen=True, eq=False)
class Sparse(Code):
    """Mostly zeros: ``w[mask] = values``, zero elsewhere.

    Args:
        mask: Boolean tensor of the weight's shape, true where a weight is stored.
        values: Code of the 1-D tensor of stored weights, in row-major order.

    Example:
        >>> mask = torch.tensor([[True, False], [False, True]])
        >>> Sparse(mask, Dense(torch.tensor([3.0, -2.0]))).decode()
        tensor([[ 3.,  0.],
                [ 0., -2.]])
    """

    mask: Tensor
    values: Code

    @property
    def shape(self) -> torch.Size:
        return self.mask.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def decode(self) -> Tensor:
        values = self.values.decode()
        dense = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        dense[self.mask] = values
        return dense

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """Index matrix: 0 where the weight is zero, else 1, or the value's index + 1."""
        mask = self.mask.cpu().numpy()
        if not isinstance(self.values, Lookup):
            return _matrix(mask.astype(np.uint8))
        symbols = np.zeros(mask.shape, _symbol_type(self.values.codebook.decode().numel()))
        symbols[mask] = self.values.symbols().ravel()
        return _matrix(symbols)

    def bits(self) -> float:
        if isinstance(self.values, Lookup):
            codebook = self.values.codebook
            levels = codebook.decode().numel()
            return _stream_bits(self.symbols(), levels + 1) + codebook.bits()
        return _stream_bits(self.symbols(), 2) + self.values.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Sparse(self.mask, self.values.map(encode))


@dataclass(frozen=True, eq=False)
class Integer(Code):
    """Integers on a grid, ``w = step q``, each step for a block of the weight.

    Args:
        steps: Code of the blocks' steps, with as many dimensions as the weight; a size divides the
            weight's in each: ``(out, 1, 1, 1)`` for the output channels of a convolution,
            ``(out, in / 32)`` for groups of 32.
        integers: Tensor of the weight's shape and of type int8.

    Example:
        >>> steps = torch.tensor([[0.5], [2.0]])
        >>> Integer(Dense(steps), torch.tensor([[1, -3], [0, 2]], dtype=torch.int8)).decode()
        tensor([[ 0.5000, -1.5000],
                [ 0.0000,  4.0000]])
    """

    steps: Code
    integers: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.steps.dtype

    @property
    def bounds(self) -> tuple[int, int]:
        """Number of levels below zero and above it."""
        low, high = self.integers.aminmax() if self.integers.numel() else (0, 0)
        return max(0, -int(low)), max(0, int(high))

    @property
    def width(self) -> int:
        """Bits of a signed integer that holds every level."""
        below, above = self.bounds
        return max(below - 1, above).bit_length() + 1

    def decode(self) -> Tensor:
        return self.integers * spread(self.steps.decode(), self.shape)

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """Index matrix: 0 where the weight is zero, else the level's rank among the others + 1."""
        below, above = self.bounds
        wide = self.integers.cpu().numpy().astype(np.int16)
        symbols = np.where(wide < 0, wide + below + 1, np.where(wide > 0, wide + below, 0))
        return _matrix(symbols.astype(_symbol_type(below + above)))

    def bits(self) -> float:
        return _stream_bits(self.symbols(), sum(self.bounds) + 1) + self.steps.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Integer(self.steps.map(encode), self.integers)


@dataclass(frozen=True, eq=False)
class Sum(Code):
    """Two tensors that are added up, ``w = first + second``.

    Example:
        >>> ones, corner = Dense(torch.ones(2, 2)), torch.tensor([[True, False], [False, False]])
        >>> Sum(ones, Sparse(corner, Dense(torch.tensor([4.0])))).decode()
        tensor([[5., 1.],
                [1., 1.]])
    """

    first: Code
    second: Code

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    def decode(self) -> Tensor:
        return self.first.decode() + self.second.decode()

    def bits(self) -> float:
        return self.first.bits() + self.second.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Sum(self.first.map(encode), self.second.map(encode))


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
    integer = _integer(tensor)
    if integer is not None and (levels is None or _smaller(integer, len(levels))):
        return integer
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, -0 differs from +0.

    Example:
        >>> same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
        True
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = INTEGERS[a.dtype.itemsize]
    return torch.equal(a.flatten().view(bits), b.flatten().view(bits))


def _integer(tensor: Tensor) -> Integer | None:
    """The tensor as integers times a step for each channel, or for each group of a row."""
    if tensor.dim() < 2 or not tensor.numel() or not tensor.is_floating_point():
        return None
    rows, columns, *others = tensor.shape
    one = [1] * len(others)
    # Output channels, also those of transposed convolutions.
    layouts = [[rows, 1, *one], [1, columns, *one]]
    groups = [n for n in range(columns // 2, _SMALLEST_GROUP - 1, -1) if columns % n == 0]
    layouts += [[rows, columns // group, *one] for group in groups]
    for blocks in layouts:
        count = math.prod(blocks)
        # Of most tensors the first block tells that there is no grid.
        first = tensor[tuple(slice(n // k) for n, k in zip(tensor.shape, blocks, strict=True))]
        if not 1 < count <= tensor.numel() // 4 or lattice(first.reshape(1, -1)) is None:
            continue
        if found := lattice(blocked(tensor, blocks)):
            steps, integers = found
            return Integer(Dense(steps.view(blocks)), unblocked(integers, blocks, tensor.shape))
    return None


def _smaller(integer: Integer, levels: int) -> bool:
    """Whether integers and their steps take less than a codebook of so many levels."""
    saved = math.log2(max(1, levels)) - math.log2(max(1, sum(integer.bounds)))
    return integer.integers.numel() * saved + 16 * levels > 16 * integer.steps.shape.numel()


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


def _symbol_type(levels: int) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if levels < 256 else np.uint16


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows are output units, columns everything else; a vector is one row.

    Example:
        >>> matrix_shape((20, 1, 5, 5)), matrix_shape((300,))
        ((20, 25), (1, 300))
    """
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape[1:] if len(shape) > 1 else shape)


def _matrix(symbols: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    return symbols.reshape(matrix_shape(symbols.shape))


def _stream_bits(symbols: NDArray[np.unsignedinteger], alphabet: int) -> float:
    rows = max(1, ESTIMATE_SYMBOLS // max(1, symbols.shape[1]))
    sample = symbols
    if symbols.shape[0] > rows:
        sample = symbols[np.linspace(0, symbols.shape[0] - 1, rows).astype(int)]
    streams = CODERS["context"].encode(sample, alphabet)
    coded = 8.0 * (len(streams.positions) + len(streams.values))
    return coded * symbols.size / max(1, sample.size)
