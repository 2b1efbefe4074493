"""Forged files: honest ones that are damaged, spliced, or claim what is not so.

Nearly all of them have a valid checksum, so that a reader reads on after it.
"""

import math
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fitsmall.compressors import Code, Dense, Factors, Sum, exact, save
from fitsmall.compressors.codes.dtypes import CODED
from fitsmall.compressors.file import coding
from fitsmall.compressors.file.coding import CODERS
from fitsmall.compressors.file.reader import MIN_LIMIT
from fitsmall.compressors.file.schema import (
    CODER_NAMES,
    DTYPES,
    FOOTER,
    HEADER,
    KINDS,
    MAGIC,
    MAX_DEPTH,
    TERMS_IN_BYTE,
    VERSION,
    Entry,
    deflate,
    inflate,
    pack,
    unpack,
    varint,
)
from fitsmall.compressors.projections.lowrank import FORMS

__all__ = [
    "LONGEST", "Parts", "forge", "greedy", "mutate", "put_together", "seeds", "take_apart",
]  # fmt: skip

LONGEST = 4096  # bytes of a forged file
# ------------------------------------------------------------------------------- honest files


@cache
def seeds() -> tuple[bytes, ...]:
    """Small files of every coder, kind and dtype, with empty tensors, scalars and tied ones."""
    i = torch.arange(60).view(6, 10)
    many = torch.arange(300).repeat(2)
    scales = (2 * torch.arange(6).view(6, 1) + 97) / 128
    wide = (2 * torch.arange(6).view(3, 2, 1) + 97).bfloat16() * (
        torch.arange(192).view(3, 2, 32) % 5
    )
    dense, few = Dense(i / 7), exact(i % 4 * (i % 3 == 0) / 2)
    left, right = Dense(i[:, :3] / 7), exact(i[:3] % 5 / 4)
    product = Factors(left, right, torch.Size([6, 10]))
    kernels = Factors(left, right, torch.Size([3, 5, 2, 2]), "separable")
    states: list[Mapping[str, Tensor | Code]] = []
    for dtype in DTYPES:
        states.append({f"dense.{dtype}": torch.arange(5).to(dtype)})
    for dtype in CODED:
        sparse = (i * (i % 7 == 0)).to(dtype)
        shared = (i % 4 * (i % 3 == 0)).to(dtype)
        tied = {f"shared.{dtype}": shared, f"tied.{dtype}": shared}
        states.append({f"sparse.{dtype}": sparse} | tied)
    states += [
        {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "zeros": torch.zeros(20, 30)},
        {"levels": many.to(torch.int16), "rare": (many % 299 == 0).float(), "": torch.ones(70)},
        {
            "integers": scales * (i % 16 - 8),
            "up": scales * (i % 9 * (i % 2)),
            "blocks": wide.view(3, 64),
        },
        {"conv": (i % 5 * (i % 2)).float().view(3, 2, 5, 2), "tall": (i % 5).double().view(60, 1)},
        {"sum": Sum(dense, few), "product": product},
        {"kernels": kernels, "nested": Sum(Sum(few, product), few)},
        {},
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        return tuple(
            path.read_bytes()
            for coder in CODERS
            for state in states
            if save(path, {f"{coder}.{name}": tensor for name, tensor in state.items()}, coder)
        )


# -------------------------------------------------------------------------------------- forgery


class Parts(NamedTuple):
    """A file taken apart; its directory is inflated."""

    head: bytes
    payload: bytes
    directory: bytes


def take_apart(file: bytes) -> Parts | None:
    """The parts of a file, or None if its footer or its directory is broken."""
    if len(file) < HEADER.size + FOOTER.size:
        return None
    length, _ = FOOTER.unpack(file[-FOOTER.size :])
    start = len(file) - FOOTER.size - length
    if start < HEADER.size:
        return None
    try:
        directory = inflate(file[start : -FOOTER.size])
    except ValueError:
        return None
    return Parts(file[: HEADER.size], file[HEADER.size : start], directory)


def put_together(parts: Parts) -> bytes:
    """The file of these parts. The directory's length and the checksum are right.

    >>> file = seeds()[0]
    >>> put_together(take_apart(file)) == file
    True
    """
    packed = deflate(parts.directory)
    body = parts.head + parts.payload + packed
    return summed(body + len(packed).to_bytes(4, "little"))


def summed(file: bytes) -> bytes:
    """The file with its checksum at the end."""
    return file + zlib.crc32(file).to_bytes(4, "little")


def forge(coder: str, found: Sequence[Entry], payload: bytes) -> bytes:
    """A file of this coder, these entries and these streams, whether or not they fit.

    >>> take_apart(forge("ans", [], b"streams"))
    Parts(head=b'FSML\\x03\\x01', payload=b'streams', directory=b'\\x00')
    """
    head = HEADER.pack(MAGIC, VERSION, CODER_NAMES.index(coder))
    return put_together(Parts(head, payload, pack(found)))


def mutate(file: bytes, dice: Random) -> bytes:
    """A hostile file made from an honest one. Most have a length and a checksum that are right."""
    if dice.randrange(4):
        file = dice.choice(seeds())  # most damage is done to honest files
    parts = take_apart(file)
    if parts is None or dice.randrange(8) == 0:
        cut = dice.randint(0, len(file))
        end = dice.choice(seeds())[cut:]
        made = dice.choice((edit(file, dice), file[:cut], file[:cut] + end))
        return dice.choice((made, summed(made[:-4])))
    return put_together(dice.choice((damage, damage, claim, claim, splice))(parts, dice))


def number(dice: Random) -> int:
    """Small, or about a power of two, up to what ten bytes of LEB128 hold."""
    power = 2 ** dice.choice((8, 16, 20, dice.randint(1, 70)))
    return dice.choice((dice.randrange(9), dice.randrange(300), power - dice.randint(0, 1)))


def edit(data: bytes, dice: Random) -> bytes:
    """Up to four places overwritten, removed, repeated, or filled with a number."""
    for _ in range(dice.randint(1, 4)):
        start = dice.randint(0, len(data))
        end = start + dice.choice((0, 1, 2, 9, 99))
        noise = dice.randbytes(dice.choice((1, end - start)))
        piece = dice.choice((noise, b"", 2 * data[start:end], varint(number(dice))))
        data = data[:start] + piece + data[end:]
    return data


def damage(parts: Parts, dice: Random) -> Parts:
    """An edited header, payload or directory. Payloads keep their length, or none would be read."""
    field = dice.choice(("head", "payload", "payload", "payload", "directory", "directory"))
    whole = getattr(parts, field)
    part = edit(whole, dice)
    if field != "directory":
        part = part[: len(whole)].ljust(len(whole), b"\0")
    return parts._replace(**{field: part})


def claim(parts: Parts, dice: Random) -> Parts:
    """An entry that promises something else, instead of an honest one or next to it."""
    try:
        found = unpack(parts.directory)
    except ValueError:
        return damage(parts, dice)
    k = dice.randint(0, len(found))
    entry = (found or [Entry("", (), torch.bool, "dense")])[k - 1]
    claims: dict[str, Any] = {
        "name": dice.choice(("", "w" * (number(dice) % 2000), "\x1b[31m\n")),
        "shape": tuple(number(dice) for _ in range(dice.choice((0, 1, 2, 3, 70)))),
        "dtype": dice.choice(DTYPES),
        "storage": dice.choice(DTYPES),
        "kind": dice.choice(KINDS[:-2]),  # see composed() for sums and products
        "floats": number(dice),
        "positions": number(dice),
        "values": number(dice),
        "alias": number(dice),
        "bounds": (number(dice), number(dice)),
        "blocks": tuple(number(dice) for _ in entry.shape),
        "form": dice.choice(FORMS),
        "padding": number(dice),
    }
    made = dice.sample([*claims], dice.randint(1, 3))
    entry = replace(entry, **{"name": f"{entry.name}2"} | {field: claims[field] for field in made})
    for _ in range(dice.choice((0, 0, 0, 1, 2, 20))):
        entry = composed(entry, dice)
    if dice.randrange(2):
        entry = plausible(entry)
    found[k : k + dice.randint(0, 1)] = [entry]
    length = sum(entry.bytes for entry in found)
    payload = parts.payload
    if length < LONGEST:
        payload = payload[:length].ljust(length, dice.randbytes(1))
    return Parts(parts.head, payload, pack(found))


def composed(entry: Entry, dice: Random) -> Entry:
    """The entry as a part of a sum or a product."""
    whole = other = replace(entry, kind="sum", parts=(), padding=dice.choice((0, number(dice))))
    if len(entry.shape) == 2 and dice.randrange(2):
        (rows, columns), rank = entry.shape, number(dice)
        whole = replace(whole, kind="product")
        entry, other = replace(entry, shape=(rows, rank)), replace(other, shape=(rank, columns))
    other = replace(other, kind=dice.choice(KINDS[:3]))
    return replace(whole, parts=(entry, other))


def plausible(entry: Entry) -> Entry:
    """The entry with as many floats and bytes as the reader demands before it decodes."""
    if entry.parts:
        entry = replace(entry, parts=tuple(map(plausible, entry.parts)))
        return replace(entry, padding=max(0, entry.least_bytes - entry.bytes))
    entry = replace(entry, storage=entry.dtype)
    if entry.kind == "dense":
        return replace(entry, floats=entry.numel, positions=0, values=0)
    positions, values = 1 + entry.numel // coding.IN_MASK, 1 + entry.numel // coding.IN_VALUES
    return replace(entry, floats=min(entry.floats, entry.numel), positions=positions, values=values)


def splice(parts: Parts, dice: Random) -> Parts:
    """All entries and streams of two files, under the coder of either."""
    other = take_apart(dice.choice(seeds()))
    if other is None:
        raise RuntimeError("an honest file cannot be opened")
    mine, theirs = parts.directory or b"\0", other.directory
    joined = bytes([mine[0] + theirs[0] & 127]) + mine[1:] + theirs[1:]
    return Parts(dice.choice((parts.head, other.head)), parts.payload + other.payload, joined)


def greedy(length: int) -> Iterator[bytes]:
    """Files of at most so many bytes that promise as much as the reader allows.

    For each coder a mask and values that cost as little as they may; a constant, a deep sum and a
    product that take as much memory or time as they may.
    """
    room, u8 = length - 100, torch.uint8
    noise = Random(0).randbytes(length)
    matrix = np.arange(4096).reshape(64, 64) * 7919 % 257
    for name, coder in CODERS.items():
        mask = (coder.encode(matrix % 2, 2).positions + noise)[:room]
        shape = (64, room * coding.IN_MASK // 64)
        yield forge(name, [Entry("mask", shape, u8, "shared", u8, 1, room)], mask + b"\1")
        values = (coder.encode(matrix % 64 + 1, 65).values + noise)[: room - 64]
        shape = (64, len(values) * coding.IN_VALUES // 64)
        entry = Entry("values", shape, u8, "shared", u8, 64, 0, len(values))
        yield forge(name, [entry], values + bytes(range(64)))

    zeros = bytes(MIN_LIMIT // coding.IN_MATRIX)
    entry = Entry("constant", (MIN_LIMIT,), u8, "shared", u8, 1, len(zeros))
    yield forge(name, [entry], zeros + b"\1")

    half, one = torch.float16, b"\0\x3c"
    side = math.isqrt(MIN_LIMIT // half.itemsize // MAX_DEPTH)
    zeros = bytes(side * side // coding.IN_MATRIX)
    entry = part = Entry("sum", (side, side), half, "shared", half, 1, len(zeros))
    for _ in range(MAX_DEPTH - 1):
        entry = replace(part, kind="sum", parts=(entry, part))
    yield forge(name, [entry], MAX_DEPTH * (zeros + one))

    rows, columns = TERMS_IN_BYTE // 1024, 1024
    part = Entry("product", (rows, room), half, "shared", half, 1)
    parts = part, replace(part, shape=(room, columns))
    entry = Entry("product", (rows, columns), half, "product", parts=parts, padding=room)
    yield forge(name, [entry], 2 * one + bytes(room))
