"""Ablation of a size target: joint choice, metric, bits in the gradient, and training.

    python -m fitsmall.experiments.benchmarks.ablation [--seeds 0 1 2] [--times-smaller 150]
        [--only NAME ...]

LeNet-300-100 trains on MNIST for 8 epochs, and is fine-tuned for as many to a size, each time with
something left out or added. Errors are in percent on 10,000 held-out training images.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.callbacks import (
    Compress,
    GradualPruning,
    SizeTarget,
    WeightSharing,
)
from fitsmall.compressors import compress
from fitsmall.compressors.choices.entropy_constrained import Clustering
from fitsmall.compressors.file.writer import coded_size
from fitsmall.experiments.benchmarks.floors import fitted, lenet300
from fitsmall.experiments.data.images import Mnist

__all__ = ["main"]


class PlainMetric(SizeTarget):
    """A size target to which all weights are equally dear."""

    def _matrices(self, name: str, weight: Tensor) -> tuple[Any, Any]:
        matrix, curvature = super()._matrices(name, weight)
        return matrix, np.ones_like(curvature)


class BitsInGradient(SizeTarget):
    r"""A size target whose optimizer sees the bits of a weight.

    A weight takes :math:`b` bits more than a zero. The hard choice between the two is at
    :math:`\tau = \sqrt{2 \lambda b / F}`; in between they are smoothed,
    :math:`\lambda b |w| / (|w| + \tau)`, and the gradient of that is added.

    Args:
        size: See :class:`SizeTarget`.
        factor: Factor of the gradient.
    """

    def __init__(self, size: float | str, factor: float) -> None:
        super().__init__(size)
        self.factor = factor
        self.found: Mapping[str, Clustering] = {}
        self.pulls: dict[str, tuple[Tensor, Tensor]] = {}

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        super().choose(weights, strength)
        for name in self.clusterings:
            curvature = torch.from_numpy(self._matrices(name, weights[name])[1])
            found = self.found[name]
            zeros, kept = found.rates.positions
            bits = torch.from_numpy(kept - zeros) + found.rates.levels.max()
            cost = self.price * bits.clamp_min(0).float()
            threshold = (2 * cost / curvature).sqrt()
            shape = weights[name].shape
            self.pulls[name] = cost.reshape(shape), threshold.reshape(shape)

    def _cluster(self, weights: Any, names: Any, price: float) -> Any:
        self.found = super()._cluster(weights, names, price)
        return self.found

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        super().before_update(optimizer, parameters, gradient_scale)
        for name in self.pulls.keys() & parameters.keys():
            weight, (cost, threshold) = parameters[name], self.pulls[name]
            assert weight.grad is not None
            slope = cost * threshold / (weight.detach().abs() + threshold).square()
            slope = torch.where(weight == 0, 0, slope * weight.detach().sign())
            weight.grad.add_(slope, alpha=self.factor * gradient_scale)


def _by_hand(target: int, module: Any, seed: int) -> tuple[int, float]:
    """Return bytes and error of pruning and sharing at the sparsity that meets the size."""
    sparsity = 0.95
    while True:
        stages = [
            GradualPruning(sparsity, stop=0.5, include=["*.weight", "*.bias"]),
            WeightSharing(16, start=0.55, codebook_dtype="bfloat16"),
        ]
        found = _fitted(copy.deepcopy(module), seed, stages)
        if found[0] <= target:
            return found
        sparsity += 0.005


def _at_once(target: int, module: Any, data: Mnist) -> Any:
    """Return a copy that is compressed without training."""
    data.prepare_data()
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(4), strict=False)]
    net = copy.deepcopy(module)
    compress(net.net, size=f"{target} B", data=batches)
    return net


def _without_training(target: int, module: Any, seed: int) -> tuple[int, float]:
    data = Mnist(256, 10_000, seed)
    net = _at_once(target, module, data).eval()
    with torch.inference_mode():
        wrong = [net(images).argmax(1) != labels for images, labels in data.val_dataloader()]
    return coded_size(net.state_dict()), 100 * float(torch.cat(wrong).double().mean())


def _one_shot_first(target: int, module: Any, seed: int) -> tuple[int, float]:
    net = _at_once(target, module, Mnist(256, 10_000, seed))
    return _fitted(net, seed, [Compress(f"{target} B")])


def _trained(stage: Callable[[str], pl.Callback], target: int, module: Any, seed: int) -> Any:
    return _fitted(copy.deepcopy(module), seed, [stage(f"{target} B")])


VARIANTS: dict[str, Callable[[int, Any, int], tuple[int, float]]] = {
    "all": partial(_trained, Compress),
    "levels without zeros": partial(_trained, partial(Compress, methods="quantize")),
    "zeros, then levels, by hand": _by_hand,
    "no metric": partial(_trained, PlainMetric),
    "bits in the gradient, 3": partial(_trained, partial(BitsInGradient, factor=3.0)),
    "bits in the gradient, 10": partial(_trained, partial(BitsInGradient, factor=10.0)),
    "no training": _without_training,
    "no training, then all": _one_shot_first,
    "ranks for half of the multiply-adds, too": partial(
        _trained, partial(Compress, flops=0.5, methods=("ranks", "prune", "quantize"))
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--times-smaller", type=float, default=150.0, help="than dense bytes")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "fitsmall"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, list[tuple[int, float]]] = {"dense": [], "dense, trained on": []}
    for seed in options.seeds:
        module = lenet300(seed)
        size, error = _fitted(module, seed, [])
        target = int(sum(t.nbytes for t in module.state_dict().values()) / options.times_smaller)
        results["dense"].append((size, error))
        results["dense, trained on"].append(_fitted(copy.deepcopy(module), seed, []))
        for name in options.only:
            found = VARIANTS[name](target, module, seed)
            print(seed, name, *found, flush=True)
            results.setdefault(name, []).append(found)
    shown = Table("", "bytes", "error, %")
    for name, runs in results.items():
        sizes, errors = [size for size, _ in runs], [error for _, error in runs]
        shown.add_row(name, f"{mean(sizes):,.0f}", f"{mean(errors):.2f} ± {_spread(errors):.2f}")
    Console(width=100).print(shown)


def _fitted(module: Any, seed: int, callbacks: Sequence[pl.Callback]) -> tuple[int, float]:
    """Train a module; return the bytes of its file, and its error on held-out images."""
    size, error, _ = fitted(module, seed, callbacks)
    return size, 100 * error


def _spread(values: Collection[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
