"""Peak memory of training with each method, against plain Lightning.

python -m pressfit.experiments.bench_memory

Each training runs in a process of its own, on a network whose weights outweigh all else. What
counts is how much higher its peak (Linux's VmHWM) is than that of plain Lightning, in copies of the
weights that are compressed; the median of five trainings.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from statistics import median

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from pressfit.callbacks import EMA, GradualPruning, WeightSharing
from pressfit.experiments.bench_large import peak
from pressfit.experiments.bench_step import Plain, Repeat
from pressfit.experiments.models import MLP

__all__ = ["main"]

WIDTHS = (*[2048] * 9, 10)
STEPS, REPEATS = 30, 5

METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain Lightning": list,
    "GradualPruning": lambda: [GradualPruning(0.9, every=5)],
    "GradualPruning by hessian": lambda: [GradualPruning(0.9, "hessian", every=5)],
    "WeightSharing": lambda: [WeightSharing(16, start=0.2, stop=0.8, every=5)],
    "GradualPruning, WeightSharing": lambda: [
        GradualPruning(0.9, every=5),
        WeightSharing(16, every=5),
    ],
    "Lightning's EMA": lambda: [pl.callbacks.EMAWeightAveraging()],
    "GradualPruning, EMA": lambda: [GradualPruning(0.9, every=5), EMA()],
}


def train(name: str) -> tuple[int, int]:
    """Bytes at the peak, and of the weights."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=METHODS[name](),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Plain(MLP(WIDTHS))
    trainer.fit(module, Repeat(STEPS, (32, WIDTHS[0])))
    return peak(), 4 * sum(p.numel() for p in module.parameters() if p.dim() > 1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    table = Table(title=f"{len(WIDTHS) - 1} layers, Adam, {STEPS} steps")
    for column in ("callbacks", "peak MB", "ratio", "extra copies of the weights"):
        table.add_column(column, justify="left" if column == "callbacks" else "right")
    # What is freed goes back at once: or else the allocator's own habits are measured.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    plain = 0
    for name in METHODS:
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks, (weights, *_) = zip(*pool.map(train, [name] * REPEATS, chunksize=1), strict=True)
        highest = int(median(peaks))
        plain = plain or highest
        extra = f"{(highest - plain) / weights:.2f}"
        table.add_row(name, f"{highest / 1e6:.0f}", f"{highest / plain:.2f}", extra)
    Console().print(table)


if __name__ == "__main__":
    main()
