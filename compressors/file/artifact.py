"""The compressed file: one self-contained, checksummed file that restores a state dict bit for bit.

Layout, integers little-endian, ``varint`` as in LEB128::

    magic "FSML" | version u8 | coder u8
    payload of each tensor, in order: positions | values | floats
    directory: an entry for each tensor, raw deflate
    directory's length u32 | CRC-32 of everything before it u32

The directory stands last, so that tensors are written as they come, one in memory at a time.
Nothing in the file is executed or unpickled.
"""

import math
import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitsmall.compressors.codes import (
    CODED,
    MAX_LEVELS,
    NARROWER,
    Code,
    Dense,
    Integer,
    Lookup,
    Sparse,
    exact,
    matrix_shape,
)
from fitsmall.compressors.file.coding import CODERS, Coder, Streams
from fitsmall.compressors.lattice import LARGEST, spread

__all__ = ["Entry", "entries", "estimate", "load", "payloads", "read", "save"]

Symbols = NDArray[np.unsignedinteger]
_T = TypeVar("_T")

MAGIC = b"FSML"
_OLD_MAGIC = b"PFIT"  # of files named .pressfit, the project's first name
VERSION = 2  # which added the kind "integer"
_HEADER = struct.Struct("<4sBB")
_FOOTER = struct.Struct("<II")
_BLOCK = 2**20
# What no model needs is damage: longer names, more dimensions, more weights, or a directory of more
# redundancy.
_MAX_NAME, _MAX_DIMENSIONS, _MAX_WEIGHTS, _MAX_INFLATION = 1024, 64, 2**44, 64
# Bytes that the tensors of any file may take, and for each byte of a larger file.
HARMLESS, _HONEST = 2**26, 10_000

