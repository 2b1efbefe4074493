"""Codes: tensors in stored form.

A code knows how to get its tensor back (:meth:`Code.decode`) and what it costs
(:meth:`Code.bits`). Codes nest through their float leaves: the values of a :class:`Sparse` can be
a :class:`Lookup`, whose codebook can be a :class:`Dense` of fewer bits.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitsmall.compressors.codes.dtypes import FLOATS, NARROWER, same_bits
from fitsmall.compressors.codes.lattice import spread
from fitsmall.compressors.file.coding import CODERS

__all__ = ["Code", "Dense", "Integer", "Lookup", "Sparse", "Sum", "matrix_shape"]

# To estimate a size, rows are sampled: coding more symbols than this would take seconds.
ESTIMATE_SYMBOLS = 2**22


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
    """Integers times a scale, ``w = s q``, with one scale for each block of the weight.

    Args:
        scales: Code of the blocks' scales, with as many dimensions as the weight; its size divides
            the weight's in each: ``(out, 1, 1, 1)`` for the output channels of a convolution,
            ``(out, in / 32)`` for groups of 32.
        integers: Tensor of the weight's shape and of type int8.

    Example:
        >>> scales = torch.tensor([[0.5], [2.0]])
        >>> Integer(Dense(scales), torch.tensor([[1, -3], [0, 2]], dtype=torch.int8)).decode()
        tensor([[ 0.5000, -1.5000],
                [ 0.0000,  4.0000]])
    """

    scales: Code
    integers: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.integers.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

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
        return self.integers * spread(self.scales.decode(), self.shape)

    def symbols(self) -> NDArray[np.unsignedinteger]:
        """Index matrix: 0 where the weight is zero, else the level's rank among the others + 1."""
        below, above = self.bounds
        wide = self.integers.cpu().numpy().astype(np.int16)
        symbols = np.where(wide < 0, wide + below + 1, np.where(wide > 0, wide + below, 0))
        return _matrix(symbols.astype(_symbol_type(below + above)))

    def bits(self) -> float:
        return _stream_bits(self.symbols(), sum(self.bounds) + 1) + self.scales.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Integer(self.scales.map(encode), self.integers)


@dataclass(frozen=True, eq=False)
class Sum(Code):
    """A sum of two tensors, ``w = first + second``, in their own precision.

    IEEE 754 fixes every bit of it, so that all processors agree on it; only a NaN may have other
    bits.

    Args:
        first: Code of a floating-point tensor.
        second: Code of a tensor of the same shape and dtype.

    Raises:
        ValueError: The two differ in shape or dtype, or cannot be added.

    Example:
        >>> ones, corner = Dense(torch.ones(2, 2)), torch.tensor([[True, False], [False, False]])
        >>> Sum(ones, Sparse(corner, Dense(torch.tensor([4.0])))).decode()
        tensor([[5., 1.],
                [1., 1.]])
    """

    first: Code
    second: Code

    def __post_init__(self) -> None:
        first, second = ((tuple(code.shape), code.dtype) for code in (self.first, self.second))
        if first != second or self.dtype not in FLOATS:
            raise ValueError(
                f"a Sum is of two floating-point tensors of one shape and dtype, and got {first} "
                f"and {second}"
            )

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
