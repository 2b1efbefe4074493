"""Reads the compressed file: every tensor comes back bit for bit, and damaged files are refused.

Whatever a file contains, the reader takes no more memory than the directory states and the caller
allows, and checks every length in the directory against the file before it uses it.
"""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fitsmall.compressors.codes.code import matrix_shape
from fitsmall.compressors.codes.lattice import spread
from fitsmall.compressors.codes.product import product
from fitsmall.compressors.file.coding import CODERS, Streams, Symbols
from fitsmall.compressors.file.schema import (
    CODER_NAMES,
    FOOTER,
    HEADER,
    MAGIC,
    OLD_MAGIC,
    VERSION,
    Entry,
    check,
    inflate,
    unpack,
)
from fitsmall.compressors.projections.lowrank import tensor

__all__ = ["MIN_LIMIT", "Payload", "entries", "load", "payloads", "read"]

# By default the tensors of a file may take this many times its size, and this many bytes at least.
MAX_RATIO, MIN_LIMIT = 10_000, 2**26

_BLOCK = 2**20


def load(path: str | os.PathLike[str], limit: int | None = None) -> dict[str, Tensor]:
    """The state dict in the file, on the CPU, bit for bit as it was saved.

    Args:
        path: File that :func:`~fitsmall.compressors.save` wrote.
        limit: Most bytes that the tensors may take together, see :func:`read`.

    Raises:
        ValueError: The file is damaged, truncated, too large once decoded, or not a fitsmall file.
    """
    return {entry.name: tensor for entry, tensor in read(path, limit)}