# Numbers in the file: append, never reorder.
_CODERS = ("huffman", "ans", "context")
_KINDS = ("dense", "sparse", "shared", "alias", "integer")
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
# Names that most modules share, so that a small file does not spend bytes on spelling them.
_NAMES = (
    b".num_batches_tracked.running_mean.running_var.in_proj_weight.in_proj_bias.out_proj"
    b"module.backbone.features.classifier.embedding.encoder.decoder.layers.blocks.attn.mlp.norm"
    b"model.net.conv1.bias.conv1.weight.conv2.bias.conv2.weight"
    b"fc3.bias.fc3.weight.fc2.bias.fc2.weight.fc1.bias.fc1.weight.0.bias.0.weight"
)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Args:
        name: Key in the state dict.
        shape: Shape of the tensor.
        dtype: Its dtype.
        kind: ``dense`` (floats only), ``sparse`` (positions, floats), ``shared`` (positions,
            values, codebook), ``integer`` (positions, values, steps) or ``alias`` (the same tensor
            as ``alias``).
        storage: Dtype of the floats in the file, no wider than ``dtype``.
        floats: Number of floats: all, the non-zero ones, the codebook's, or the steps'.
        positions: Bytes of the positions' stream.
        values: Bytes of the values' stream.
        alias: Index of the entry whose tensor this one is, for tied weights.
        bounds: Number of integers below zero and above it.
        blocks: Number of steps along each dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    storage: torch.dtype = torch.float32
    floats: int = 0
    positions: int = 0
    values: int = 0
    alias: int = 0
    bounds: tuple[int, int] = (0, 0)
    blocks: tuple[int, ...] = ()

    @property
    def levels(self) -> int:
        """Distinct values besides zero that are looked up."""
        return {"shared": self.floats, "integer": sum(self.bounds)}.get(self.kind, 0)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def float_bytes(self) -> int:
        return self.floats * self.storage.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the payload."""
        return self.positions + self.values + self.float_bytes


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | Code], coder: str = "context"
) -> int:
    """Write a state dict, and return the size of the file in bytes.

    A plain tensor is stored as the cheapest code that is exact (:func:`~.codes.exact`), whatever
    made it compressible. The file appears under its name only when it is complete.

    Args:
        path: File to write; an existing one is replaced.
        tensors: Tensors or codes by name. Tensors that share their memory are stored once.
        coder: ``"context"`` (smallest), ``"ans"`` (fastest to read) or ``"huffman"``.

    Raises:
        TypeError: An entry is neither a tensor nor a code.
        ValueError: A name is longer than 1,024 characters, or cannot be printed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.fitsmall"
        >>> bytes_written = save(path, {"weight": torch.eye(64)})
        >>> torch.equal(load(path)["weight"], torch.eye(64)), bytes_written < 200
        (True, True)
    """
    path = Path(path)
    if coder not in _CODERS:
        raise ValueError(f"unknown coder {coder!r}: choose one of {', '.join(_CODERS)}")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, tensors, coder)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return size


def estimate(tensors: Mapping[str, Tensor | Code]) -> int:
    """Bytes of the file that :func:`save` would write, without writing it.

    Large tensors are estimated from a sample of their rows, see :meth:`~.codes.Code.bits`; one
    object under several names counts once.

    Example:
        >>> estimate({"weight": torch.zeros(1000, 1000)}) < 100
        True
    """
    payload, directory = 0, bytearray(_varint(len(tensors)))
    seen: set[int] = set()
    for name, value in tensors.items():
        code = exact(value) if isinstance(value, Tensor) else value
        size = 0 if id(value) in seen else round(code.bits() / 8)
        seen.add(id(value))
        payload += size
        entry = Entry(name, tuple(code.shape), code.dtype, "sparse", values=size)
        if isinstance(code, Integer):
            blocks = tuple(code.steps.shape)
            entry = replace(entry, kind="integer", bounds=code.bounds, blocks=blocks)
        directory += _pack(entry)
    return _HEADER.size + payload + len(_deflate(directory)) + _FOOTER.size


def load(path: str | os.PathLike[str], limit: int | None = None) -> dict[str, Tensor]:
    """The state dict in the file, on the CPU, bit for bit as it was saved.

    Args:
        path: File that :func:`save` wrote.
        limit: Most bytes that the tensors may take together, see :func:`read`.

    Raises:
        ValueError: The file is damaged, truncated, too large once decoded, or not a fitsmall file.
    """
    return {entry.name: tensor for entry, tensor in read(path, limit)}


def read(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[tuple[Entry, Tensor]]:
    """Entries and tensors of the file one by one, so that only one tensor need be in memory.

    Args:
        path: File that :func:`save` wrote.
        limit: Most bytes that the tensors may take together. A few bytes can describe any number
            of zeros, so the default refuses what no honest model needs: more than 10,000 times
            the file's size, where that is above 64 MiB.

    Raises:
        ValueError: The file is damaged, truncated, too large once decoded, or not a fitsmall file.
    """
    for entry, symbols, floats in payloads(path, limit):
        yield entry, _tensor(entry, symbols, floats)


def payloads(
    path: str | os.PathLike[str], limit: int | None = None
) -> Iterator[tuple[Entry, Symbols | None, Tensor]]:
    """Entries with their index matrix (None for dense ones) and their floats, one by one."""
    with open(path, "rb") as file:
        coder, entries, offsets = _directory(file, os.fspath(path))
        asked = sum(entry.numel * entry.dtype.itemsize for entry in entries)
        honest = max(HARMLESS, _HONEST * os.fstat(file.fileno()).st_size)
        allowed = honest if limit is None else limit
        if asked > allowed:
            raise ValueError(
                f"{path} asks for {asked:,} bytes of memory, above the limit of {allowed:,}: "
                f"pass limit={asked} if you trust it"
            )
        tied = {entry.alias for entry in entries if entry.kind == "alias"}
        # Decoded once, or a few bytes for each name could make the reader decode for hours.
        decoded: dict[int, tuple[Symbols | None, Tensor]] = {}
        for position, entry in enumerate(entries):
            if entry.kind == "alias":
                symbols, floats = decoded[entry.alias]
                yield replace(entries[entry.alias], name=entry.name), symbols, floats.clone()
                continue
            file.seek(offsets[entry.name])
            try:
                symbols, floats = _payload(file, entry, coder)
            except ValueError as error:
                raise ValueError(f"{path} is damaged at tensor {entry.name!r}: {error}") from error
            if position in tied:
                decoded[position] = symbols, floats
            yield entry, symbols, floats


def entries(path: str | os.PathLike[str]) -> tuple[str, tuple[Entry, ...]]:
    """The name of the file's coder, and its directory, without reading any tensor."""
    with open(path, "rb") as file:
        coder, found, _ = _directory(file, os.fspath(path))
    return coder, tuple(found)


