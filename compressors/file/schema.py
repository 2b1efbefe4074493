"""The format of the compressed file, and its directory: which tensors there are, and how stored.

Layout, integers little-endian, ``varint`` as in LEB128::

    magic "FSML" | version u8 | coder u8
    payload of each tensor, in order: positions | values | floats; of a sum or a product: the
        payload of each part | padding
    directory: an entry for each tensor, raw deflate
    directory's length u32 | CRC-32 of everything before it u32

The directory comes last, so that the writer holds one tensor in memory at a time. Nothing in the
file is executed or unpickled.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fitsmall.compressors.codes.dtypes import CODED, FLOATS, NARROWER
from fitsmall.compressors.codes.lattice import LARGEST
from fitsmall.compressors.file.coding import MAX_LEVELS
from fitsmall.compressors.projections.lowrank import FORMS, matrix_size

__all__ = [
    "CODER_NAMES",
    "DTYPES",
    "FOOTER",
    "HEADER",
    "KINDS",
    "MAGIC",
    "MAX_DEPTH",
    "OLD_MAGIC",
    "TERMS_IN_BYTE",
    "VERSION",
    "Entry",
    "check",
    "check_name",
    "deflate",
    "inflate",
    "pack",
    "unpack",
    "varint",
]

_T = TypeVar("_T")

MAGIC = b"FSML"
OLD_MAGIC = b"PFIT"  # of files named .pressfit, the project's first name
VERSION = 3  # 2 added the kind "integer", 3 sums, products and the layout of N:M masks
HEADER = struct.Struct("<4sBB")  # magic, version, coder
FOOTER = struct.Struct("<II")  # length of the directory, CRC-32

# Numbers in the file: append, never reorder.
CODER_NAMES = ("huffman", "ans", "context")
KINDS = ("dense", "sparse", "shared", "alias", "integer", "sum", "product")
DTYPES = (
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

# No model needs longer names, more dimensions or more weights, or a directory that deflates better.
_MAX_NAME, _MAX_DIMENSIONS, _MAX_WEIGHTS, _MAX_INFLATION = 1024, 64, 2**44, 64

# Sums and products within each other. The writer stores what is nested more deeply as one tensor.
MAX_DEPTH = 16

# The most terms of products for one byte of the file, or a few bytes could keep a reader busy for
# hours. The writer pads to this bound.
TERMS_IN_BYTE = 2**19

# Tensors and parts of tensors that any file may have, on top of one for each of its bytes: an
# inflated directory could list 64 times as many, and each takes a fraction of a millisecond.
_FREE_PARTS = 1024

# Names that most modules share, so that a small file does not spend bytes on spelling them.
_COMMON_NAMES = (
    b".num_batches_tracked.running_mean.running_var.in_proj_weight.in_proj_bias.out_proj"
    b"module.backbone.features.classifier.embedding.encoder.decoder.layers.blocks.attn.mlp.norm"
    b"model.net.conv1.bias.conv1.weight.conv2.bias.conv2.weight"
    b"fc3.bias.fc3.weight.fc2.bias.fc2.weight.fc1.bias.fc1.weight.0.bias.0.weight"
)


@dataclass(frozen=True)
class Entry:
    """How one tensor is stored.

    Args:
        name: Key in the state dict.
        shape: Shape of the tensor.
        dtype: Its dtype.
        kind: ``dense`` (floats only), ``sparse`` (positions, floats), ``shared`` (positions,
            values, codebook), ``integer`` (positions, values, scales), ``alias`` (the same tensor
            as entry number ``alias``), or the ``sum`` or matrix ``product`` of two parts.
        storage: Dtype of the floats in the file, no wider than ``dtype``.
        floats: Number of floats: all, the non-zero ones, the codebook's, or the scales.
        positions: Bytes of the stream that says which weights are not zero.
        values: Bytes of the stream that says which level each of these has.
        alias: Index of the entry whose tensor this one is, for tied weights.
        bounds: Number of integers below zero and above it.
        blocks: Number of scales along each dimension.
        parts: Entries of the two summands or factors, under the same name.
        form: How a product is a weight, see :mod:`~fitsmall.compressors.projections.lowrank`.
        padding: Bytes of zeros after the parts.
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
    parts: tuple["Entry", ...] = ()
    form: str = "channels"
    padding: int = 0

    @property
    def levels(self) -> int:
        """Distinct non-zero values that the weights are looked up among."""
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
        own = self.positions + self.values + self.float_bytes + self.padding
        return own + sum(part.bytes for part in self.parts)

    @property
    def memory(self) -> int:
        """Bytes of the tensor and of those that it is made of."""
        own = 0 if self.kind == "sum" else self.numel * self.dtype.itemsize
        return own + sum(part.memory for part in self.parts)

    @property
    def terms(self) -> int:
        """Terms to add up in all products."""
        own = self.numel * self.parts[0].shape[1] if self.kind == "product" else 0
        return own + sum(part.terms for part in self.parts)

    @property
    def least_bytes(self) -> int:
        """The fewest bytes for so many terms."""
        return self.terms // TERMS_IN_BYTE


