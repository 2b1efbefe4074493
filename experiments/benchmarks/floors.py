"""A metric to keep: is it kept, and how small is the file next to the best of a grid?

    python -m fitsmall.experiments.benchmarks.floors [--seeds 0 1 2] [--grid 0]

LeNet-300-100 trains on MNIST for 8 epochs, with 10,000 images held out. Each such network is
fine-tuned for 8 epochs with ``Compress(max_drop=0.002)``; and those of the seeds ``--grid`` as well
with each of 40 settings by hand: a sparsity, a number of clusters and a learning rate, the same one
or twice as much. Of these the smallest file counts that keeps the error on held-out images within
the same tolerance. The table has the rise of the error, in points, on held-out images, which chose,
and on test images, which chose nothing.
"""

import argparse
import copy
import itertools
import logging
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from fitsmall.callbacks import Compress, CompressedCheckpoint, GradualPruning, WeightSharing
from fitsmall.experiments.data.images import Mnist
from fitsmall.experiments.models.classifier import Classifier
from fitsmall.experiments.models.networks import LeNet300

__all__ = ["fitted", "lenet300", "main"]

MAX_DROP, EPOCHS, RATE = 0.002, 8, 1e-3

# Settings by hand: sparsities, clusters, and factors of the learning rate.
GRID = [*itertools.product((0.9, 0.94, 0.96, 0.97, 0.98), (4, 6, 8, 16), (1, 2))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--grid", nargs="*", type=int, default=[0])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "fitsmall"):
        logging.getLogger(name).setLevel(logging.ERROR)
    shown = Table(title=f"Within {100 * MAX_DROP:g} points", show_edge=False)
    for column in ("seed", "by", "bytes", "held-out, points", "test, points"):
        shown.add_column(column, justify="left" if column == "by" else "right")
    for seed in sorted({*options.seeds, *options.grid}):
        dense = lenet300(seed)
        before = fitted(dense, seed, [])
        if seed in options.seeds:
            floor = Compress(max_drop=MAX_DROP, dense=before[1])
            found = fitted(copy.deepcopy(dense), seed, [floor])
            shown.add_row(str(seed), "max_drop", f"{found[0]:,}", *_rises(found, before))
            print(seed, "max_drop", *found, flush=True)
        if seed in options.grid:
            runs = []
            for sparsity, clusters, factor in GRID:
                net = copy.deepcopy(dense)
                net.optimizer = partial(torch.optim.Adam, lr=factor * RATE)
                by_hand = [
                    GradualPruning(sparsity, stop=0.5, include=["*.weight", "*.bias"]),
                    WeightSharing(clusters, start=0.55, codebook_dtype="bfloat16"),
                ]
                runs.append(fitted(net, seed, by_hand))
                print(seed, sparsity, clusters, factor, *runs[-1], flush=True)
            for rates in ((1,), (1, 2)):
                of = [run for run, (*_, rate) in zip(runs, GRID, strict=True) if rate in rates]
                best = min(run for run in of if run[1] <= before[1] + MAX_DROP)
                by = "best of {} by hand: {:g} zeros, {} clusters, {} times the rate"
                words = by.format(len(of), *GRID[runs.index(best)])
                shown.add_row(str(seed), words, f"{best[0]:,}", *_rises(best, before))
    Console(width=120).print(shown)


def lenet300(seed: int) -> Classifier:
    """Return an untrained LeNet-300-100."""
    pl.seed_everything(seed, verbose=False)
    return Classifier(LeNet300(), partial(torch.optim.Adam, lr=RATE))


def _rises(found: Sequence[float], before: Sequence[float]) -> list[str]:
    """Return by how many points the errors rose."""
    return [f"{100 * (now - then):+.2f}" for now, then in zip(found[1:], before[1:], strict=True)]


def fitted(
    module: Classifier, seed: int, callbacks: Sequence[pl.Callback]
) -> tuple[int, float, float]:
    """Train a module; return the bytes of its file, and its errors on held-out and test images."""
    pl.seed_everything(seed, verbose=False)
    data = Mnist(256, 10_000, seed)
    with tempfile.TemporaryDirectory() as folder:
        file = CompressedCheckpoint(folder)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            val_check_interval=0.2,
            callbacks=[*callbacks, file],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
        assert file.path is not None
        size = Path(file.path).stat().st_size
    (held_out,) = trainer.validate(module, datamodule=data, verbose=False)
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    return size, held_out["val/error"], test["test/error"]


if __name__ == "__main__":
    main()
