"""Budgets: the steps that they buy, what a step costs, and work that jobs share."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from fitsmall.experiments.models.operations import count_operations, operation_counter
from fitsmall.experiments.run.budget import Budget, StepCost
from fitsmall.experiments.run.folder import write_text
from fitsmall.experiments.run.processes import make_once, process_group_id
from fitsmall.experiments.run.within_budget import StepTimer


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({}, "one of flops, seconds and steps"),
        ({"flops": 1e9, "steps": 10}, "one of flops, seconds and steps"),
        ({"seconds": -1.0}, "positive"),
        ({"steps": 10, "dense": 1.0}, "budget.dense"),
        ({"steps": 10, "validations": 0}, "budget.calibration and budget.validations must be 1 or"),
    ],
)
def test_a_budget_is_one_amount(amounts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**amounts)


def test_a_budget_buys_steps() -> None:
    cost = StepCost(flops=1e6, seconds=0.5)
    assert Budget(steps=7).steps_at(cost) == 7
    assert Budget(flops=2e7).steps_at(cost) == 20
    assert Budget(seconds=30).steps_at(cost) == 60
    with pytest.raises(ValueError, match="pays for 1 steps: one costs 1e"):
        Budget(flops=1.5e6).steps_at(cost)
    with pytest.raises(ValueError, match=r"can be counted: give budget.steps or budget.seconds"):
        Budget(flops=1.5e6).steps_at(StepCost(flops=0.0, seconds=0.5))


def shared(path: Path, made: list[str], name: str, wait: float = 0.3) -> str:
    """Work that several jobs need. It takes a while, and its result is the name of its maker."""

    def make() -> str:
        made.append(name)
        time.sleep(wait)
        write_text(path, made[0])
        return made[0]

    return make_once(path, lambda: path.read_text() if path.is_file() else None, make)


def test_what_jobs_share_is_made_by_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda name: shared(tmp_path / "shared", made, name), "abcd")]
    assert found == 4 * made
    assert len(made) == 1


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "FITSMALL_JOB"])
def test_further_processes_of_a_job_wait_for_the_first_of_their_own(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "shared", ["another"]
    monkeypatch.setenv(variable, "6")
    write_text(path.with_suffix(".begun"), process_group_id())
    monkeypatch.setenv(variable, "7")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(shared, path, made, "second")
        time.sleep(0.3)
        assert made == ["another"]  # the process does not follow another job
        write_text(path.with_suffix(".begun"), process_group_id())
        assert second.result() == "another"
        assert made == ["another", "second"]
        # The result exists, so neither process makes it again.
        assert pool.submit(shared, path, made, "second").result() == "another"
        assert len(made) == 2


@pytest.mark.parametrize("accumulated", [1, 4])
def test_seconds_are_those_of_optimizer_steps(accumulated: int) -> None:
    class Slow(BoringModel):
        def training_step(self, batch: Any, index: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, index)

    timer = StepTimer()
    trainer = pl.Trainer(
        max_steps=6,
        accumulate_grad_batches=accumulated,
        callbacks=[timer],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
    )
    trainer.fit(Slow())
    assert len(timer.times) == 6
    assert timer.median_seconds() >= 0.02 * accumulated


def test_operations_are_counted_by_layer() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(36, 5, bias=False))
    net[0].weight.data[0] = 0
    net[2].weight.data[:, :18] = 0
    images, (first, *_, last) = torch.ones(3, 2, 5, 5), net
    convolution, linear = 2 * 3 * 9 * 4 * 18, 2 * 3 * 36 * 5
    expected = (convolution + linear, 0.75 * convolution + 0.5 * linear)
    assert count_operations(net, lambda: net(images)) == expected
    # It does not matter how the layers are called.
    assert count_operations(net, lambda: last(first(images).flatten(1))) == expected
    query = torch.ones(1, 2, 10, 8, requires_grad=True)
    with operation_counter() as counter:
        nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert counter.get_total_flops() == 2 * (2 * 2 * 10 * 10 * 8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("training", [True, False])
def test_operations_within_a_fast_kernel_are_counted(training: bool) -> None:
    batch, steps, width, heads, hidden = 2, 10, 8, 2, 16
    x = torch.ones(batch, steps, width)
    layer = nn.TransformerEncoderLayer(width, heads, hidden, batch_first=True).train(training)
    projections = 2 * batch * steps * width * 4 * width
    attention = 2 * 2 * batch * steps * steps * width
    perceptron = 2 * 2 * batch * steps * width * hidden
    lstm = nn.LSTM(width, hidden, batch_first=True).train(training)
    gates = 2 * batch * steps * (width + hidden) * 4 * hidden
    with torch.no_grad():
        total, needed = count_operations(layer, lambda: layer(x))
        assert total == needed == projections + attention + perceptron
        assert count_operations(lstm, lambda: lstm(x)) == (gates, gates)
