"""Peak memory of training with each method, against plain Lightning.

python -m fitsmall.experiments.benchmarks.memory [--model mlp] [--precision 32-true]
    [--methods Pruning]

Each training runs in its own process, on a perceptron, whose memory is mostly weights, or on
ResNet-20, whose memory is mostly activations. The table shows the median peak of five trainings
(Linux's VmHWM), its ratio to that of plain Lightning, and the difference in copies of the weights.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from statistics import median
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table
from torch import nn

from fitsmall.callbacks import EMA, GradualPruning, QuantizationAwareTraining, WeightSharing
from fitsmall.experiments.benchmarks.step import PlainModule, RepeatedBatch
from fitsmall.experiments.cli.process_memory import peak_memory
from fitsmall.experiments.models.networks import MLP, ResNet

__all__ = ["main"]

WIDTHS = (*[2048] * 9, 10)
REPEATS = 5

# Network, shape of a batch, and steps.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: MLP(WIDTHS), (32, WIDTHS[0]), 30),
    "resnet20": (ResNet, (128, 3, 32, 32), 10),
}

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain Lightning": list,
    "GradualPruning": lambda: [GradualPruning(0.9, every=5)],
    "GradualPruning by hessian": lambda: [GradualPruning(0.9, "hessian", every=5)],
    "WeightSharing": lambda: [WeightSharing(16, start=0.2, stop=0.8, every=5)],
    "GradualPruning, WeightSharing": lambda: [
        GradualPruning(0.9, every=5),
        WeightSharing(16, every=5),
    ],
    "QuantizationAwareTraining": lambda: [
        QuantizationAwareTraining(4, 4, "learned", start=0.1, stop=1.0, every=5)
    ],
    "Lightning's EMA": lambda: [pl.callbacks.EMAWeightAveraging()],
    "GradualPruning, EMA": lambda: [GradualPruning(0.9, every=5), EMA()],
}


def train(name: str, model: str, precision: Any) -> tuple[int, int]:
    """Train a model with a method; peak memory and size of the weights, in bytes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        callbacks=METHODS[name](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    make, shape, steps = MODELS[model]
    module = PlainModule(make())
    trainer.fit(module, RepeatedBatch(steps, shape))
    return peak_memory(), 4 * sum(p.numel() for p in module.parameters() if p.dim() > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--methods", default="", help="only methods whose name has this part")
    options = parser.parse_args()
    table = Table(title=f"{options.model}, {options.precision}")
    for column in ("callbacks", "peak MB", "ratio", "extra copies of the weights"):
        table.add_column(column, justify="left" if column == "callbacks" else "right")
    # The allocator returns freed memory at once, so that its caches are not measured.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    first, *others = METHODS
    plain = 0
    for name in (first, *(name for name in others if options.methods in name)):
        jobs = [(name, options.model, options.precision)] * REPEATS
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks, (weights, *_) = zip(*pool.starmap(train, jobs, chunksize=1), strict=True)
        highest = int(median(peaks))
        plain = plain or highest
        extra = f"{(highest - plain) / weights:.2f}"
        table.add_row(name, f"{highest / 1e6:.0f}", f"{highest / plain:.2f}", extra)
    Console().print(table)


if __name__ == "__main__":
    main()
