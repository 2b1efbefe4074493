"""Speed of networks and layers whose zeros are skipped, against dense ones in torch and OpenVINO.

    python -m fitsmall.experiments.benchmarks.sparse [--parts networks linear calls convolutions]

All rivals of a row take turns in one process, in an order that rotates. A ratio is the median over
rounds and seeds of ratios within a round, with the range of the medians of seeds. The perceptron is
pruned while it trains on digits. The transformer, which decodes a byte of each text, and the layers
have zeros where random weights are small, single ones or in blocks of 4 x 4: speed depends on where
zeros lie and on nothing else.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from rich import print
from rich.table import Table
from torch import Tensor, nn

from fitsmall.callbacks import GradualPruning
from fitsmall.compressors import Block, Structure, TopK, Unstructured
from fitsmall.compressors.kernels.layers import SparseLinear
from fitsmall.compressors.timing import interleaved
from fitsmall.experiments.cli.sparse_bench import DENSE, FLOAT, INTEGER, Comparison, compare
from fitsmall.experiments.data.images import Digits
from fitsmall.experiments.models.classifier import Classifier
from fitsmall.experiments.models.networks import MLP
from fitsmall.experiments.models.transformer import Transformer

__all__ = ["main"]

STRUCTURES: dict[str, Structure] = {"single": Unstructured(), "4x4": Block(4, 4)}

# Convolutions of residual networks: channels, outputs, sides of a kernel and of an image.
CONVOLUTIONS = [(64, 64, 3, 32), (128, 128, 3, 16), (256, 256, 3, 8), (256, 256, 1, 16)]

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def mlp(seed: int, structure: Structure) -> tuple[nn.Module, Tensor, str]:
    """A perceptron of four layers that reads digits, pruned as it trains."""
    data = Digits(64, 270, seed)
    module = Classifier(MLP([64, 1024, 1024, 1024, 10]), partial(torch.optim.Adam, lr=1e-3))
    pruning = GradualPruning(0.95, structure=structure)
    trainer = pl.Trainer(max_epochs=30, callbacks=[pruning], **_QUIET)
    trainer.fit(module, data)
    (found,) = trainer.validate(module, data, verbose=False)
    return module.net, torch.rand(32, 1, 8, 8), f"{100 * found['val/error']:.1f} % error"


def transformer(seed: int, structure: Structure) -> tuple[nn.Module, Tensor, str]:
    """A language model on bytes for one byte of each of 32 texts, untrained."""
    net = Transformer(width=512, depth=4)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = TopK(0.95, structure=structure).project(layer.weight.data)
    return net, torch.randint(256, (32, 1)), "untrained"


NETWORKS: dict[str, Callable[[int, Structure], tuple[nn.Module, Tensor, str]]] = {
    "mlp": mlp,
    "transformer": transformer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {
        "networks": _networks,
        "linear": _linear,
        "calls": _calls,
        "convolutions": _convolutions,
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for part in options.parts:
        parts[part](options)


def _networks(options: argparse.Namespace) -> None:
    table = _table("95 % zeros, batch: 32", "network", "zeros in", "quality")
    for name in options.networks:
        for kind, structure in STRUCTURES.items():
            found, qualities = [], []
            for seed in options.seeds:
                torch.manual_seed(seed)
                net, inputs, quality = NETWORKS[name](seed, structure)
                found.append(compare(net.eval(), inputs, options.threads, options.rounds))
                qualities.append(quality)
            print(str(found[0].choices))
            table.add_row(name, kind, ", ".join(qualities), *_cells(found))
    print(table)


def _linear(options: argparse.Namespace) -> None:
    table = _table("Linear 1024 x 1024", "batch", "zeros", "zeros in")
    for batch in options.batches:
        for zeros in options.zeros:
            for kind in STRUCTURES:
                found = []
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    net = _pruned(nn.Linear(1024, 1024), zeros, kind)
                    inputs = torch.randn(batch, 1024)
                    found.append(compare(net, inputs, options.threads, options.rounds))
                table.add_row(str(batch), f"{zeros:.0%}", kind, *_cells(found))
    print(table)


def _calls(options: argparse.Namespace) -> None:
    """Torch's own kernels, and those that `accelerate` chooses from, without a choice."""
    table = Table(title="Linear 1024 x 1024, times as fast as dense", show_edge=False)
    rows = []
    for batch in options.batches:
        for zeros in options.zeros:
            for kind in STRUCTURES:
                torch.manual_seed(0)
                layer, inputs = (
                    _pruned(nn.Linear(1024, 1024), zeros, kind),
                    torch.randn(batch, 1024),
                )
                weight, bias = layer.get_parameter("weight").detach(), layer.get_parameter("bias")
                csr, bsr = weight.to_sparse_csr(), weight.to_sparse_bsr((4, 4))
                column = bias.detach()[:, None]
                runs: dict[str, Callable[[], object]] = {
                    "dense": partial(layer, inputs),
                    "F.linear(x, csr)": partial(nn.functional.linear, inputs, csr, bias),
                    "addmm(bias, csr, x.T)": partial(_addmm, column, csr, inputs),
                    "addmm(bias, bsr, x.T)": partial(_addmm, column, bsr, inputs),
                    "CSR": partial(SparseLinear(layer, 1), inputs),
                    "BSR 4x1": partial(SparseLinear(layer, 4), inputs),
                }
                with torch.no_grad():
                    seconds = interleaved(runs, options.rounds)
                dense = seconds.pop("dense")
                ratios = (
                    statistics.median(a / b for a, b in zip(dense, mine, strict=True))
                    for mine in seconds.values()
                )
                rows.append((str(batch), f"{zeros:.0%}", kind, *(f"{r:.2f}" for r in ratios)))
    for name in ("batch", "zeros", "zeros in", *seconds):
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    print(table)


