"""Bytes and speed of the lossless coders, next to zlib, lzma, bz2 and the entropy of the symbols,
and bits of masks of N:M structure.

python -m fitsmall.experiments.benchmarks.codec [--ints PATH] [FILE ...]

Compressed files that are named are coded again by each coder.
"""

import argparse
import bz2
import importlib.util
import lzma
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fitsmall.compressors import load, save
from fitsmall.compressors.file.coding import CODERS
from fitsmall.compressors.file.writer import coded_size
from fitsmall.experiments.models.networks import ResNet

DATA = Path(os.environ.get("FITSMALL_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Bytes of a tensor's shape and the lengths of its streams.
OVERHEAD = 12


def to_symbols(matrix: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Symbols of a matrix of integers, 0 for zero, and the codebook of the others.

    >>> symbols, codebook = to_symbols(np.array([[0, -2], [5, -2]]))
    >>> symbols.tolist(), codebook.tolist()
    ([[0, 1], [2, 1]], [-2, 5])
    """
    codebook = np.setdiff1d(matrix, [0])
    symbols = np.where(matrix == 0, 0, np.searchsorted(codebook, matrix) + 1)
    return symbols.astype(np.uint8), codebook


def entropy(symbols: NDArray[Any]) -> float:
    """Bytes of independent symbols of known frequencies: -Σ log₂ p / 8."""
    counts = np.bincount(symbols.ravel())
    counts = counts[counts > 0]
    return float(counts @ np.log2(symbols.size / counts)) / 8


def sizes(path: Path) -> str:
    """Table of bytes to restore every matrix of an npz file of small integers."""
    with np.load(path) as matrices:
        coded = {name: to_symbols(matrix) for name, matrix in matrices.items()}
    rows: dict[str, list[float]] = {
        "entropy": [entropy(symbols) for symbols, _ in coded.values()],
        "zlib -9": [len(zlib.compress(symbols.tobytes(), 9)) for symbols, _ in coded.values()],
        "lzma -9": [
            len(lzma.compress(symbols.tobytes(), preset=9)) for symbols, _ in coded.values()
        ],
        "bz2 -9": [len(bz2.compress(symbols.tobytes(), 9)) for symbols, _ in coded.values()],
    }
    for name, coder in CODERS.items():
        rows[name] = []
        for symbols, codebook in coded.values():
            streams = coder.encode(symbols, len(codebook) + 1)
            rows[name].append(sum(map(len, streams)) + len(codebook) + OVERHEAD)
    lines = ["".join(f"{name:>12}" for name in ("bytes", *coded, "total"))]
    for name, row in rows.items():
        lines.append(f"{name:>12}" + "".join(f"{size:12,.0f}" for size in (*row, sum(row))))
    return "\n".join(lines)


def recoded(file: Path) -> str:
    """Bytes of a compressed file under each coder, and of its tensors under zlib and lzma."""
    tensors = load(file)
    found = {"as written": file.stat().st_size}
    with tempfile.TemporaryDirectory() as folder:
        for name in CODERS:
            found[name] = save(Path(folder) / name, tensors, name)
    raw = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    found |= {"zlib -9": len(zlib.compress(raw, 9)), "lzma -9": len(lzma.compress(raw, preset=9))}
    return f"{file}: " + ", ".join(f"{name} {size:,}" for name, size in found.items())


def speeds(rows: int = 2000, columns: int = 2500, density: float = 0.1, clusters: int = 16) -> str:
    """Table of speeds, in millions of weights per second, for independent weights."""
    rng = np.random.default_rng(0)
    kept = rng.random((rows, columns)) < density
    symbols = (kept * rng.integers(1, clusters + 1, kept.shape)).astype(np.uint8)
    lines = [f"{'speed':>12}{'encode M/s':>12}{'decode M/s':>12}{'bytes':>12}{'entropy':>12}"]
    for name, coder in CODERS.items():
        small = symbols[:100]
        coder.decode(coder.encode(small, clusters + 1), small.shape, clusters + 1)  # compiles
        start = time.perf_counter()
        streams = coder.encode(symbols, clusters + 1)
        middle = time.perf_counter()
        decoded = coder.decode(streams, symbols.shape, clusters + 1)
        end = time.perf_counter()
        if not np.array_equal(decoded, symbols):
            raise RuntimeError(f"{name} is not lossless")
        encode, decode = (symbols.size / t / 1e6 for t in (middle - start, end - middle))
        size = sum(map(len, streams))
        lines.append(f"{name:>12}{encode:12.1f}{decode:12.1f}{size:12,}{entropy(symbols):12,.0f}")
    return "\n".join(lines)


def masks() -> str:
    """Table of bits a weight for random masks of N:M structure along the inputs.

    The least is log₂ C(M, N) / M. Values are of 16 clusters.
    """
    rng = np.random.default_rng(0)
    shapes = ((512, 512), (128, 64, 3, 3))
    lines = ["".join(f"{title:>16}" for title in ("masks", *map(str, shapes), "least"))]
    for kept, size in ((2, 4), (1, 4), (4, 8)):
        row = f"{f'{kept}:{size}':>16}"
        for outputs, inputs, *kernel in shapes:
            scores = rng.random((outputs, inputs // size, size, math.prod(kernel)))
            mask = (scores.argsort(axis=2).argsort(axis=2) < kept).reshape(outputs, -1)
            symbols = (mask * rng.integers(1, 17, mask.shape)).astype(np.uint8)
            positions, _ = CODERS["context"].encode(symbols, 17)
            row += f"{8 * len(positions) / mask.size:16.3f}"
        lines.append(row + f"{math.log2(math.comb(size, kept)) / size:16.3f}")
    return "\n".join(lines)


def writing() -> str:
    """Table of processor seconds and bytes to write a ResNet-56, 56 tensors of 4 bits.

    Values are normal, and scaled by their largest; where ``nncodec`` is installed, it codes the
    same integers.
    """
    rng = np.random.default_rng(0)
    shapes = [p.shape for p in ResNet(56, 16).parameters() if p.dim() > 1]
    lines = ["".join(f"{title:>20}" for title in ("writing a ResNet-56", "seconds", "bytes"))]
    for zeros in (0.0, 0.8):
        integers = {}
        for number, shape in enumerate(shapes):
            values = rng.normal(size=shape)
            values[rng.random(shape) < zeros] = 0
            integers[str(number)] = np.rint(7 * values / np.abs(values).max()).astype(np.int32)
        tensors = {name: torch.from_numpy(i).float() for name, i in integers.items()}
        writers: dict[str, Callable[[], int]] = {"fitsmall": partial(coded_size, tensors)}
        if importlib.util.find_spec("nncodec"):
            writers["NNCodec"] = partial(_coded_by_nncodec, integers)
        for name, write in writers.items():
            write()  # compiles
            start = time.process_time()
            size = write()
            seconds = time.process_time() - start
            lines.append(f"{f'{name}, {zeros:.0%} zeros':>20}{seconds:20.2f}{size:20,}")
    return "\n".join(lines)


def _coded_by_nncodec(integers: dict[str, NDArray[np.int32]]) -> int:
    from nncodec import nnc

    with tempfile.TemporaryDirectory() as folder:
        return len(nnc.compress(dict(integers), f"{folder}/net.nnc", return_bitstream=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ints", type=Path, default=DATA / "codec" / "lenet300_ints.npz")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    options = parser.parse_args()
    for file in options.files:
        print(recoded(file))
    if options.files:
        return
    path = options.ints
    print(sizes(path) if path.exists() else f"no sizes: {path} is not there (set FITSMALL_DATA)")
    print(speeds())
    print(masks())
    print(writing())


if __name__ == "__main__":
    main()
