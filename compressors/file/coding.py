"""Lossless coding of a matrix of cluster numbers: which weights are kept, and which value each has.

Three coders of rising strength and cost:

- ``huffman``: gaps between kept weights and values, each Huffman coded, as in Deep Compression
  (Han et al. 2016, arXiv:1510.00149);
- ``ans``: the same by asymmetric numeral systems (Duda et al. 2015), which reach the entropy of
  the gaps and of the values instead of whole bits;
- ``context``: mixed contexts (:mod:`fitsmall.compressors.file.context`), which go below that
  entropy, since the masks of trained networks are far from random.

>>> import numpy as np
>>> symbols = np.array([[0, 0, 2, 1], [0, 3, 0, 0]], dtype=np.uint8)
>>> streams = CODERS["huffman"].encode(symbols, alphabet=4)
>>> CODERS["huffman"].decode(streams, (2, 4), alphabet=4)
array([[0, 0, 2, 1],
       [0, 3, 0, 0]], dtype=uint8)
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from constriction import stream
from numpy.typing import NDArray

from fitsmall.compressors.file import context

__all__ = ["CODERS", "MAX_LEVELS", "Coder", "Streams", "Symbols"]

Symbols = NDArray[Any]  # 2-D, uint8 or uint16

# Weights that are coded together, so that temporaries stay small next to the matrix.
_CHUNK = 2**20

# Symbols are of 16 bits at most, and one of them means zero.
MAX_LEVELS = 2**16 - 1

# The first byte of the positions says whether all, none or some weights are kept. Missing bytes are
# zero, so that a matrix without zeros costs nothing.
_ALL, _NONE, _SOME = 0, 1, 2

# The most weights that one byte may code: of a whole matrix, of a mask, and of kept values. An
# adaptive coder spends next to nothing on a symbol that it is sure of, so a few bytes could keep a
# reader busy for hours. The writer pads streams to these bounds, which the streams of real networks
# exceed anyway, and the reader refuses shorter ones before it takes memory or time.
IN_MATRIX, IN_MASK, IN_VALUES = 2**20, 2**12, 2**8


class Streams(NamedTuple):
    """The two streams of a matrix: where the kept weights are, and their values."""

    positions: bytes
    values: bytes


class Coder(ABC):
    """A lossless map between matrices of symbols and bytes.

    Symbol 0 is a pruned weight, symbol k ≥ 1 entry k - 1 of the codebook, in ascending order.
    Rows are output units, columns inputs times kernel.
    """

    @abstractmethod
    def encode_mask(self, symbols: Symbols) -> bytes:
        """Code which symbols are not zero. Some are zero, and some are not."""

    @abstractmethod
    def decode_mask(self, data: bytes, symbols: Symbols) -> None:
        """Set the symbols that are not zero to one."""

    @abstractmethod
    def encode_values(self, symbols: Symbols, alphabet: int) -> bytes:
        """Code the symbols that are not zero, given where they are; ``alphabet`` is at least 3."""

    @abstractmethod
    def decode_values(self, data: bytes, symbols: Symbols, alphabet: int) -> None:
        """Replace the ones that :meth:`decode_mask` set by values in [1, alphabet)."""

    def encode(self, symbols: Symbols, alphabet: int) -> Streams:
        """Code a matrix of uint8 or uint16 symbols below ``alphabet``."""
        symbols = np.ascontiguousarray(symbols)
        if symbols.size and int(symbols.max()) >= alphabet:
            raise ValueError(f"symbol {symbols.max()} is outside an alphabet of {alphabet}")
        kept = int(np.count_nonzero(symbols))
        if kept == symbols.size:
            positions = b""
        elif kept == 0:
            positions = bytes([_NONE])
        else:
            mask = bytes([_SOME]) + self.encode_mask(symbols)
            positions = mask.ljust(_shortest(symbols.size, IN_MASK), b"\0")
        values = b""
        if kept and alphabet > 2:
            values = self.encode_values(symbols, alphabet)
            values = values.ljust(_shortest(kept, IN_VALUES), b"\0")
        shortest = _shortest(symbols.size, IN_MATRIX)
        return Streams(positions.ljust(shortest - len(values), b"\0"), values)

    def decode(self, streams: Streams, shape: tuple[int, int], alphabet: int) -> Symbols:
        """The matrix that was coded; damaged streams give another matrix, or a ValueError."""
        positions, values = streams
        size = shape[0] * shape[1]
        if _shortest(size, IN_MATRIX) > len(positions) + len(values):
            raise ValueError(f"{size} weights cannot come from streams this short")
        symbols = np.zeros(shape, np.uint8 if alphabet <= 256 else np.uint16)
        mode = positions[0] if positions else _ALL
        if mode == _NONE or size == 0:
            return symbols
        if mode not in (_ALL, _SOME) or not 2 <= alphabet <= MAX_LEVELS + 1:
            raise ValueError("damaged positions")
        if mode == _ALL:
            symbols[:] = 1
        elif _shortest(size, IN_MASK) > len(positions):
            raise ValueError(f"a mask of {size} weights cannot come from a stream this short")
        else:
            self.decode_mask(positions[1:], symbols)
        if alphabet > 2:
            kept = int(np.count_nonzero(symbols))
            if _shortest(kept, IN_VALUES) > len(values):
                raise ValueError(f"{kept} values cannot come from a stream this short")
            self.decode_values(values, symbols, alphabet)
        return symbols


def _shortest(weights: int, in_byte: int) -> int:
    """The fewest bytes for so many weights."""
    return max(weights - 1, 0) // in_byte


def _chunks(symbols: Symbols) -> Iterator[Symbols]:
    flat = symbols.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


class Huffman(Coder):
    """Gaps and values, each Huffman coded. A gap is the number of zeros before a kept weight.

    Gaps are bytes; the byte 255 means 255 zeros without a kept weight after them.

    >>> Huffman.gaps(np.array([0, 0, 5, 3] + [0] * 256 + [1]), 0)[0].tolist()
    [2, 0, 255, 1]
    """

    FILLER = 255

    @classmethod
    def gaps(cls, chunk: Symbols, pending: int) -> tuple[NDArray[np.uint8], int]:
        """The gaps of a chunk after ``pending`` zeros, and the number of zeros at its end."""
        kept = np.flatnonzero(chunk)
        gaps = np.diff(kept, prepend=-1 - pending) - 1
        fillers, rest = np.divmod(gaps, cls.FILLER)
        coded = np.full(gaps.size + int(fillers.sum()), cls.FILLER, np.uint8)
        coded[np.arange(gaps.size) + np.cumsum(fillers)] = rest
        return coded, chunk.size - 1 - int(kept[-1]) if kept.size else pending + chunk.size

    def encode_mask(self, symbols: Symbols) -> bytes:
        def gaps() -> Iterator[bytes]:
            pending = 0
            for chunk in _chunks(symbols):
                coded, pending = self.gaps(chunk, pending)
                yield coded.tobytes()

        return _deflate(gaps())

    def decode_mask(self, data: bytes, symbols: Symbols) -> None:
        flat, end = symbols.reshape(-1), 0
        for block in _inflate(data):
            gaps = np.frombuffer(block, np.uint8)
            is_kept = gaps != self.FILLER
            ends = end + np.cumsum(gaps + is_kept.astype(np.int64))
            end = int(ends[-1])
            if end > flat.size:
                raise ValueError("damaged gaps")
            flat[ends[is_kept] - 1] = 1

    def encode_values(self, symbols: Symbols, alphabet: int) -> bytes:
        dtype = "u1" if alphabet <= 256 else "<u2"
        return _deflate(chunk[chunk != 0].astype(dtype).tobytes() for chunk in _chunks(symbols))

    def decode_values(self, data: bytes, symbols: Symbols, alphabet: int) -> None:
        dtype = np.dtype("u1" if alphabet <= 256 else "<u2")
        blocks, block = _inflate(data), b""
        for chunk in _chunks(symbols):
            kept = np.flatnonzero(chunk)
            size = kept.size * dtype.itemsize
            while len(block) < size:
                block += next(blocks, b"") or _damaged("values")
            values = np.frombuffer(block[:size], dtype)
            if kept.size and not 1 <= int(values.min()) <= int(values.max()) < alphabet:
                raise ValueError("damaged values")
            chunk[kept], block = values, block[size:]


def _damaged(what: str) -> bytes:
    raise ValueError(f"damaged {what}")


def _deflate(blocks: Iterator[bytes]) -> bytes:
    """Huffman codes alone: a deflate stream without string matching."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return b"".join(deflate.compress(block) for block in blocks) + deflate.flush()


