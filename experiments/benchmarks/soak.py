"""Soak test: trainings that are killed and resumed, against the same trainings left alone.

python -m fitsmall.experiments.benchmarks.soak [--hours 2] [--seed 0] [--folder soak]

Each round draws the settings of a training (pruning, sharing or quantization, precision, optimizer,
averaging, accumulation, guard). It trains without interruption, and a second time in processes that
SIGKILL ends at random moments and that resume from the last checkpoint. In the end weights,
latents, masks, clusters, scales, statistics, averages, the optimizer's state and all logged curves
must be equal bit for bit. The first difference ends the test with exit status 1, and both folders
are kept for inspection.
"""

import argparse
import csv
import json
import logging
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fitsmall.callbacks import (
    EMA,
    AccuracyGuard,
    CompressionMonitor,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    ResumableLoader,
    WeightSharing,
)
from fitsmall.compressors import CRITERIA, same_bits
from fitsmall.experiments.data.images import Digits
from fitsmall.experiments.models.networks import MLP

__all__ = ["differences", "draw_settings", "main", "outcome", "train"]

Settings = dict[str, Any]


def draw_settings(random: random.Random) -> Settings:
    """Draw the settings of a training."""
    return {
        "criterion": random.choice(list(CRITERIA)),
        "coupling": random.choice(["hard", "straight_through"]),
        "allocation": random.choice(["global", "uniform", "lamp"]),
        "rounding": random.choice([None, "share linear", "share optimal", "mse", "learned"]),
        "average": random.random() < 0.5,
        "guard": random.choice([None, 0.0, 0.02]),
        "precision": random.choice(["32-true", "bf16-mixed", "16-mixed"]),
        "optimizer": random.choice(["SGD", "Adam", "AdamW"]),
        "accumulate": random.choice([1, 1, 3]),
        "clip": random.choice([None, 1.0]),
        "epochs": random.randint(300, 700),
        "save_every": random.randint(20, 400),
        "seed": random.randrange(1000),
    }


class NoisyClassifier(pl.LightningModule):
    """A classifier that is hard to resume: dropout, batch-norm, a learning-rate schedule, and noise
    in its inputs."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net = MLP([64, 60, 40, 10])
        self.norm, self.dropout = nn.BatchNorm1d(64), nn.Dropout(0.2)
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images = batch[0] + 0.1 * torch.randn_like(batch[0])
        logits = self.net(self.dropout(self.norm(images)))
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        wrong = self.net(self.norm(batch[0])).argmax(1) != batch[1]
        self.log("val/error", wrong.float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = getattr(torch.optim, self.optimizer)(self.parameters(), lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(settings: Settings, folder: Path) -> None:
    """Train from the last checkpoint in the folder, or from the beginning, to ``final.ckpt``."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    pl.seed_everything(settings["seed"], verbose=False)
    callbacks: list[pl.Callback] = [
        GradualPruning(
            0.9,
            settings["criterion"],
            settings["allocation"],
            start=0.1,
            stop=0.6,
            coupling=settings["coupling"],
        ),
        CompressionMonitor(every_n_epochs=10),
        RandomState(),
        ModelCheckpoint(
            folder,
            "last",
            every_n_train_steps=settings["save_every"],
            enable_version_counter=False,
        ),
    ]
    how: Any
    _, shared, how = (settings["rounding"] or "").rpartition("share ")
    if shared:
        callbacks.insert(1, WeightSharing(8, how, start=0.5, stop=0.8))
    elif how:
        callbacks.insert(1, QuantizationAwareTraining(4, 4, how, start=0.5, freeze_norms=0.9))
    if settings["guard"] is not None:
        callbacks.append(AccuracyGuard(tolerance=settings["guard"]))
    if settings["average"]:
        callbacks.append(EMA(decay=0.99))
    # A large scale, so that half precision overflows on a CPU too.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
    half = settings["precision"] == "16-mixed"
    trainer = pl.Trainer(
        max_epochs=settings["epochs"],
        accelerator="cpu",
        callbacks=callbacks,
        precision=None if half else settings["precision"],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)] if half else None,
        accumulate_grad_batches=settings["accumulate"],
        gradient_clip_val=settings["clip"],
        check_val_every_n_epoch=5,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images, held_out = (
        TensorDataset(part.images.flatten(1).float() / 255, part.labels) for part in Digits.load()
    )
    loader = ResumableLoader(images, 64, shuffle=True, seed=settings["seed"])
    last = folder / "last.ckpt"
    path = str(last) if last.exists() else None
    validation = ResumableLoader(held_out, len(held_out))
    module = NoisyClassifier(settings["optimizer"])
    trainer.fit(module, loader, validation, ckpt_path=path, weights_only=True)
    trainer.save_checkpoint(folder / "final.ckpt")


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Paths at which two nested structures of tensors and numbers differ.

    Example:
        >>> list(differences({"a": [1, torch.ones(2)]}, {"a": [1, torch.zeros(2)]}))
        ['/a/1']
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            if key not in first or key not in second:
                yield f"{path}/{key} is missing in one"
            else:
                yield from differences(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple):
        yield from differences(dict(enumerate(first)), dict(enumerate(second)), path)
    elif isinstance(first, Tensor) and isinstance(second, Tensor):
        if not same_bits(first, second):
            yield path
    elif first != second:
        yield path


