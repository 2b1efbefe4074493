"""Memory and time of writing and reading the file of a large model, against those of a small one.

python -m fitsmall.experiments.benchmarks.large [--millions 500]

The models have 90 % zeros and 16 clusters. Each size runs in its own process. Memory is the peak of
the process (Linux's VmHWM) above that of the model itself.
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
from fitsmall.experiments.cli.process_memory import peak_memory, reset_peak_memory

__all__ = ["CodingCost", "main", "measure_coding"]

TENSORS = 10


class CodingCost(NamedTuple):
    """Seconds of encoding and decoding, bytes of extra memory of both, and bytes of the largest
    tensor and of the file."""

    encode_seconds: float
    decode_seconds: float
    encode_memory: int
    decode_memory: int
    largest: int
    file: int


def random_model(millions: float) -> dict[str, Tensor]:
    """Ten equal matrices of independent weights: 90 % zeros, the others of 16 values.

    Args:
        millions: Parameters of all matrices together, in millions.
    """
    generator = torch.Generator().manual_seed(0)
    rows = round((millions * 1e6 / TENSORS / 2) ** 0.5)
    codebook = torch.randn(16, generator=generator)
    tensors = {}
    for number in range(TENSORS):
        tensors[f"layers.{number}.weight"] = torch.zeros(rows, 2 * rows)
        # Row by row, so that temporary tensors stay small.
        for row in tensors[f"layers.{number}.weight"]:
            kept = torch.rand(row.shape, generator=generator) < 0.1
            index = torch.randint(16, (int(kept.sum()),), generator=generator)
            row[kept] = codebook[index]
    return tensors


def measure_coding(millions: float) -> CodingCost:
    """Encode and decode a model of so many million parameters.

    Raises:
        RuntimeError: The decoded model differs from the encoded one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fitsmall"
        save(path, random_model(0.01))  # the first call compiles
        list(read(path))
        tensors = random_model(millions)
        before = reset_peak_memory()
        start = time.perf_counter()
        size = save(path, tensors)
        encode_seconds = time.perf_counter() - start
        encode_memory = peak_memory() - before
        before = reset_peak_memory()
        start = time.perf_counter()
        equal = []
        for entry, tensor in read(path):
            equal.append(same_bits(tensors[entry.name], tensor))
            del tensor  # before the next one is read
        decode_seconds = time.perf_counter() - start
        decode_memory = peak_memory() - before
    if len(equal) != TENSORS or not all(equal):
        raise RuntimeError("the file does not restore the model")
    largest = max(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return CodingCost(encode_seconds, decode_seconds, encode_memory, decode_memory, largest, size)


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
            cost = pool.submit(measure_coding, millions).result()
        table.add_row(
            f"{millions:g}",
            f"{cost.file / 1e6:.1f}",
            f"{cost.encode_seconds:.1f}",
            f"{cost.decode_seconds:.1f}",
            f"{cost.encode_seconds / millions:.3f}",
            f"{cost.decode_seconds / millions:.3f}",
            *(
                f"{memory / 1e6:,.0f} MB, {memory / cost.largest:.2f} x largest tensor"
                for memory in (cost.encode_memory, cost.decode_memory)
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
