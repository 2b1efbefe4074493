"""Writes the compressed file: one self-contained, checksummed file that holds a state dict."""

import os
import struct
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Dense, Integer, Lookup, Sparse, Sum
from fitsmall.compressors.codes.dtypes import CODED, FLOATS
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.file.atomic import replaced
from fitsmall.compressors.file.coding import CODERS, MAX_LEVELS, Coder, Streams
from fitsmall.compressors.file.schema import (
    CODER_NAMES,
    DTYPES,
    FOOTER,
    HEADER,
    MAGIC,
    MAX_DEPTH,
    VERSION,
    Entry,
    check_name,
    deflate,
    pack,
)
from fitsmall.compressors.projections.lowrank import Factors

__all__ = ["check_storable", "coded_size", "estimate", "save"]


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | Code], coder: str = "context"
) -> int:
    """Write a state dict, and return the size of the file in bytes.

    A plain tensor is stored as the cheapest code that is exact (:func:`~.exact.exact`), whatever
    made it compressible. A code is stored as it is, sums and products with their parts; one of
    another class is decoded, and stored like a plain tensor. The file appears under its name only
    when it is complete.

    Args:
        path: File to write; an existing one is replaced, and its permissions are kept.
        tensors: Tensors or codes by name. Tensors that share their memory are stored once, as is a
            code under several names.
        coder: ``"context"`` (smallest), ``"ans"`` (fastest to read) or ``"huffman"``.

    Raises:
        FileNotFoundError: The folder of the file does not exist.
        TypeError: The tensors are no mapping, or an entry is neither a tensor nor a code, or of a
            kind that no file can hold, see :func:`check_storable`.
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
    if not isinstance(tensors, Mapping):
        raise TypeError(
            "save takes a mapping from names to tensors, such as module.state_dict(), and got a "
            f"{type(tensors).__name__}"
        )
    if coder not in CODER_NAMES:
        raise ValueError(f"unknown coder {coder!r}: choose one of {', '.join(CODER_NAMES)}")
    with replaced(path) as file:
        _write(file, tensors, coder)
        return file.tell()


def check_storable(name: str, value: object) -> None:
    """Check that a file can hold a tensor or a code under a name.

    Raises:
        TypeError: It is none, or a sparse, nested, or quantized tensor, or one without data.
        ValueError: The name is longer than 1,024 characters, or cannot be printed.

    Example:
        >>> check_storable("weight", torch.eye(2).to_sparse())
        Traceback (most recent call last):
        TypeError: 'weight' is a sparse_coo tensor: register a dense one, with to_dense()
    """
    check_name(name)
    if not isinstance(value, Tensor | Code):
        raise TypeError(f"{name!r} is a {type(value).__name__}: only tensors can be stored")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name!r} is {value.dtype}, which no file can hold: register it in another dtype"
        )
    if not isinstance(value, Tensor):
        return
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name!r} is a {layout} tensor: register a dense one, with to_dense()")
    if value.is_nested:
        raise TypeError(f"{name!r} is a nested tensor: register one of its parts each")
    if value.is_meta:
        raise TypeError(f"{name!r} is on the meta device, without data: initialise it first")


def estimate(tensors: Mapping[str, Tensor | Code]) -> int:
    """Bytes of the file that :func:`save` would write, without writing it.

    Large tensors are estimated from a sample of their rows, see :meth:`~.codes.Code.bits`.

    Example:
        >>> estimate({"weight": torch.zeros(1000, 1000)}) < 100
        True
    """
    entries: list[Entry] = []
    ties = _Ties()
    for name, value in tensors.items():
        if tied := ties.entry(name, value, len(entries)):
            entries.append(tied)
        else:
            code = exact(value) if isinstance(value, Tensor) else _storable(value)
            entries.append(_estimated(name, code))
    payload = sum(entry.bytes for entry in entries)
    return HEADER.size + payload + len(deflate(pack(entries))) + FOOTER.size


def coded_size(tensors: Mapping[str, Tensor | Code], coder: str = "context") -> int:
    """Bytes of the file that :func:`save` would write: all is coded, and nothing is kept.

    Example:
        >>> coded_size({"weight": torch.zeros(1000, 1000)}) < 100
        True
    """
    file = _Counted()
    _write(file, tensors, coder)
    return file.size


def _write(file: "BinaryIO | _Counted", tensors: Mapping[str, Tensor | Code], coder: str) -> None:
    checked = _Checksummed(file)
    checked.write(HEADER.pack(MAGIC, VERSION, CODER_NAMES.index(coder)))
    entries: list[Entry] = []
    ties = _Ties()
    for name, value in tensors.items():
        check_storable(name, value)
        if isinstance(value, Tensor):
            value = value.resolve_conj().resolve_neg()
        if tied := ties.entry(name, value, len(entries)):
            entries.append(tied)
            continue
        code = exact(value) if isinstance(value, Tensor) else _storable(value)
        entry, blobs = _encode(name, code, CODERS[coder])
        padding = max(0, entry.least_bytes - entry.bytes)
        for blob in (*blobs, bytes(padding)):
            checked.write(blob)
        entries.append(replace(entry, padding=padding))
    directory = deflate(pack(entries))
    checked.write(directory)
    checked.write(struct.pack("<I", len(directory)))
    file.write(struct.pack("<I", checked.crc))


class _Ties:
    """Finds tensors and codes that are in the file already, under another name."""

    def __init__(self) -> None:
        self.seen: dict[object, tuple[int, weakref.ref[Tensor | Code]]] = {}

    def entry(self, name: str, value: Tensor | Code, position: int) -> Entry | None:
        """An entry that refers to the first one of this value, or None if this is the first."""
        key: object = id(value)
        if isinstance(value, Tensor):
            if not value.numel():
                return None
            key = value.data_ptr(), value.device, value.dtype, value.shape, value.stride()
        first, owner = self.seen.get(key, (position, None))
        # A new tensor in the memory of a freed one is not tied to it.
        if owner is None or owner() is None:
            self.seen[key] = position, weakref.ref(value)
            return None
        return Entry(name, tuple(value.shape), value.dtype, "alias", alias=first)


class _Counted:
    """A file that keeps nothing but its size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self.size += memoryview(data).nbytes


