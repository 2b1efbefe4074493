"""Train a network within a budget, and compress it within what is left.

Runs that differ only in their compression begin with the same training. It is done once, and kept
in ``cache`` under the fingerprint of its settings.
"""

import copy
import json
import shutil
import statistics
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.optim import Optimizer

from fitsmall.compressors import restore
from fitsmall.experiments.models.operations import count_operations, operation_counter
from fitsmall.experiments.run.budget import Budget, StepCost
from fitsmall.experiments.run.experiment import fit, instantiate_node, run_experiment
from fitsmall.experiments.run.fingerprint import fingerprint
from fitsmall.experiments.run.folder import find_result, write_json
from fitsmall.experiments.run.processes import end_process_group, is_rank_zero, make_once

__all__ = ["FrozenWeights", "StepTimer", "measure_step_cost", "run_within_budget"]

_WARMUP, _TIMED = 3, 12  # steps


def run_within_budget(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Train a network, compress it, and record one result for both.

    Without methods among the callbacks, the whole budget trains the dense network. With
    ``fine_tune``, a fraction of the budget trains it and the rest trains it while it is compressed.
    Without ``fine_tune``, it is compressed after the whole budget, with frozen weights.

    Args:
        config: Configuration that ``configs/train.yaml`` composes, with a ``budget``.
        overrides: Command-line words that gave the configuration, for the record.

    Returns:
        Content of ``result.json``.

    Raises:
        ValueError: The budget is invalid, or too small for the network.
    """
    settings: Any = OmegaConf.to_container(config.budget, resolve=True)
    budget, cost = Budget(**settings), _cached_step_cost(config)
    total = budget.steps_at(cost)
    has_methods = any("_target_" in node for node in (config.get("callbacks") or {}).values())
    steps_dense = total
    steps_compressing = 0
    if has_methods and config.fine_tune:
        # At least one step is left to compress in.
        steps_dense = min(round(budget.dense * total), total - 1)
        steps_compressing = total - steps_dense
    elif has_methods:
        steps_compressing = budget.calibration

    folder, init = Path(config.folder), config.init
    result: dict[str, Any] = {}
    if steps_dense:
        changes: dict[str, Any] = {"callbacks": {}, "compression": None}
        dense = _with_steps(config, steps_dense, budget.validations, **changes)
        dense.folder = str(Path(config.cache).absolute() / fingerprint(dense))
        result = make_once(
            Path(dense.folder),
            find=lambda: find_result(dense),
            make=lambda: run_experiment(dense, overrides),
        )
        init = str(Path(dense.folder) / "model.fitsmall")
    error_before, seconds = result.get("error"), result.get("seconds", 0.0)
    if has_methods:
        observers = dict(config.observers)
        if not config.fine_tune:
            observers["frozen"] = {"_target_": f"{__name__}.FrozenWeights"}
        changes = {"init": init, "observers": observers}
        compressed = _with_steps(config, steps_compressing, budget.validations, **changes)
        result = run_experiment(compressed, overrides)
        seconds += result["seconds"]
    elif is_rank_zero():
        # The training in the cache has its own run at W&B.
        shutil.copytree(
            dense.folder, folder, ignore=shutil.ignore_patterns("wandb"), dirs_exist_ok=True
        )
    result = result | {
        "fingerprint": fingerprint(config),
        "size": _size_label(config, overrides),
        "compression": _compression_label(config, overrides) if has_methods else "none",
        "fine_tune": bool(config.fine_tune and has_methods),
        "budget": vars(budget),
        "flops_per_step": cost.flops,
        "seconds": seconds,
        "steps": steps_dense + steps_compressing,
        "steps_before": steps_dense,
        "error_before": error_before,
        "init": init,
        "seed": config.seed,
        "overrides": overrides,
    }
    end_process_group()
    if is_rank_zero():
        result |= _operations(config, folder / "model.fitsmall")
        write_json(folder / "result.json", result)
    return result


class FrozenWeights(pl.Callback):
    """Set all learning rates to zero, so that steps calibrate and project but do not train.

    With it, the callbacks that compress during training compress a trained network without
    fine-tuning.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0


class StepTimer(pl.Callback):
    """Record the time at which each optimizer step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > len(self.times):  # not on batches that only accumulate gradients
            self.times.append(time.perf_counter())

    def median_seconds(self) -> float:
        """Median duration of a step after warm-up; 0 if none was timed."""
        durations = [after - before for before, after in pairwise(self.times)]
        return statistics.median(durations[_WARMUP:]) if durations else 0.0


def measure_step_cost(config: DictConfig) -> StepCost:
    """Train for one step and count its operations; if the budget is in seconds, time a few more.

    Without a budget in seconds, the cost has zero seconds.
    """
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    timer = StepTimer()
    with operation_counter() as counter:
        trainer, _ = fit(_changed(config, quiet | {"max_steps": 1, "max_epochs": -1}), [], [])
    if config.budget.seconds is not None:
        steps = {"max_steps": _WARMUP + _TIMED, "max_epochs": -1}
        fit(_changed(config, quiet | steps), [timer], [])
    flops = float(counter.get_total_flops()) * trainer.world_size
    return StepCost(flops, trainer.strategy.broadcast(timer.median_seconds()))


def _cached_step_cost(config: DictConfig) -> StepCost:
    """Cost of a step, measured once for all seeds and compressions of a network."""
    changes: dict[str, Any] = {
        "callbacks": {},
        "compression": None,
        "fine_tune": None,
        "seed": 0,
        "init": None,
        "observers": {},
    }
    is_timed = config.budget.seconds is not None
    key = fingerprint(_changed(config, {}, budget={"seconds": is_timed}, **changes))
    path = Path(config.cache) / f"{key}.cost.json"

    def find() -> StepCost | None:
        return StepCost(**json.loads(path.read_text())) if path.is_file() else None

    def make() -> StepCost:
        cost = measure_step_cost(config)
        if is_rank_zero():
            write_json(path, asdict(cost))
        return cost

    return make_once(path, find, make)


def _with_steps(config: DictConfig, steps: int, validations: int, **changes: Any) -> DictConfig:
    """The configuration of one training of so many steps, with other changes."""
    batches = steps * config.trainer.accumulate_grad_batches
    limits = {
        "max_steps": steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": max(1, batches // validations),
    }
    return _changed(config, limits, budget=None, reference=False, **changes)


def _changed(config: DictConfig, trainer: dict[str, Any], **changes: Any) -> DictConfig:
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    config.trainer.update(trainer)
    config.update(changes)
    return config


def _operations(config: DictConfig, file: Path) -> dict[str, float]:
    """Operations of the restored network on one validation batch: all, and without zeros."""
    module: pl.LightningModule = restore(instantiate_node(config.model), file)
    data = instantiate_node(config.data)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    total, needed = count_operations(
        module, lambda: trainer.validate(module, datamodule=data, verbose=False)
    )
    return {"operations": total, "operations_needed": needed}


def _size_label(config: DictConfig, overrides: list[str]) -> str:
    """Name of the network's size: the configured one, or the overrides of the model."""
    size = config.size
    if isinstance(size, ListConfig):
        return "-".join(map(str, size))
    return str(size or _overrides_of("model", overrides) or config.model._target_)


def _compression_label(config: DictConfig, overrides: list[str]) -> str:
    label = f"{config.compression or ''} {_overrides_of('callbacks', overrides)}".strip()
    return label or "compressed"


def _overrides_of(group: str, overrides: list[str]) -> str:
    return " ".join(word for word in overrides if word.startswith(group))