def _write(file: BinaryIO, tensors: Mapping[str, Tensor | Code], coder: str) -> None:
    checked = _Checksummed(file)
    checked.write(_HEADER.pack(MAGIC, VERSION, _CODERS.index(coder)))
    directory = bytearray(_varint(len(tensors)))
    seen: dict[tuple[object, ...], tuple[int, weakref.ref[Tensor]]] = {}
    for position, (name, value) in enumerate(tensors.items()):
        if not isinstance(value, Tensor | Code):
            raise TypeError(f"{name!r} is a {type(value).__name__}: only tensors can be stored")
        _checked(name)
        if isinstance(value, Tensor) and value.numel():
            place = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
            first, owner = seen.setdefault(place, (position, weakref.ref(value)))
            # Memory that was freed and used again is no tie.
            if first != position and owner() is not None:
                entry = Entry(name, tuple(value.shape), value.dtype, "alias", alias=first)
                directory += _pack(entry)
                continue
            seen[place] = (position, weakref.ref(value))
        code = exact(value) if isinstance(value, Tensor) else value
        if code.dtype not in _DTYPES:
            raise TypeError(f"{name!r} is {code.dtype}, which the file has no place for")
        entry, blobs = _encode(name, code, CODERS[coder])
        for blob in blobs:
            checked.write(blob)
        directory += _pack(entry)
    packed = _deflate(directory)
    checked.write(packed)
    checked.write(struct.pack("<I", len(packed)))
    file.write(struct.pack("<I", checked.crc))