class _Checksummed:
    """A file that keeps the CRC-32 of what was written."""

    def __init__(self, file: BinaryIO | _Counted) -> None:
        self.file, self.crc = file, 0

    def write(self, data: bytes | memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.file.write(data)


def _storable(code: Code, depth: int = 0) -> Code:
    """The same code; where the file has no kind for it, the cheapest code of the same tensor."""
    match code:
        case Sum() if depth < MAX_DEPTH:
            return Sum(_storable(code.first, depth + 1), _storable(code.second, depth + 1))
        case Factors() if depth < MAX_DEPTH:
            left, right = _storable(code.left, depth + 1), _storable(code.right, depth + 1)
            return Factors(left, right, code.whole, code.form)
    return exact(code.decode()) if _leaf(code) is None else code


def _leaf(code: Code) -> tuple[str, Dense] | None:
    """The kind of a code in the file and its floats, or None if there is no such kind."""
    if isinstance(code, Dense):
        return "dense", code
    if code.dtype not in CODED:
        return None
    match code:
        case Sparse(values=Dense() as floats):
            return "sparse", floats
        case Lookup(codebook=Dense() as floats) | Sparse(values=Lookup(codebook=Dense() as floats)):
            return ("shared", floats) if floats.shape.numel() <= MAX_LEVELS else None
        case Integer(scales=Dense() as floats) if code.dtype in FLOATS and code.shape.numel():
            return "integer", floats
    return None


def _encode(name: str, code: Code, coder: Coder) -> tuple[Entry, list[bytes | memoryview]]:
    """The entry of a code, and its payload."""
    if isinstance(code, Sum | Factors):
        encoded = [_encode(name, part, coder) for part in _parts(code)]
        blobs = [blob for _, blobs in encoded for blob in blobs]
        return _composed(name, code, [entry for entry, _ in encoded]), blobs
    leaf = _leaf(code)
    assert leaf is not None  # of what _storable() returns
    kind, floats = leaf
    raw = floats.values.detach().cpu().to(floats.storage).contiguous().flatten()
    entry = Entry(name, tuple(code.shape), code.dtype, kind, floats.storage, raw.numel())
    if isinstance(code, Integer):
        entry = replace(entry, bounds=code.bounds, blocks=tuple(floats.shape))
    streams = Streams(b"", b"")
    if isinstance(code, Sparse | Lookup | Integer):
        streams = coder.encode(code.symbols(), (entry.levels or 1) + 1)
    entry = replace(entry, positions=len(streams.positions), values=len(streams.values))
    return entry, [streams.positions, streams.values, _bytes(raw)]


def _estimated(name: str, code: Code) -> Entry:
    """An entry like that of a code, of about as many bytes."""
    if isinstance(code, Sum | Factors):
        return _composed(name, code, [_estimated(name, part) for part in _parts(code)])
    size = round(code.bits() / 8)
    entry = Entry(name, tuple(code.shape), code.dtype, "sparse", values=size)
    if isinstance(code, Integer):
        blocks = tuple(code.scales.shape)
        entry = replace(entry, kind="integer", bounds=code.bounds, blocks=blocks)
    return entry


def _parts(code: Sum | Factors) -> tuple[Code, Code]:
    return (code.first, code.second) if isinstance(code, Sum) else (code.left, code.right)


def _composed(name: str, code: Sum | Factors, parts: Sequence[Entry]) -> Entry:
    """The entry of a sum or a product of these parts."""
    entry = Entry(name, tuple(code.shape), code.dtype, "sum", parts=tuple(parts))
    return replace(entry, kind="product", form=code.form) if isinstance(code, Factors) else entry


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