def pack(entries: Sequence[Entry]) -> bytes:
    """The directory of these entries, before it is deflated."""
    return varint(len(entries)) + b"".join(map(_pack_entry, entries))


def unpack(directory: bytes, size: int | None = None) -> list[Entry]:
    """The entries of a directory.

    Args:
        directory: The directory, inflated.
        size: Bytes of its file, which limit the number of tensors and parts.

    Raises:
        ValueError: The directory is damaged, or lists too much.

    Example:
        >>> entry = Entry("weight", (20, 30), torch.float32, "sparse", floats=5, positions=9)
        >>> unpack(pack([entry])) == [entry]
        True
    """
    reader = _Reader(directory, None if size is None else size + _FREE_PARTS)
    found: dict[str, Entry] = {}
    for _ in range(reader.varint()):
        entry = reader.entry()
        if entry.name in found:
            raise ValueError(f"{entry.name!r} is there twice")
        found[entry.name] = entry
    return list(found.values())


def deflate(directory: bytes) -> bytes:
    """The directory in the form that is written to the file."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_COMMON_NAMES)
    return packer.compress(directory) + packer.flush()


def inflate(packed: bytes) -> bytes:
    """The directory that was deflated.

    Raises:
        ValueError: It has no end, or is more redundant than a directory can be.
    """
    unpacker = zlib.decompressobj(-15, zdict=_COMMON_NAMES)
    try:
        directory = unpacker.decompress(packed, _MAX_INFLATION * (len(packed) + 1024))
    except zlib.error as error:
        raise ValueError(f"its directory cannot be read: {error}") from error
    if not unpacker.eof:
        raise ValueError("its directory does not end")
    return directory


def check(entries: Sequence[Entry], payload: int) -> None:
    """Refuse a directory that no writer makes.

    Args:
        entries: Entries of the directory.
        payload: Bytes of all payloads together.

    Raises:
        ValueError: An entry contradicts itself or another one, or the lengths do not add up.
    """
    for position, entry in enumerate(entries):
        _check_shape(entry)
        if entry.kind == "alias":
            target = entries[entry.alias] if entry.alias < position else entry
            same = (target.shape, target.dtype) == (entry.shape, entry.dtype)
            if target.kind == "alias" or not same:
                raise ValueError(f"{entry.name!r} is tied to a tensor that is not there")
        else:
            _check_entry(entry)
            if entry.bytes < entry.least_bytes:
                raise ValueError(f"{entry.name!r} has products of more terms than its bytes allow")
    if sum(entry.bytes for entry in entries) != payload:
        raise ValueError("the lengths of its tensors do not add up")


def _check_shape(entry: Entry) -> None:
    # A dimension of size zero must not excuse the others: torch multiplies them into strides.
    if math.prod(max(1, size) for size in entry.shape) > _MAX_WEIGHTS:
        raise ValueError(f"{entry.name!r} has an impossible shape")


def _check_entry(entry: Entry) -> None:
    if entry.parts:
        if entry.dtype not in FLOATS:
            raise ValueError(f"{entry.name!r} is {entry.dtype}, but a {entry.kind}")
        for part in entry.parts:
            _check_shape(part)
            _check_entry(part)
        return
    if entry.storage not in (entry.dtype, *NARROWER.get(entry.dtype, ())):
        raise ValueError(f"{entry.name!r} is {entry.dtype}, but stored as {entry.storage}")
    if entry.kind == "dense":
        if entry.floats != entry.numel:
            raise ValueError(f"{entry.name!r} has the wrong number of values")
        return
    if entry.dtype not in CODED:
        raise ValueError(f"{entry.name!r} is {entry.dtype}, which is only stored dense")
    if entry.kind == "shared" and entry.floats > MAX_LEVELS:
        raise ValueError(f"{entry.name!r} has a codebook of {entry.floats} levels")
    if entry.kind == "sparse" and entry.floats > entry.numel:
        raise ValueError(f"{entry.name!r} has more values than weights")
    if entry.kind == "integer":
        _check_integer(entry)


def _check_integer(entry: Entry) -> None:
    if max(entry.bounds) > LARGEST + 1 or not entry.dtype.is_floating_point:
        raise ValueError(f"{entry.name!r} has integers that no quantizer makes")
    uneven = any(
        not 1 <= blocks <= size or size % blocks
        for blocks, size in zip(entry.blocks, entry.shape, strict=True)
    )
    if uneven or math.prod(entry.blocks) != entry.floats:
        raise ValueError(f"{entry.name!r} has scales that do not cover it")


def check_name(name: str) -> str:
    """The name, if it can be one: it may end up in a terminal.

    Raises:
        ValueError: It is too long, or cannot be printed.
    """
    if len(name) > _MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{name[:40]!r} cannot be the name of a tensor: only printable text of at most "
            f"{_MAX_NAME} characters can"
        )
    return name


def varint(value: int) -> bytes:
    """A whole number in bytes of seven bits, the low ones first; the last byte is below 128.

    >>> varint(5), varint(300)
    (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _pack_entry(entry: Entry) -> bytes:
    name = entry.name.encode()
    fields = [DTYPES.index(entry.dtype), len(entry.shape), *entry.shape, *_fields(entry)]
    return varint(len(name)) + name + b"".join(map(varint, fields))


def _fields(entry: Entry) -> list[int]:
    """The numbers of an entry in the directory, after its name, dtype and shape."""
    fields = [KINDS.index(entry.kind)]
    if entry.kind == "alias":
        return [*fields, entry.alias]
    if entry.parts:
        first, second = entry.parts
        if entry.kind == "product":
            fields += [FORMS.index(entry.form), first.shape[1]]
        return [*fields, entry.padding, *_fields(first), *_fields(second)]
    fields += [DTYPES.index(entry.storage), entry.floats]
    fields += [entry.positions, entry.values] if entry.kind != "dense" else []
    fields += [*entry.bounds, *entry.blocks] if entry.kind == "integer" else []
    return fields


class _Reader:
    """Reads entries, and the numbers and strings in them, from an inflated directory."""

    def __init__(self, data: bytes, most: int | None) -> None:
        self.data, self.position = data, 0
        self.parts, self.most = 0, most

    def entry(self) -> Entry:
        name = check_name(self.take(self.varint()).decode())
        dtype = self.one_of(DTYPES, "dtype")
        dimensions = self.varint()
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.varint() for _ in range(dimensions))
        return self.fields(Entry(name, shape, dtype, self.one_of(KINDS, "kind of tensor")), 0)

    def fields(self, entry: Entry, depth: int) -> Entry:
        """The entry with what :func:`_fields` wrote after its kind."""
        self.parts += 1
        if self.most is not None and self.parts > self.most:
            raise ValueError(f"its directory lists more than {self.most:,} tensors and parts")
        if entry.kind == "alias":
            if depth:
                raise ValueError(f"{entry.name!r} has a part that is tied to another tensor")
            return replace(entry, alias=self.varint())
        if entry.kind in ("sum", "product"):
            if depth == MAX_DEPTH:
                raise ValueError(f"{entry.name!r} is nested more than {MAX_DEPTH} times")
            shapes = [entry.shape] * 2
            if entry.kind == "product":
                entry = replace(entry, form=self.one_of(FORMS, "form"))
                (rows, columns), rank = matrix_size(entry.shape, entry.form), self.varint()
                shapes = [(rows, rank), (rank, columns)]
            entry = replace(entry, padding=self.varint())
            parts = [self.part(entry, shape, depth + 1) for shape in shapes]
            return replace(entry, parts=tuple(parts))
        entry = replace(entry, storage=self.one_of(DTYPES, "dtype"), floats=self.varint())
        if entry.kind != "dense":
            entry = replace(entry, positions=self.varint(), values=self.varint())
        if entry.kind == "integer":
            bounds = self.varint(), self.varint()
            blocks = tuple(self.varint() for _ in entry.shape)
            entry = replace(entry, bounds=bounds, blocks=blocks)
        return entry

    def part(self, whole: Entry, shape: tuple[int, ...], depth: int) -> Entry:
        kind = self.one_of(KINDS, "kind of tensor")
        return self.fields(Entry(whole.name, shape, whole.dtype, kind), depth)

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
