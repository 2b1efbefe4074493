"""Resume points: trainings resumed from every checkpoint they can write, against ones left alone.

python -m fitsmall.experiments.benchmarks.resume [--points 500] [--seed 0]

Each round draws the settings of a small training: when it validates, accumulates, and compresses.
It saves a checkpoint after every optimizer step, after every validation, and at the end of every
epoch. A second Trainer resumes from each of them. In the end weights, latents, masks, clusters, the
optimizer's state and all random states must be equal bit for bit. Every point that differs is
printed, and the exit status is then 1.
"""

import argparse
import json
import logging
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fitsmall.callbacks import (
    EMA,
    AccuracyGuard,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    ResumableLoader,
    WeightSharing,
)
from fitsmall.experiments.benchmarks.soak import differences

__all__ = ["draw_schedule", "main", "resume_points"]

Settings = dict[str, Any]
BATCHES, BATCH = 6, 8


def draw_schedule(random: random.Random) -> Settings:
    """Draw the settings of a training of a few epochs of 6 batches."""
    every_n_epoch = random.choice([1, 2, 3, None])
    intervals = [1.0, 0.5, 2, 4, 5] if every_n_epoch else [4, 5, 7, 9]
    return {
        "max_epochs": random.randint(3, 4),
        "check_val_every_n_epoch": every_n_epoch,
        "val_check_interval": random.choice(intervals),
        "accumulate_grad_batches": random.choice([1, 1, 2, 3]),
        "num_sanity_val_steps": random.choice([0, 2]),
        "limit_val_batches": random.choice([0, 1, 2, 2]),
        "validation": random.choice(["plain", "shuffled", "resumable"]),
        "estimate": random.random() < 0.5,
        "second": random.choice([None, "share", "quantize"]),
        "average": random.random() < 0.3,
        "guard": random.random() < 0.3,
        "seed": random.randrange(1000),
    }


class _Noisy(pl.LightningModule):
    """A network that draws random numbers in training, and in validation too."""

    def __init__(self, estimate: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, 4))
        self.estimate = estimate

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        logits = self.net(batch[0] + 0.1 * torch.randn_like(batch[0]))
        self.log("val/error", (logits.argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches) if self.estimate else 30
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]


class _Augmented(TensorDataset):
    """Examples with noise, drawn in the training process."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        inputs, label = self.tensors[0][index], self.tensors[1][index]
        return inputs + 0.1 * torch.randn_like(inputs), label


class _SaveAll(pl.Callback):
    """Saves wherever a ModelCheckpoint may save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0
        self.paths: list[Path] = []

    def _save(self, trainer: pl.Trainer, when: str) -> None:
        if trainer.global_step == trainer.estimated_stepping_batches:
            return  # nothing is left to resume
        path = self.folder / f"{len(self.paths):03}-{when}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > self.step:  # gradients between two steps are not saved
            self.step = trainer.global_step
            self._save(trainer, "step")

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        between = ready % trainer.accumulate_grad_batches and ready < BATCHES
        if not trainer.sanity_checking and not between:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")


def _train(settings: Settings, path: Path | None, *more: pl.Callback) -> dict[str, Any]:
    settings = dict(settings)
    seed = settings.pop("seed")
    pl.seed_everything(seed, verbose=False)
    module = _Noisy(settings.pop("estimate"))
    seconds: dict[str | None, list[pl.Callback]] = {
        None: [],
        "share": [WeightSharing(4, start=0.4, stop=0.8)],
        "quantize": [QuantizationAwareTraining(4, 4, start=0.4)],
    }
    callbacks = [GradualPruning(0.8, stop=0.7), *seconds[settings.pop("second")], RandomState()]
    validated = settings["limit_val_batches"] > 0
    callbacks += [EMA(decay=0.9)] if settings.pop("average") else []
    callbacks += [AccuracyGuard(tolerance=0.0)] if settings.pop("guard") and validated else []
    kind = settings.pop("validation")
    trainer = pl.Trainer(
        **settings,
        callbacks=[*callbacks, *more],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    inputs = torch.randn(2, BATCHES * BATCH, 8)
    data, held_out = (_Augmented(part, part[:, :4].argmax(1)) for part in inputs)
    loader = ResumableLoader(data, BATCH, shuffle=True, seed=seed)
    validation: DataLoader[Any] = (
        ResumableLoader(held_out, 24)
        if kind == "resumable"
        else DataLoader(held_out, 24, shuffle=kind == "shuffled")
    )
    trainer.fit(module, loader, validation, ckpt_path=path, weights_only=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(Path(folder) / "final.ckpt")
        checkpoint = torch.load(Path(folder) / "final.ckpt", weights_only=True)
    kept = ("state_dict", "averaging_state", "optimizer_states", "lr_schedulers", "callbacks")
    return {key: checkpoint[key] for key in kept if key in checkpoint}


def resume_points(settings: Settings) -> dict[str, list[str]]:
    """Return the differences of a training that resumes, for each of its checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        saver = _SaveAll(Path(folder))
        whole = _train(settings, None, saver)
        return {path.stem: list(differences(whole, _train(settings, path))) for path in saver.paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "fitsmall"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rng = random.Random(options.seed)
    rounds = points = wrong = 0
    while points < options.points:
        settings = draw_schedule(rng)
        found = resume_points(settings)
        different = {point: names for point, names in found.items() if names}
        print(f"{json.dumps(settings)}: {len(different)} of {len(found)} differ", flush=True)
        for point, names in different.items():
            print(f"  {point}: {', '.join(names[:4])}")
        rounds, points, wrong = rounds + 1, points + len(found), wrong + len(different)
    table = Table("trainings", "resume points", "differ")
    table.add_row(str(rounds), str(points), str(wrong))
    Console().print(table)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
