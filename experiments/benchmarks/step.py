"""Time of a training step with each method, against plain Lightning.

python -m fitsmall.experiments.benchmarks.step [--model lenet300] [--precision 32-true]
    [--rounds 15] [--accelerator cpu] [--compile] [--methods Pruning]

One process trains the plain network and the compressed ones in turns, round after round, so that a
busy machine slows all alike. The table shows the median over rounds of the ratio within a round.
Methods act in every step and refresh their choice every 100 steps, about as often as in the recipe.
Quantization begins with the second step.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fitsmall.callbacks import (
    ChannelPruning,
    GradualPruning,
    QuantizationAwareTraining,
    RankLearning,
    WeightSharing,
)
from fitsmall.experiments.models.networks import LeNet300, ResNet

__all__ = ["PlainModule", "RepeatedBatch", "main", "step_seconds"]

# Network, shape of a batch, and number of steps to measure.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "lenet300": (LeNet300, (256, 1, 28, 28), 400),
    "resnet20": (ResNet, (128, 3, 32, 32), 15),
}
WARMUP = 0.25  # of the steps that are measured


class PlainModule(pl.LightningModule):
    """A user's module, with cross-entropy and Adam."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3, fused=True)


class RepeatedBatch:
    """A loader that repeats one random batch, so that loading takes no time."""

    def __init__(self, steps: int, shape: tuple[int, ...]) -> None:
        self.steps = steps
        self.batch = (torch.rand(shape), torch.randint(10, shape[:1]))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch for _ in range(self.steps))


class EpochTimer(pl.Callback):
    """Time an epoch after its first steps, which allocate memory."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.start = self.seconds = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == self.warmup - 1:
            self.start = _now()

    def on_train_epoch_end(self, *args: Any) -> None:
        self.seconds = _now() - self.start


def _now() -> float:
    """Seconds on a clock, after all kernels that were launched have finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


METHODS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain Lightning": list,
    "GradualPruning": lambda: [GradualPruning(0.95, stop=1.0, every=100)],
    "WeightSharing": lambda: [WeightSharing(16, start=0.0, stop=1.0, every=100)],
    "GradualPruning, WeightSharing": lambda: [
        GradualPruning(0.95, stop=1.0, every=100),
        WeightSharing(16, start=0.0, stop=1.0, every=100),
    ],
    "QuantizationAwareTraining": lambda: [
        QuantizationAwareTraining(4, 4, start=0.0, stop=1.0, every=100)
    ],
    "QuantizationAwareTraining, weight_scale='learned'": lambda: [
        QuantizationAwareTraining(4, 4, "learned", start=0.0, stop=1.0, every=100)
    ],
    "QuantizationAwareTraining, activation_scale='range'": lambda: [
        QuantizationAwareTraining(4, 4, activation_scale="range", start=0.0, stop=1.0, every=100)
    ],
    "RankLearning": lambda: [RankLearning(keep_flops=0.5, stop=1.0, every=100)],
    "ChannelPruning": lambda: [ChannelPruning(keep_flops=0.5, start=0.0, stop=1.0, every=100)],
    "Lightning's ModelPruning": lambda: [
        ModelPruning("l1_unstructured", amount=0.95, use_global_unstructured=True)
    ],
}


def step_seconds(
    callbacks: list[pl.Callback],
    model: str,
    precision: Any = "32-true",
    accelerator: str = "cpu",
    compiled: bool = False,
) -> float:
    """Mean duration of a training step with some callbacks, in seconds.

    Args:
        callbacks: Callbacks of the trainer.
        model: Key of :data:`MODELS`.
        precision: Precision of the trainer.
        accelerator: Accelerator of the trainer.
        compiled: Whether the network is compiled.
    """
    # The second epoch is timed, since ModelPruning makes its masks at the end of the first.
    make, shape, steps = MODELS[model]
    warmup = int(WARMUP * steps)
    timer = EpochTimer(warmup)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=accelerator,
        precision=precision,
        callbacks=[*callbacks, timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    net = make()
    if compiled:
        net.compile()
    trainer.fit(PlainModule(net), RepeatedBatch(warmup + steps, shape))
    return timer.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="lenet300")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--methods", default="", help="only methods whose name has this part")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    where = options.model, options.precision, options.accelerator, options.compile
    plain, *others = METHODS
    names = [plain, *(name for name in others if options.methods in name)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            seconds[name].append(step_seconds(METHODS[name](), *where))
    title = f"{options.model}, {options.precision}, {options.accelerator}"
    title += f"{', compiled' if options.compile else ''}, {options.threads} threads"
    table = Table(title=title)
    for column in ("callbacks", "ms a step", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column == "callbacks" else "right")
    for name, times in seconds.items():
        ratios = [mine / its for mine, its in zip(times, seconds[plain], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = f"{1000 * statistics.median(times):.3f}"
        table.add_row(name, milliseconds, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
