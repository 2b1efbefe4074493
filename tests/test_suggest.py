"""What suggest needs of a module and its data."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from fitsmall.experiments.run.suggest import curvatures, some_batches


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def training_step(self, batch: Any, index: int) -> Any:
        self.log("train/loss", 1.0)
        return {"loss": self.fc(batch).square().sum()}


class WithoutLoss(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        return None


class WithTrainer(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        return self.fc(batch).sum() * self.trainer.global_step


def test_curvatures_are_mean_squares_of_gradients() -> None:
    module, batch = Module(), torch.ones(1, 4)
    found = curvatures(module, [batch, batch])
    assert torch.allclose(found["fc.bias"], (2 * module.fc(batch[0])).square())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (WithoutLoss(), "WithoutLoss.training_step returns a NoneType"),
        (WithTrainer(), "WithTrainer.training_step cannot run without a Trainer"),
    ],
)
def test_modules_that_cannot_be_looked_at(module: Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curvatures(module, [torch.ones(1, 4)])


def test_batches_hold_enough_examples() -> None:
    assert len(some_batches([torch.zeros(500, 4)] * 9)) == 3
    with pytest.raises(ValueError, match="no batch"):
        some_batches([])
