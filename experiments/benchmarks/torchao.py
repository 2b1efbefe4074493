"""Quantization-aware training against torchao's, on LeNet-300-100: test error and time of a step.

python -m fitsmall.experiments.benchmarks.torchao [--bits 4] [--epochs 15] [--seeds 3] [--rounds 11]

Both train the same network from the same seeds on the same batches: in float32 for the first 30 %,
then with weights of ``--bits`` and a scale for each output channel, and inputs of 8 bits. torchao's
recipe for linear layers computes an input scale for each example; ours learns one for each layer.
Test errors are those of the rounded networks. Trainers are timed in turns, and the table shows the
median ratio within a round. It needs torchao (``pip install torchao``).
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table

from fitsmall.callbacks import QuantizationAwareTraining
from fitsmall.experiments.benchmarks.step import step_seconds
from fitsmall.experiments.data.images import Mnist
from fitsmall.experiments.models.classifier import Classifier
from fitsmall.experiments.models.networks import LeNet300

__all__ = ["Torchao", "main"]


class Torchao(pl.Callback):
    """torchao's quantization-aware training of linear layers.

    Args:
        bits: Bits of the weights.
        start: Fraction of training after which it begins.
    """

    def __init__(self, bits: int, start: float) -> None:
        self.bits, self.start = bits, start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        if stage == "fit":
            weights = IntxFakeQuantizeConfig(getattr(torch, f"int{self.bits}"), "per_channel")
            inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
            config = QATConfig(activation_config=inputs, weight_config=weights, step="prepare")
            quantize_(pl_module, config)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        is_active = trainer.global_step >= self.start * trainer.estimated_stepping_batches
        for name, module in pl_module.named_modules():
            if name.endswith("_fake_quantizer"):
                module.enabled = is_active


def _test_error(callbacks: list[pl.Callback], epochs: int, seed: int) -> float:
    """Test error in percent."""
    pl.seed_everything(seed, verbose=False)
    model = Classifier(LeNet300(), partial(torch.optim.Adam, lr=2e-3, fused=True))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Mnist(batch_size=256, held_out=5000, seed=seed)
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return 100 * metrics["test/error"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    ours = partial(QuantizationAwareTraining, options.bits, 8)
    methods: dict[str, Callable[[float], list[pl.Callback]]] = {
        "float": lambda start: [],
        "fitsmall": lambda start: [ours(start=start)],
        "fitsmall, learned scales": lambda start: [ours(weight_scale="learned", start=start)],
        "torchao": lambda start: [Torchao(options.bits, start)],
    }
    errors = {
        name: [_test_error(make(0.3), options.epochs, seed) for seed in range(options.seeds)]
        for name, make in methods.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, make in methods.items():
            seconds[name].append(step_seconds(make(0.0), "lenet300"))
    table = Table(title=f"LeNet-300-100, W{options.bits}A8, {options.epochs} epochs of MNIST")
    for column in ("", "test error %", "ms a step", "x float"):
        table.add_column(column, justify="right" if column else "left")
    for name, times in seconds.items():
        ratios = [mine / its for mine, its in zip(times, seconds["float"], strict=True)]
        spread = statistics.stdev(errors[name]) if options.seeds > 1 else 0.0
        table.add_row(
            name,
            f"{statistics.mean(errors[name]):.2f} ± {spread:.2f}",
            f"{1000 * statistics.median(times):.2f}",
            f"{statistics.median(ratios):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
