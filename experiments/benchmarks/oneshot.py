"""One-shot compression of trained networks, without data and fitted to them.

    python -m fitsmall.experiments.benchmarks.oneshot [--networks cnn transformer] [--seeds 0 1 2]

It trains a small CNN on CIFAR-10 and a small transformer on bytes of Python's standard library, for
each seed, and compresses each to 70 % zeros and 16 values a tensor. Trained networks are kept in
``--folder``. Data for fitting are training batches; everything is measured on held-out data, and
with ``--test`` on test data.
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich import print
from rich.table import Table
from torch import nn

from fitsmall.compressors import KMeans, TopK, compress, restore, save
from fitsmall.experiments.data.images import Cifar10
from fitsmall.experiments.data.text import StandardLibrary
from fitsmall.experiments.models.classifier import Classifier
from fitsmall.experiments.models.language import LanguageModel
from fitsmall.experiments.models.networks import CNN
from fitsmall.experiments.models.transformer import Transformer

__all__ = ["main"]

_QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}

PLAN = TopK(0.7) | KMeans(16)


def cnn(seed: int) -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """A CNN, its data, and the length of its training."""
    adam = partial(torch.optim.Adam, lr=2e-3)
    return Classifier(CNN(3, 32, channels=3), adam), Cifar10(128, 5000, seed), {"max_epochs": 5}


def transformer(seed: int) -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """A byte transformer, its data, and the length of its training."""
    adam = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    net = Transformer(width=64, depth=3)
    module = LanguageModel(net, adam, warmup=0.05, floor=0.05)
    return module, StandardLibrary(seed=seed), {"max_steps": 800}


NETWORKS: dict[str, Callable[[int], Any]] = {"cnn": cnn, "transformer": transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/oneshot"))
    parser.add_argument("--test", action="store_true", help="measure on test data")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.folder.mkdir(parents=True, exist_ok=True)
    table = Table(title="One-shot: 70 % zeros, 16 values a tensor", show_edge=False)
    for column in ("network", "measure", "dense", "without data", "with data", "seconds"):
        table.add_column(column, justify="left" if column in ("network", "measure") else "right")
    for name in options.networks:
        results = [_measure(name, seed, options.folder, options.test) for seed in options.seeds]
        measure = "error, %" if name == "cnn" else "bits per byte"
        table.add_row(name, measure, *map(_mean, zip(*results, strict=True)))
    print(table)


def _measure(name: str, seed: int, folder: Path, test: bool) -> list[float]:
    """Return the errors of a network, dense and compressed in two ways, and the seconds of the
    second one."""
    pl.seed_everything(seed, verbose=False)
    module, data, length = NETWORKS[name](seed)
    file = folder / f"{name}-{seed}.fitsmall"
    if file.exists():
        data.setup("fit")
        restore(module, file)
    else:
        pl.Trainer(**_QUIET, **length, limit_val_batches=0).fit(module, datamodule=data)
        save(file, module.state_dict())
    loader = data.test_dataloader() if test else data.val_dataloader()

    def error_of(net: nn.Module) -> float:
        module.net = net
        (found,) = pl.Trainer(**_QUIET).validate(module, loader, verbose=False)
        return next(iter(found.values())) * (100 if name == "cnn" else 1)

    dense, plain, fitted = (copy.deepcopy(module.net) for _ in range(3))
    compress(plain, PLAN)
    inputs = [batch[:, :-1] if name == "transformer" else batch for batch in _some(data)]
    begin = time.perf_counter()
    compress(fitted, PLAN, data=inputs)
    seconds = time.perf_counter() - begin
    return [error_of(dense), error_of(plain), error_of(fitted), seconds]


def _some(data: Any) -> list[Any]:
    """Training batches with 1,024 examples."""
    batches, examples = [], 0
    for batch in data.train_dataloader():
        batches.append(batch)
        examples += len(batch[0]) if isinstance(batch, tuple) else len(batch)
        if examples >= 1024:
            break
    return batches


def _mean(values: tuple[float, ...]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()
