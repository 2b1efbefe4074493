"""Writes the compressed file: one self-contained, checksummed file that holds a state dict."""

import os
import struct
import tempfile
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fitsmall.compressors.codes import Code, Dense, Integer, Lookup, Sparse
from fitsmall.compressors.exact import exact
from fitsmall.compressors.file.coding import CODERS, Coder, Streams
from fitsmall.compressors.file.schema import (
    CODER_NAMES,
    DTYPES,
    FOOTER,
    HEADER,
    MAGIC,
    VERSION,
    Entry,
    check_name,
    deflate,
    pack,
)

__all__ = ["estimate", "save"]


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | Code], coder: str = "context"
) -> int:
    """Write a state dict, and return the size of the file in bytes.

    A plain tensor is stored as the cheapest code that is exact (:func:`~.exact.exact`), whatever
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
        >>> from fitsmall.compressors import load
        >>> path = Path(tempfile.mkdtemp()) / "model.fitsmall"
        >>> bytes_written = save(path, {"weight": torch.eye(64)})
        >>> torch.equal(load(path)["weight"], torch.eye(64)), bytes_written < 200
        (True, True)
    """
    path = Path(path)
    if coder not in CODER_NAMES:
        raise ValueError(f"unknown coder {coder!r}: choose one of {', '.join(CODER_NAMES)}")
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
    payload = 0
    entries = []
    seen: set[int] = set()
    for name, value in tensors.items():
        code = exact(value) if isinstance(value, Tensor) else value
        size = 0 if id(value) in seen else round(code.bits() / 8)
        seen.add(id(value))
        payload += size
        entry = Entry(name, tuple(code.shape), code.dtype, "sparse", values=size)
        if isinstance(code, Integer):
            blocks = tuple(code.scales.shape)
            entry = replace(entry, kind="integer", bounds=code.bounds, blocks=blocks)
        entries.append(entry)
    return HEADER.size + payload + len(deflate(pack(entries))) + FOOTER.size


def _write(file: BinaryIO, tensors: Mapping[str, Tensor | Code], coder: str) -> None:
    checked = _Checksummed(file)
    checked.write(HEADER.pack(MAGIC, VERSION, CODER_NAMES.index(coder)))
    entries: list[Entry] = []
    seen: dict[tuple[object, ...], tuple[int, weakref.ref[Tensor]]] = {}
    for position, (name, value) in enumerate(tensors.items()):
        if not isinstance(value, Tensor | Code):
            raise TypeError(f"{name!r} is a {type(value).__name__}: only tensors can be stored")
        check_name(name)
        if isinstance(value, Tensor) and value.numel():
            memory = (value.data_ptr(), value.device, value.dtype, value.shape, value.stride())
            first, owner = seen.setdefault(memory, (position, weakref.ref(value)))
            # A new tensor in the memory of a freed one is not tied to it.
            if first != position and owner() is not None:
                entries.append(Entry(name, tuple(value.shape), value.dtype, "alias", alias=first))
                continue
            seen[memory] = (position, weakref.ref(value))
        code = exact(value) if isinstance(value, Tensor) else value
        if code.dtype not in DTYPES:
            raise TypeError(f"{name!r} is {code.dtype}, which no file can hold")
        entry, blobs = _encode(name, code, CODERS[coder])
        for blob in blobs:
            checked.write(blob)
        entries.append(entry)
    directory = deflate(pack(entries))
    checked.write(directory)
    checked.write(struct.pack("<I", len(directory)))
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
        kind, leaf = "integer", code.scales
    if not isinstance(leaf, Dense):
        raise TypeError(f"{name!r}: no file can hold leaves of type {type(leaf).__name__}")
    raw = leaf.values.detach().cpu().to(leaf.storage).contiguous().flatten()
    entry = Entry(name, tuple(code.shape), code.dtype, kind, leaf.storage, raw.numel())
    if isinstance(code, Integer):
        entry = replace(entry, bounds=code.bounds, blocks=tuple(leaf.shape))
    streams = Streams(b"", b"")
    if isinstance(code, Sparse | Lookup | Integer):
        streams = coder.encode(code.symbols(), (entry.levels or 1) + 1)
    entry = replace(entry, positions=len(streams.positions), values=len(streams.values))
    return entry, [streams.positions, streams.values, _bytes(raw)]


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