class _Checksummed:
    """A file that keeps the CRC-32 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc = file, 0

    def write(self, data: bytes | memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def _encode(name: str, code: Code, coder: Coder) -> tuple[Entry, list[bytes | memoryview]]:
    kind, leaf = "dense", code
    if isinstance(code, Sparse | Lookup):
        inner = code.values if isinstance(code, Sparse) else code
        kind = "shared" if isinstance(inner, Lookup) else "sparse"
        leaf = inner.codebook if isinstance(inner, Lookup) else inner
    elif isinstance(code, Integer):
        kind, leaf = "integer", code.steps
    if not isinstance(leaf, Dense):
        raise TypeError(f"{name!r}: no place in the file for {type(leaf).__name__} leaves")
    raw = leaf.values.detach().cpu().to(leaf.storage).contiguous().flatten()
    entry = Entry(name, tuple(code.shape), code.dtype, kind, leaf.storage, raw.numel())
    if isinstance(code, Integer):
        entry = replace(entry, bounds=code.bounds, blocks=tuple(leaf.shape))
    streams = Streams(b"", b"")
    if isinstance(code, Sparse | Lookup | Integer):
        streams = coder.encode(code.symbols(), (entry.levels or 1) + 1)
    entry = replace(entry, positions=len(streams.positions), values=len(streams.values))
    return entry, [streams.positions, streams.values, _bytes(raw)]


def _payload(file: BinaryIO, entry: Entry, coder: str) -> tuple[Symbols | None, Tensor]:
    streams = Streams(file.read(entry.positions), file.read(entry.values))
    raw = bytearray(file.read(entry.float_bytes))
    if entry.storage == torch.bool and raw.translate(None, b"\0\1"):
        raise ValueError("a boolean is neither 0 nor 1")
    floats = torch.empty(0, dtype=entry.storage)
    if raw:
        floats = torch.frombuffer(raw, dtype=entry.storage)
    if entry.kind == "dense":
        return None, floats
    levels = 1 if entry.kind == "sparse" else entry.levels
    symbols = CODERS[coder].decode(streams, matrix_shape(entry.shape), levels + 1)
    if entry.kind == "sparse" and np.count_nonzero(symbols) != entry.floats:
        raise ValueError("positions and values differ in number")
    if symbols.size and int(symbols.max()) > levels:
        raise ValueError("an index points outside the codebook")
    return symbols, floats


def _tensor(entry: Entry, symbols: Symbols | None, floats: Tensor) -> Tensor:
    floats = floats.to(entry.dtype)
    if symbols is None:
        return floats.view(entry.shape)
    flat = symbols.reshape(-1)
    tensor = torch.zeros(entry.numel, dtype=entry.dtype)
    if entry.kind == "sparse":
        tensor[torch.from_numpy(flat.view(np.bool_))] = floats
        return tensor.view(entry.shape)
    if entry.kind == "integer":
        below, above = entry.bounds
        integers = torch.tensor([0, *range(-below, 0), *range(1, above + 1)])
        table = integers.to(entry.dtype)
    else:
        table = torch.cat([tensor.new_zeros(1), floats])
    # Block by block: torch wants 32-bit indexes, four times the symbols' memory.
    for start in range(0, entry.numel, _BLOCK):
        index = torch.from_numpy(flat[start : start + _BLOCK].astype(np.int32))
        tensor[start : start + _BLOCK] = table.index_select(0, index)
    tensor = tensor.view(entry.shape)
    if entry.kind == "integer":
        tensor *= spread(floats.view(entry.blocks), tensor.shape)
    return tensor


def _directory(file: BinaryIO, path: str) -> tuple[str, list[Entry], dict[str, int]]:
    """Coder, entries and the offset of each payload; every length is checked against the file."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEADER.size)
    if head[:4] not in (MAGIC, _OLD_MAGIC):
        raise ValueError(f"{path} is not a fitsmall file")
    if size < _HEADER.size + _FOOTER.size:
        raise ValueError(f"{path} is truncated")
    _, version, number = _HEADER.unpack(head)
    if not 1 <= version <= VERSION:
        remedy = "upgrade fitsmall" if version > VERSION else "no fitsmall wrote it, get it again"
        raise ValueError(
            f"{path} has format version {version}, this fitsmall reads versions 1 to {VERSION}: "
            f"{remedy}"
        )
    file.seek(size - _FOOTER.size)
    length, crc = _FOOTER.unpack(file.read(_FOOTER.size))
    if _crc(file, size - 4) != crc:
        raise ValueError(f"{path} is damaged or truncated: its checksum does not match")
    start = size - _FOOTER.size - length
    try:
        if start < _HEADER.size or number >= len(_CODERS):
            raise ValueError("its header is impossible")
        file.seek(start)
        inflate = zlib.decompressobj(-15, zdict=_NAMES)
        largest = _MAX_INFLATION * (length + 1024)
        directory = inflate.decompress(file.read(length), largest)
        if not inflate.eof:
            raise ValueError("its directory does not end")
        found = _unpack(directory)
        _check(found, start - _HEADER.size)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    offsets, offset = {}, _HEADER.size
    for entry in found:
        offsets[entry.name] = offset
        offset += entry.bytes
    return _CODERS[number], found, offsets


def _check(found: list[Entry], payload: int) -> None:
    for entry in found:
        # A side of zero must not excuse the others: torch multiplies them into strides.
        if math.prod(max(1, side) for side in entry.shape) > _MAX_WEIGHTS:
            raise ValueError(f"{entry.name!r} has an impossible shape")
        narrower = NARROWER.get(entry.dtype, ())
        if entry.kind != "alias" and entry.storage not in (entry.dtype, *narrower):
            raise ValueError(f"{entry.name!r} is {entry.dtype}, but stored as {entry.storage}")
        if entry.kind in ("sparse", "shared", "integer") and entry.dtype not in CODED:
            raise ValueError(f"{entry.name!r} is {entry.dtype}, which is only stored dense")
        if entry.kind == "shared" and entry.floats > MAX_LEVELS:
            raise ValueError(f"{entry.name!r} has a codebook of {entry.floats} levels")
        if entry.kind == "integer":
            _check_integer(entry)
    if sum(entry.bytes for entry in found) != payload:
        raise ValueError("the lengths of its tensors do not add up")
    for position, entry in enumerate(found):
        coded = entry.positions + entry.values
        if entry.kind == "alias":
            target = found[entry.alias] if entry.alias < position else entry
            same = (target.shape, target.dtype) == (entry.shape, entry.dtype)
            if target.kind == "alias" or not same:
                raise ValueError(f"{entry.name!r} is tied to a tensor that is not there")
        elif entry.kind == "dense" and (coded or entry.floats != entry.numel):
            raise ValueError(f"{entry.name!r} has the wrong number of values")
        elif entry.kind != "dense" and entry.floats > entry.numel:
            raise ValueError(f"{entry.name!r} has more values than weights")