def outcome(folder: Path) -> dict[str, Any]:
    """State in ``final.ckpt`` and logged curves of a training, without paths of files."""
    checkpoint = torch.load(folder / "final.ckpt", weights_only=True)
    callbacks = {
        key: state
        for key, state in checkpoint["callbacks"].items()
        if not key.startswith("ModelCheckpoint")
    }
    # Steps that were repeated after a kill are in several tables; their last row counts.
    curves: dict[str, dict[str, str]] = {}
    for table in sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=_number):
        with open(table) as file:
            for row in csv.DictReader(file):
                if None not in row.values():  # such a row was cut off by a kill
                    cells = {name: cell for name, cell in row.items() if cell}
                    curves.setdefault(row["step"], {}).update(cells)
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    parts = {key: checkpoint[key] for key in kept if key in checkpoint}
    return {**parts, "callbacks": callbacks, "curves": curves, "steps": checkpoint["global_step"]}


def _number(table: Path) -> int:
    return int(table.parent.name.removeprefix("version_"))


def _start(settings: Settings, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", __spec__.name, "--train", json.dumps(settings)]
    return subprocess.Popen([*words, "--folder", str(folder)], stderr=subprocess.DEVNULL)


def _train_with_kills(settings: Settings, folder: Path, rng: random.Random, seconds: float) -> int:
    """Train with kills, on average after a third of the time of an uninterrupted training.

    Returns:
        The number of kills.
    """
    kills = 0
    while True:
        process = _start(settings, folder)
        try:
            status = process.wait(rng.uniform(0.1, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        if status:
            raise RuntimeError(f"{settings} failed with exit status {status} in {folder}")
        return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("soak"))
    parser.add_argument("--train", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.folder)
        return
    rng = random.Random(options.seed)
    rounds = kills = steps = 0
    end = time.monotonic() + 3600 * options.hours
    while time.monotonic() < end:
        settings = draw_settings(rng)
        print(json.dumps(settings), flush=True)
        whole, killed = (options.folder / f"round{rounds}" / name for name in ("whole", "killed"))
        for folder in (whole, killed):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        start = time.monotonic()
        if _start(settings, whole).wait():
            raise RuntimeError(f"{settings} failed in {whole}")
        kills_now = _train_with_kills(settings, killed, rng, time.monotonic() - start)
        expected, found = outcome(whole), outcome(killed)
        # The monitor logs at the end of an epoch. A run that is killed between the checkpoint of
        # the epoch's last step and its end does not come to that end again.
        for step, cells in expected["curves"].items():
            missing = cells.keys() - found["curves"].get(step, {}).keys()
            for name in [name for name in missing if name.startswith("compression/")]:
                del cells[name]
        if different := list(differences(expected, found)):
            print(f"{settings}: {len(different)} differences: {', '.join(different[:20])}")
            print(f"{whole} {killed}")
            sys.exit(1)
        rounds, kills, steps = rounds + 1, kills + kills_now, steps + expected["steps"]
        print(f"  {expected['steps']:,} steps, {kills_now} kills: equal", flush=True)
        shutil.rmtree(whole.parent)
    table = Table("hours", "trainings", "steps of each", "kills", "differences")
    table.add_row(f"{options.hours:g}", str(rounds), f"{steps / rounds:,.0f}", str(kills), "0")
    Console().print(table)


if __name__ == "__main__":
    main()
