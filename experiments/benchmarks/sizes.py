"""Files of a size without training, next to NNCodec (ISO/IEC 15938-17).

    python -m fitsmall.experiments.benchmarks.sizes FILE ... [--sizes 1/24 1/12] [--test]

Files hold trained ResNet-20s for CIFAR-10, as ``fitsmall train data=cifar10 model=resnet20`` writes
them. Each is fitted to each size on 1,024 training images, and its loss and error are measured on
held-out images, with ``--test`` on test images. Where ``nncodec`` is installed, it codes the same
weights at several steps of its quantizer, with and without steps for each tensor, and the table has
its bytes at the loss of ours, interpolated on a logarithmic scale along its lower hull.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import print
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fitsmall.compressors import compress, restore
from fitsmall.compressors.file.writer import coded_size
from fitsmall.experiments.data.images import Cifar10
from fitsmall.experiments.models.networks import ResNet

__all__ = ["main"]

# Steps of NNCodec's quantizer: the lower, the finer.
STEPS = range(-30, -13, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--sizes", nargs="+", default=["1/24", "1/12"])
    parser.add_argument("--test", action="store_true", help="measure on test images")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with_rival = importlib.util.find_spec("nncodec") is not None
    table = Table(title="ResNet-20 without training", show_edge=False)
    names = ("file", "bytes", "loss", "error, %", "seconds")
    for name in (*names, "NNCodec's bytes at this loss", "fewer, %") if with_rival else names:
        table.add_column(name, justify="left" if name == "file" else "right")
    for path in options.files:
        net = ResNet(20, 16)
        restore(net, path)
        data = Cifar10(128, 5000)
        data.prepare_data()
        data.setup("fit")
        data.setup("test")
        shown = [*(data.test_dataloader() if options.test else data.val_dataloader())]
        rival = _rival(net, shown) if with_rival else []
        table.add_row(str(path), "dense", *map(_short, _measured(net, shown)))
        for size in options.sizes:
            small = copy.deepcopy(net)
            begin = time.perf_counter()
            compress(small, size=size, data=_some(data.train_dataloader()))
            seconds = time.perf_counter() - begin
            taken = coded_size(small.state_dict())
            loss, error = _measured(small, shown)
            row = ["", f"{taken:,}", _short(loss), _short(error), f"{seconds:.0f}"]
            if with_rival:
                other = _at(loss, rival)
                row += [f"{other:,.0f}", f"{100 - 100 * taken / other:.1f}"]
            table.add_row(*row)
        for steps, (size, loss, error) in rival:
            table.add_row(f"NNCodec {steps}", f"{size:,}", _short(loss), _short(error))
    print(table)


def _measured(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the loss, and the error in percent."""
    net.eval()
    with torch.inference_mode():
        logits = torch.cat([net(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    error = 100 * (logits.argmax(1) != labels).double().mean()
    return float(cross_entropy(logits, labels)), float(error)


def _some(batches: Any) -> list[tuple[Tensor, Tensor]]:
    """Return batches with 1,024 images."""
    return [batch for batch, _ in zip(batches, range(8), strict=False)]


def _rival(net: nn.Module, batches: list[Any]) -> list[tuple[str, tuple[int, float, float]]]:
    """Return bytes, loss and error of NNCodec's files."""
    from nncodec import nnc

    floats = {
        name: tensor.numpy()
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point()
    }
    found = []
    for step in STEPS:
        for each in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/net.nnc"
                coded = nnc.compress(
                    dict(floats), file, qp=step, opt_qp=each, return_bitstream=True
                )
            other = copy.deepcopy(net)
            read: Mapping[str, Any] = nnc.decompress(coded)
            tensors = {name: torch.as_tensor(np.array(read[name])) for name in floats}
            other.load_state_dict(tensors, strict=False)
            steps = f"{step}{', of each tensor' if each else ''}"
            found.append((steps, (len(coded), *_measured(other, batches))))
    return found


def _at(loss: float, files: list[tuple[str, tuple[int, float, float]]]) -> float:
    """Return the bytes at a loss, among the files that no other one beats.

    >>> files = [("a", (100, 2.0, 0)), ("b", (400, 1.0, 0)), ("c", (400, 3.0, 0))]
    >>> _at(1.5, files)
    200.0
    """
    best: list[tuple[int, float]] = []
    for size, its, _ in sorted(numbers for _, numbers in files):
        if not best or its < best[-1][1]:
            best.append((size, its))
    for (small, worse), (large, better) in pairwise(best):
        if better <= loss <= worse:
            part = (worse - loss) / (worse - better)
            return float(round(small * (large / small) ** part, 6))
    return float("nan")


def _short(number: float) -> str:
    return f"{number:.4g}"


if __name__ == "__main__":
    main()
