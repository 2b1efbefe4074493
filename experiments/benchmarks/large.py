"""Memory and time of coding a large model, against a small one: 90 % zeros, 16 clusters.

python -m fitsmall.experiments.benchmarks.large [--millions 500]

Each size runs in a process of its own. Extra memory is what the process needs beyond the model
itself, at its highest (Linux's VmHWM).
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fitsmall.compressors import read, same_bits, save

__all__ = ["Measured", "main", "measure", "peak", "reset_peak"]

TENSORS = 10


class Measured(NamedTuple):
    """Seconds; bytes of memory beyond the model; bytes of the largest tensor and of the file."""

    encode: float
    decode: float
    encode_memory: int
    decode_memory: int
    largest: int
    file: int


def model(millions: float) -> dict[str, Tensor]:
    """Ten equal matrices of independent weights, 90 % of them zero, the others of 16 values."""
    generator = torch.Generator().manual_seed(0)
    rows = round((millions * 1e6 / TENSORS / 2) ** 0.5)
    codebook = torch.randn(16, generator=generator)
    tensors = {}
    for number in range(TENSORS):
        tensors[f"layers.{number}.weight"] = torch.zeros(rows, 2 * rows)
        # Row by row, so that making the model takes no memory of its own.
        for row in tensors[f"layers.{number}.weight"]:
            kept = torch.rand(row.shape, generator=generator) < 0.1
            index = torch.randint(16, (int(kept.sum()),), generator=generator)
            row[kept] = codebook[index]
    return tensors


def measure(millions: float) -> Measured:
    """Code and decode a model of so many million parameters, and check what comes back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fitsmall"
        warm = model(0.01)
        save(path, warm)  # compiles
        list(read(path))
        tensors = model(millions)
        before = reset_peak()
        start = time.perf_counter()
        size = save(path, tensors)
        encoded = time.perf_counter()
        encode_memory = peak() - before
        before = reset_peak()
        middle = time.perf_counter()
        equal = []
        for entry, tensor in read(path):
            equal.append(same_bits(tensors[entry.name], tensor))
            del tensor  # one at a time
        end = time.perf_counter()
        decode_memory = peak() - before
    if len(equal) != TENSORS or not all(equal):
        raise RuntimeError("the file does not restore the model")
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Measured(encoded - start, end - middle, encode_memory, decode_memory, largest, size)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def reset_peak() -> int:
    """Forget the peak so far, and return the bytes of memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of memory since :func:`reset_peak`."""
    return _status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=500)
    sizes = (5.0, parser.parse_args().millions)
    table = Table(title="save and read, coder: context")
    columns = ("million parameters", "file MB", "encode s", "decode s", "encode s/M", "decode s/M")
    for column in (*columns, "encode memory", "decode memory"):
        table.add_column(column, justify="right")
    for millions in sizes:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(measure, millions).result()
        table.add_row(
            f"{millions:g}",
            f"{found.file / 1e6:.1f}",
            f"{found.encode:.1f}",
            f"{found.decode:.1f}",
            f"{found.encode / millions:.3f}",
            f"{found.decode / millions:.3f}",
            *(
                f"{memory / 1e6:,.0f} MB, {memory / found.largest:.2f} x largest tensor"
                for memory in (found.encode_memory, found.decode_memory)
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