def _inflate(data: bytes, step: int = 2**20) -> Iterator[bytes]:
    """The bytes of a deflate stream, in blocks that are small whatever the stream says."""
    inflate = zlib.decompressobj(-15)
    try:
        while not inflate.eof and data:
            if block := inflate.decompress(data, step):
                yield block
            elif inflate.unconsumed_tail == data:
                break
            data = inflate.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"damaged stream: {error}") from error


class Ans(Coder):
    """Gaps and values at their entropy.

    A gap g is coded as the bit length of g + 1, which has a table of frequencies, and the bits
    after the leading one, which are nearly uniform.
    """

    LENGTHS = _CHUNK.bit_length()  # gaps do not cross chunks

    @staticmethod
    def gaps(chunk: Symbols) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Bit length minus one and value of g + 1, for each gap g.

        >>> [a.tolist() for a in Ans.gaps(np.array([0, 0, 5, 3, 0, 0, 0, 1]))]
        [[1, 0, 2], [3, 1, 4]]
        """
        gaps = np.diff(np.flatnonzero(chunk), prepend=-1).astype(np.int32)
        return np.frexp(gaps)[1] - 1, gaps

    def encode_mask(self, symbols: Symbols) -> bytes:
        counts = np.zeros(self.LENGTHS, np.int64)
        for chunk in _chunks(symbols):
            counts += np.bincount(self.gaps(chunk)[0], minlength=self.LENGTHS)
        table = _quantized(counts)
        model, coder = _model(table), stream.stack.AnsCoder()
        for chunk in reversed([*_chunks(symbols)]):  # last in, first out
            lengths, gaps = self.gaps(chunk)
            long = lengths > 0
            base = 1 << lengths[long]
            coder.encode_reverse(gaps[long] - base, stream.model.Uniform(), base)
            coder.encode_reverse(lengths, model)
            coder.encode_reverse(
                np.array([gaps.size], np.int32), stream.model.Uniform(chunk.size + 1)
            )
        return _pack(table, coder)

    def decode_mask(self, data: bytes, symbols: Symbols) -> None:
        model, coder = _unpack(data, self.LENGTHS)
        for chunk in _chunks(symbols):
            kept = int(coder.decode(stream.model.Uniform(chunk.size + 1), 1)[0])
            lengths = coder.decode(model, kept)
            gaps = 1 << lengths
            gaps[lengths > 0] += coder.decode(stream.model.Uniform(), gaps[lengths > 0])
            ends = np.cumsum(gaps, dtype=np.int64)
            if kept and ends[-1] > chunk.size:
                raise ValueError("damaged gaps")
            chunk[ends - 1] = 1

    def encode_values(self, symbols: Symbols, alphabet: int) -> bytes:
        counts = np.zeros(alphabet, np.int64)
        for chunk in _chunks(symbols):
            counts += np.bincount(chunk, minlength=alphabet)
        table = _quantized(counts[1:])
        model, coder = _model(table), stream.stack.AnsCoder()
        for chunk in reversed([*_chunks(symbols)]):
            coder.encode_reverse(chunk[chunk != 0].astype(np.int32) - 1, model)
        return _pack(table, coder)

    def decode_values(self, data: bytes, symbols: Symbols, alphabet: int) -> None:
        model, coder = _unpack(data, alphabet - 1)
        for chunk in _chunks(symbols):
            kept = np.flatnonzero(chunk)
            chunk[kept] = coder.decode(model, kept.size) + 1


# Counts are rounded to floats with three bits after the leading one. Each takes a byte and is
# within 6 %, which costs 0.1 % at most. They are integers, in units of 1/8, so that they are the
# same on every machine.
_COUNTS = np.array([0, *((8 + (k & 7)) << (k >> 3) for k in range(255))], np.float64)


def _quantized(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    middles = (_COUNTS[1:] + _COUNTS[:-1]) / 2
    return np.searchsorted(middles, 8 * counts).astype(np.uint8)


def _model(table: NDArray[np.uint8]) -> stream.model.Categorical:
    weights = _COUNTS[table]
    return stream.model.Categorical(weights / weights.sum(), perfect=False)


def _pack(table: NDArray[np.uint8], coder: stream.stack.AnsCoder) -> bytes:
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return _deflate(iter([table.tobytes()])) + words.rstrip(b"\0")


def _unpack(data: bytes, entries: int) -> tuple[stream.model.Categorical, stream.stack.AnsCoder]:
    inflate = zlib.decompressobj(-15)
    try:
        table = np.frombuffer(inflate.decompress(data, entries + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"damaged stream: {error}") from error
    if not inflate.eof or table.size != entries or not table.any():
        raise ValueError("damaged table of frequencies")
    words = inflate.unused_data.rstrip(b"\0")
    stack = np.frombuffer(words.ljust(-(-len(words) // 4) * 4, b"\0"), "<u4")
    return _model(table), stream.stack.AnsCoder(stack.astype(np.uint32))


class Context(Coder):
    """Mixed contexts, see :mod:`fitsmall.compressors.file.context`."""

    def encode_mask(self, symbols: Symbols) -> bytes:
        return context.encode_mask(symbols)

    def decode_mask(self, data: bytes, symbols: Symbols) -> None:
        context.decode_mask(data, symbols)

    def encode_values(self, symbols: Symbols, alphabet: int) -> bytes:
        return context.encode_values(symbols, alphabet)

    def decode_values(self, data: bytes, symbols: Symbols, alphabet: int) -> None:
        context.decode_values(data, symbols, alphabet)


CODERS: dict[str, Coder] = {"huffman": Huffman(), "ans": Ans(), "context": Context()}
