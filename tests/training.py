"""A small network on the digits that scikit-learn bundles, and Trainers for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fitsmall.callbacks import ResumableLoader

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(DIGITS.target)


class Net(pl.LightningModule):
    """What a user has: nothing in it knows of compression."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU())
        self.head = nn.Linear(40, 10)
        self.make_optimizer = optimizer

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val/error", (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters(), lr=0.01)


class Idle(Net):
    """A network with a layer that joins in the third epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return self.spare(logits) if self.current_epoch >= 2 else logits


class Adversaries(Net):
    """Two optimizers, stepped by hand, each with a part of the network, as in a GAN."""

    def __init__(self, use_pl_optimizer: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.use_pl_optimizer = use_pl_optimizer

    def training_step(self, batch: list[Tensor], _: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers(use_pl_optimizer=self.use_pl_optimizer):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.body, self.head)]


class Batches(TensorDataset):
    """Gives a loader a batch at once, where putting examples together takes as long as a step."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[indices]


TRAINING = Batches(IMAGES[:640], LABELS[:640])


def loader(shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TRAINING, 64, shuffle=shuffle, collate_fn=list)


def resumable(shuffle: bool = True) -> ResumableLoader:
    return ResumableLoader(TRAINING, 64, shuffle=shuffle, collate_fn=list)


def validation() -> DataLoader[Any]:
    return DataLoader(Batches(IMAGES[640:1000], LABELS[640:1000]), 360, collate_fn=list)


def trainer(root: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


def fit(root: Path, *callbacks: pl.Callback, module: Net | None = None, **kwargs: Any) -> Net:
    pl.seed_everything(0)
    module = module or Net()
    trainer(root, *callbacks, **kwargs).fit(module, loader())
    return module


class ModelCheckpointAt(ModelCheckpoint):
    """Saves after these steps, and no others."""

    def __init__(self, folder: Path, *steps: int) -> None:
        super().__init__(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step in self.steps:
            super().on_train_batch_end(trainer, *args, **kwargs)


class Recorder(pl.Callback):
    """What the next forward pass sees after every step."""

    def __init__(self, name: str = "body.0.weight") -> None:
        self.name = name
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, _: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        self.seen.append(pl_module.get_parameter(self.name).detach().clone())

    def sparsities(self) -> list[float]:
        return [float((weight == 0).float().mean()) for weight in self.seen]


def sparsity(module: nn.Module, *names: str) -> float:
    weights = torch.cat([module.get_parameter(name).flatten() for name in names])
    return float((weights == 0).float().mean())


WEIGHTS = ("body.0.weight", "head.weight")