def _addmm(bias: Tensor, weight: Tensor, inputs: Tensor) -> Tensor:
    return torch.addmm(bias, weight, inputs.T).T.contiguous()


def _convolutions(options: argparse.Namespace) -> None:
    table = _table("Convolutions, batch: 8", "convolution", "zeros", "zeros in")
    for channels, outputs, kernel, side in CONVOLUTIONS:
        for zeros in options.zeros:
            for kind in STRUCTURES:
                found = []
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)
                    images = torch.randn(8, channels, side, side)
                    net = _pruned(layer, zeros, kind)
                    found.append(compare(net, images, options.threads, options.rounds))
                shape = f"{channels} to {outputs}, {kernel}x{kernel}, {side}x{side}"
                table.add_row(shape, f"{zeros:.0%}", kind, *_cells(found))
    print(table)


def _pruned(layer: nn.Module, zeros: float, kind: str) -> nn.Module:
    """A layer with zeros at random: the largest of random weights survive."""
    weight = layer.get_parameter("weight")
    weight.data = TopK(zeros, structure=STRUCTURES[kind]).project(torch.randn_like(weight))
    return layer.eval()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, show_edge=False)
    for column in (*columns, "kernels", "ms", "x dense", "x OpenVINO", "x int8"):
        table.add_column(column)
    return table


def _cells(found: Sequence[Comparison]) -> list[str]:
    """The kernels, milliseconds of the accelerated module, and ratios to its rivals."""
    kernels = dict.fromkeys(mine.kernel for each in found for mine in each.choices.layers)
    cells = [", ".join(kernels)]
    cells.append(f"{1000 * statistics.median(each.choices.accelerated for each in found):.3f}")
    for rival in (DENSE, FLOAT, INTEGER):
        if any(rival not in each.seconds for each in found):
            cells.append("failed")
            continue
        ratios = [each.ratios(rival) for each in found]
        middles = [statistics.median(mine) for mine in ratios]
        middle = statistics.median(r for mine in ratios for r in mine)
        cells.append(f"{middle:.2f} ({min(middles):.2f} to {max(middles):.2f})")
    return cells


if __name__ == "__main__":
    main()