def _check_integer(entry: Entry) -> None:
    if max(entry.bounds) > LARGEST + 1 or not entry.dtype.is_floating_point:
        raise ValueError(f"{entry.name!r} has integers that no quantizer makes")
    uneven = any(
        not 1 <= blocks <= size or size % blocks
        for blocks, size in zip(entry.blocks, entry.shape, strict=True)
    )
    if uneven or math.prod(entry.blocks) != entry.floats:
        raise ValueError(f"{entry.name!r} has steps that do not cover it")


def _deflate(directory: bytes | bytearray) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_NAMES)
    return deflate.compress(directory) + deflate.flush()


def _crc(file: BinaryIO, length: int) -> int:
    file.seek(0)
    crc = 0
    while length > 0:
        block = file.read(min(_BLOCK, length))
        if not block:
            return -1
        crc = zlib.crc32(block, crc)
        length -= len(block)
    return crc


def _pack(entry: Entry) -> bytes:
    name = entry.name.encode()
    fields = [len(entry.shape), *entry.shape, _KINDS.index(entry.kind)]
    if entry.kind == "alias":
        fields += [entry.alias]
    else:
        fields += [_DTYPES.index(entry.storage), entry.floats]
        fields += [entry.positions, entry.values] if entry.kind != "dense" else []
        fields += [*entry.bounds, *entry.blocks] if entry.kind == "integer" else []
    packed = b"".join(_varint(field) for field in [_DTYPES.index(entry.dtype), *fields])
    return _varint(len(name)) + name + packed


def _unpack(directory: bytes) -> list[Entry]:
    reader = _Reader(directory)
    found: dict[str, Entry] = {}
    for _ in range(reader.varint()):
        entry = reader.entry()
        if entry.name in found:
            raise ValueError(f"{entry.name!r} stands twice")
        found[entry.name] = entry
    return list(found.values())


def _checked(name: str) -> str:
    """The name, which may end up in a terminal."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{name[:40]!r} cannot be the name of a tensor: only printable text of at most "
            f"{_MAX_NAME} characters can"
        )
    return name


class _Reader:
    """Reads entries, and the numbers and strings in them, from an inflated directory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def entry(self) -> Entry:
        name = _checked(self.take(self.varint()).decode())
        dtype = self.one_of(_DTYPES, "dtype")
        dimensions = self.varint()
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.varint() for _ in range(dimensions))
        kind = self.one_of(_KINDS, "kind of tensor")
        if kind == "alias":
            return Entry(name, shape, dtype, kind, alias=self.varint())
        storage, floats = self.one_of(_DTYPES, "dtype"), self.varint()
        entry = Entry(name, shape, dtype, kind, storage, floats)
        if kind != "dense":
            entry = replace(entry, positions=self.varint(), values=self.varint())
        if kind == "integer":
            bounds = self.varint(), self.varint()
            entry = replace(entry, bounds=bounds, blocks=tuple(self.varint() for _ in shape))
        return entry

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise ValueError("its directory ends early")
        taken, self.position = self.data[self.position : end], end
        return taken

    def one_of(self, known: Sequence[_T], what: str) -> _T:
        number = self.varint()
        if number >= len(known):
            raise ValueError(f"{what} {number} is unknown")
        return known[number]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in its directory is too large")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
