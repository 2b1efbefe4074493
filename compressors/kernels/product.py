"""The product of a sparse matrix and many vectors at once, compiled by numba for this processor.

With values ``v`` in row ``i``, columns ``c``, and vectors that lie next to each other,

    y[i, p] = bias[i] + sum over j of v[j] x[c[j], p]

A tile of up to 32 vectors ``p`` stays in registers while a row's nonzeros go by, each of which is
multiplied by a tile that lies in one piece in memory. In a matrix of blocks, each block a column of
a few rows, the tile is read once for all rows of the block.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "SparseMatrix", "multiply_", "tiled", "transpose_"]

Array = NDArray[Any]

# Vectors of a tile: 32 float32 are two registers of AVX-512, or four of AVX2.
_WIDTHS = (1, 8, 16, 32)

# Multiply-adds that are worth a thread: some 40 microseconds.
_SHARE = 2_000_000


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix in compressed rows of blocks (BSR); with blocks of one row it is CSR.

    Args:
        starts: Index of the first block of each row of blocks, and the number of blocks.
        columns: Column of each block.
        values: Values of each block, of shape (blocks, rows of a block).
        shape: Shape of the matrix.

    Example:
        >>> matrix = SparseMatrix.of(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), rows=2)
        >>> matrix.columns.tolist(), matrix.values.tolist()
        ([1], [[1.0, 2.0]])
    """

    starts: Array
    columns: Array
    values: Array
    shape: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Tensor, rows: int) -> "SparseMatrix":
        """Return the blocks of a matrix that are not all zeros.

        Args:
            matrix: The matrix.
            rows: Rows of a block, a divisor of those of the matrix.
        """
        blocks = matrix.unflatten(0, (-1, rows)).transpose(1, 2)
        row, column = (blocks != 0).any(2).nonzero(as_tuple=True)
        starts = torch.zeros(len(blocks) + 1, dtype=torch.int32)
        starts[1:] = row.bincount(minlength=len(blocks)).cumsum(0)
        values = blocks[row, column].contiguous()
        return cls(starts.numpy(), column.int().numpy(), values.numpy(), tuple(matrix.shape))

    def decode(self) -> Tensor:
        """Return the matrix."""
        rows = self.values.shape[1]
        blocks = torch.zeros(self.shape[0] // rows, self.shape[1], rows)
        blocks[self.block_rows(), self.columns] = torch.from_numpy(self.values)
        return blocks.transpose(1, 2).reshape(self.shape)

    def block_rows(self) -> Array:
        """Return the row of each block, counted in blocks."""
        return np.arange(len(self.starts) - 1).repeat(np.diff(self.starts))


def tiled(length: int) -> int:
    """Return a number of vectors that is filled up to whole tiles.

    Example:
        >>> [tiled(length) for length in (1, 5, 33)]
        [1, 8, 64]
    """
    width = _width(length)
    return -(-length // width) * width


def multiply_(
    out: Array,
    matrix: SparseMatrix,
    bias: Array,
    x: Array,
    offsets: Array,
    size: int,
    threads: int,
) -> None:
    """Write ``bias + matrix @ x`` for each of several ``x`` in place.

    Args:
        out: Products, of shape (number of ``x``, rows, :func:`tiled` number of vectors).
        matrix: The matrix.
        bias: A number for each row.
        x: All ``x``, contiguous. No bounds are checked.
        offsets: Index in ``x`` of the row that each block multiplies, in the first ``x``.
        size: Distance in ``x`` from one ``x`` to the next.
        threads: Most threads to use.
    """
    many, _, length = out.shape
    kernel = _compiled(matrix.values.shape[1], _width(length))
    flat = x.reshape(-1)

    def run(part: tuple[int, int]) -> None:
        kernel(matrix.starts, offsets, matrix.values, bias, flat, out, many, size, length, *part)

    threads = min(threads, matrix.values.size * many * length // _SHARE)
    if threads < 2:
        run((0, len(matrix.starts) - 1))
        return
    shares = np.linspace(0, matrix.starts[-1], threads + 1)[1:-1]
    bounds = [0, *np.searchsorted(matrix.starts, shares).tolist(), len(matrix.starts) - 1]
    list(_pool(os.getpid(), threads).map(run, pairwise(bounds)))


@njit(nogil=True, error_model="numpy", cache=True)
def transpose_(out, x):  # type: ignore[no-untyped-def]
    """Write ``out[j, i] = x[i, j]`` in place, for all ``i`` and ``j`` that both matrices have.

    Squares of 8 x 8 are transposed in registers, along the longer rows first: 8 rows whose length
    is a power of 2 fill the 8 places that the first cache has for them. It takes a fifth of the
    time of torch's copy.
    """
    rows, columns = min(x.shape[0], out.shape[1]), min(x.shape[1], out.shape[0])
    whole_rows, whole_columns = rows // 8 * 8, columns // 8 * 8
    if rows < columns:
        for i in range(0, whole_rows, 8):
            for j in range(0, whole_columns, 8):
                _transpose_square(out, x, i, j)  # type: ignore[call-arg]
    else:
        for j in range(0, whole_columns, 8):
            for i in range(0, whole_rows, 8):
                _transpose_square(out, x, i, j)  # type: ignore[call-arg]
    for i in range(rows):
        for j in range(whole_columns if i < whole_rows else 0, columns):
            out[j, i] = x[i, j]


def _width(length: int) -> int:
    return next((width for width in _WIDTHS if width >= length), _WIDTHS[-1])


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "fitsmall-kernels")


@cache
def _compiled(rows: int, width: int) -> Any:
    """The kernel for blocks of some rows and tiles of some vectors."""

    @njit(nogil=True, error_model="numpy", cache=True)
    def product(starts, offsets, values, bias, x, out, many, size, length, first, last):  # type: ignore[no-untyped-def]
        tiles = _tiles(rows, width)  # type: ignore[call-arg,var-annotated]
        total = rows * (len(starts) - 1)
        for each in range(many):
            for p in range(0, length, width):
                for block in range(first, last):
                    _start(tiles, rows, width, bias, rows * block)
                    for j in range(starts[block], starts[block + 1]):
                        place = each * size + np.int64(offsets[j]) + p
                        _add(tiles, rows, width, values, rows * j, x, place)
                    _store(
                        tiles, rows, width, out, (each * total + rows * block) * length + p, length
                    )

    return product


# Numba has no vectors of its own, so that these four steps are written in LLVM's instructions: a
# tile is a vector, and the compiler keeps all tiles of a block in registers.


def _vector(width: int) -> ir.Type:
    return ir.VectorType(ir.FloatType(), width)


def _slots(builder: Any, tiles: Any, rows: int, width: int) -> list[Any]:
    first = builder.bitcast(tiles, _vector(width).as_pointer())
    return [builder.gep(first, [ir.Constant(ir.IntType(64), row)]) for row in range(rows)]


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _wide(builder: Any, address: Any, width: int) -> Any:
    return builder.bitcast(address, _vector(width).as_pointer())


def _next(builder: Any, index: Any, more: int) -> Any:
    return builder.add(index, ir.Constant(index.type, more))


def _repeated(builder: Any, number: Any, width: int) -> Any:
    empty = ir.Constant(_vector(width), ir.Undefined)
    one = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(one, empty, zeros)


@intrinsic(prefer_literal=True)
def _tiles(typing, rows, width):  # type: ignore[no-untyped-def]
    """A tile for each row of a block."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector = _vector(width.literal_value)
        tiles = cgutils.alloca_once(builder, vector, size=rows.literal_value)  # type: ignore[no-untyped-call]
        return builder.bitcast(tiles, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(rows, width), code  # type: ignore[no-untyped-call]


@intrinsic(prefer_literal=True)
def _start(typing, tiles, rows, width, bias, row):  # type: ignore[no-untyped-def]
    """``tile[r][:] = bias[row + r]``."""
    r, w = rows.literal_value, width.literal_value

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        for i, slot in enumerate(_slots(builder, args[0], r, w)):
            index = _next(builder, args[4], i)
            number = builder.load(_address(context, builder, bias, args[3], index))
            builder.store(_repeated(builder, number, w), slot)
        return context.get_dummy_value()

    return types.void(tiles, rows, width, bias, row), code


@intrinsic(prefer_literal=True)
def _add(typing, tiles, rows, width, values, j, x, place):  # type: ignore[no-untyped-def]
    """``tile[r] += values[j + r] x[place : place + width]``."""
    r, w = rows.literal_value, width.literal_value

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address = _address(context, builder, x, args[5], args[6])
        vector = builder.load(_wide(builder, address, w), align=4)
        for i, slot in enumerate(_slots(builder, args[0], r, w)):
            index = _next(builder, args[4], i)
            number = builder.load(_address(context, builder, values, args[3], index))
            product = builder.fmul(_repeated(builder, number, w), vector, flags=("contract",))
            sum_ = builder.fadd(builder.load(slot), product, flags=("contract",))
            builder.store(sum_, slot)
        return context.get_dummy_value()

    return types.void(tiles, rows, width, values, j, x, place), code


@intrinsic(prefer_literal=True)
def _store(typing, tiles, rows, width, out, place, stride):  # type: ignore[no-untyped-def]
    """``out[place + r stride : place + r stride + width] = tile[r]``."""
    r, w = rows.literal_value, width.literal_value

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        index = args[4]
        for slot in _slots(builder, args[0], r, w):
            address = _wide(builder, _address(context, builder, out, args[3], index), w)
            builder.store(builder.load(slot), address, align=4)
            index = builder.add(index, args[5])
        return context.get_dummy_value()

    return types.void(tiles, rows, width, out, place, stride), code


@intrinsic
def _transpose_square(typing, out, x, i, j):  # type: ignore[no-untyped-def]
    """``out[j : j + 8, i : i + 8] = x[i : i + 8, j : j + 8].T`` of contiguous matrices."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def address(kind: Any, array: Any, row: Any, column: Any) -> Any:
            width = builder.extract_value(
                context.make_array(kind)(context, builder, array).shape, 1
            )
            index = builder.add(builder.mul(row, width), column)
            return _wide(builder, _address(context, builder, kind, array, index), 8)

        def half(a: Any, b: Any, first: int) -> Any:
            places = [first + place // 2 + 8 * (place % 2) for place in range(8)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), 8), places)
            return builder.shuffle_vector(a, b, mask)

        rows = [
            builder.load(address(x, args[1], _next(builder, args[2], r), args[3]), align=4)
            for r in range(8)
        ]
        for _ in range(3):  # to interleave the first half with the second, three times
            pairs = [*zip(rows[:4], rows[4:], strict=True)]
            rows = [half(*pair, first) for pair in pairs for first in (0, 4)]
        for r, row in enumerate(rows):
            builder.store(row, address(out, args[0], _next(builder, args[3], r), args[2]), align=4)
        return context.get_dummy_value()

    return types.void(out, x, i, j), code