def read(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[tuple[Entry, Tensor]]:
    """Entries and tensors of the file one by one, so that only one tensor need be in memory.

    Args:
        path: File that :func:`~fitsmall.compressors.save` wrote.
        limit: Most bytes that the tensors may take together, with the parts of sums and products.
            A few bytes can describe any number of zeros, so the default refuses what no honest
            model needs: more than 10,000 times the file's size, where that is above 64 MiB.

    Raises:
        ValueError: The file is damaged, truncated, too large once decoded, or not a fitsmall file.
    """
    for payload in payloads(path, limit):
        yield payload.entry, payload.decode()


@dataclass(frozen=True, eq=False)
class Payload:
    """A tensor in the form that the file holds it in.

    Args:
        entry: How it is stored.
        symbols: Index matrix of a sparse, shared or integer tensor: 0 where a weight is zero, else
            1 + the index of its value.
        floats: All values of a dense tensor, the non-zero ones of a sparse tensor, the codebook, or
            the scales.
        parts: Payloads of the summands or factors.
        decoded: Their sum or product, if it is computed already.
    """

    entry: Entry
    symbols: Symbols | None = None
    floats: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: tuple["Payload", ...] = ()
    decoded: Tensor | None = None

    def leaves(self) -> Iterator["Payload"]:
        """The payload itself, or those that sums and products end in."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()

    def decode(self) -> Tensor:
        """The tensor."""
        entry = self.entry
        if self.decoded is not None:
            return self.decoded.clone()
        if self.parts:
            first, second = (part.decode() for part in self.parts)
            if entry.kind == "sum":
                return first + second
            return tensor(product(first, second), torch.Size(entry.shape), entry.form)
        floats = self.floats.to(entry.dtype)
        if self.symbols is None:
            return floats.view(entry.shape)
        flat = self.symbols.reshape(-1)
        if entry.kind == "sparse":
            whole = torch.zeros(entry.numel, dtype=entry.dtype)
            whole[torch.from_numpy(flat.view(np.bool_))] = floats
            return whole.view(entry.shape)
        if entry.kind == "integer":
            below, above = entry.bounds
            integers = torch.tensor([0, *range(-below, 0), *range(1, above + 1)])
            whole = _look_up(integers.to(entry.dtype), flat).view(entry.shape)
            whole *= spread(floats.view(entry.blocks), entry.shape)
            return whole
        return _look_up(torch.cat([floats.new_zeros(1), floats]), flat).view(entry.shape)


def payloads(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[Payload]:
    """The tensors in the form that the file holds them in, one by one; see :func:`read`."""
    with open(path, "rb") as file:
        coder, entries, offsets = _directory(file, os.fspath(path))
        asked = sum(entry.memory for entry in entries)
        allowed = max(MIN_LIMIT, MAX_RATIO * os.fstat(file.fileno()).st_size)
        if limit is not None:
            allowed = limit
        if asked > allowed:
            raise ValueError(
                f"{path} asks for {asked:,} bytes of memory, above the limit of {allowed:,}: "
                f"pass limit={asked} if you trust it"
            )
        tied = {entry.alias for entry in entries if entry.kind == "alias"}
        # Tied tensors are decoded once: a few bytes for each name could take hours otherwise.
        decoded: dict[int, Payload] = {}
        for position, entry in enumerate(entries):
            if entry.kind == "alias":
                first = decoded[entry.alias]
                renamed = replace(first.entry, name=entry.name)
                yield replace(first, entry=renamed, floats=first.floats.clone())
                continue
            file.seek(offsets[entry.name])
            try:
                payload = _payload(file, entry, coder)
            except ValueError as error:
                raise ValueError(f"{path} is damaged at tensor {entry.name!r}: {error}") from error
            if position in tied:
                if payload.parts:
                    payload = replace(payload, decoded=payload.decode())
                decoded[position] = payload
            yield payload


def entries(path: str | os.PathLike[str]) -> tuple[str, tuple[Entry, ...]]:
    """The name of the file's coder, and its directory, without reading any tensor."""
    with open(path, "rb") as file:
        coder, found, _ = _directory(file, os.fspath(path))
    return coder, tuple(found)


def _directory(file: BinaryIO, path: str) -> tuple[str, list[Entry], dict[str, int]]:
    """Coder, entries and the offset of each payload; every length is checked against the file."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(HEADER.size)
    if head[:4] not in (MAGIC, OLD_MAGIC):
        raise ValueError(f"{path} is not a fitsmall file")
    if size < HEADER.size + FOOTER.size:
        raise ValueError(f"{path} is truncated")
    _, version, number = HEADER.unpack(head)
    if not 1 <= version <= VERSION:
        remedy = "upgrade fitsmall" if version > VERSION else "no fitsmall wrote it, get it again"
        raise ValueError(
            f"{path} has format version {version}, this fitsmall reads versions 1 to {VERSION}: "
            f"{remedy}"
        )
    file.seek(size - FOOTER.size)
    length, crc = FOOTER.unpack(file.read(FOOTER.size))
    if _crc(file, size - 4) != crc:
        raise ValueError(f"{path} is damaged or truncated: its checksum does not match")
    start = size - FOOTER.size - length
    try:
        if start < HEADER.size or number >= len(CODER_NAMES):
            raise ValueError("its header is impossible")
        file.seek(start)
        found = unpack(inflate(file.read(length)), size)
        check(found, start - HEADER.size)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    offsets, offset = {}, HEADER.size
    for entry in found:
        offsets[entry.name] = offset
        offset += entry.bytes
    return CODER_NAMES[number], found, offsets


def _payload(file: BinaryIO, entry: Entry, coder: str) -> Payload:
    """The payload that comes next in the file."""
    if entry.parts:
        return Payload(entry, parts=tuple(_payload(file, part, coder) for part in entry.parts))
    streams = Streams(file.read(entry.positions), file.read(entry.values))
    raw = bytearray(file.read(entry.float_bytes))
    if entry.storage == torch.bool and raw.translate(None, b"\0\1"):
        raise ValueError("a boolean is neither 0 nor 1")
    floats = torch.empty(0, dtype=entry.storage)
    if raw:
        floats = torch.frombuffer(raw, dtype=entry.storage)
    if entry.kind == "dense":
        return Payload(entry, floats=floats)
    levels = 1 if entry.kind == "sparse" else entry.levels
    symbols = CODERS[coder].decode(streams, matrix_shape(entry.shape), levels + 1)
    if entry.kind == "sparse" and np.count_nonzero(symbols) != entry.floats:
        raise ValueError("positions and values differ in number")
    if symbols.size and int(symbols.max()) > levels:
        raise ValueError("an index points outside the codebook")
    return Payload(entry, symbols, floats)


def _look_up(table: Tensor, symbols: Symbols) -> Tensor:
    """The value of each symbol."""
    values = table.new_empty(symbols.size)
    # Block by block: torch wants 32-bit indexes, four times the memory of the symbols.
    for start in range(0, symbols.size, _BLOCK):
        index = torch.from_numpy(symbols[start : start + _BLOCK].astype(np.int32))
        values[start : start + _BLOCK] = table.index_select(0, index)
    return values


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
