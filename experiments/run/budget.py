"""Networks of every size under one budget: trained, then compressed within what is left of it.

The part of training that comes before compression is the same for all runs that differ in their
compression alone. It is done once and kept in ``cache``, under the fingerprint of its settings.
"""

import copy
import json
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
from filelock import FileLock, Timeout
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.optim import Optimizer

from fitsmall.compressors import restore
from fitsmall.experiments.run.fingerprint import fingerprint, finished, record, write
from fitsmall.experiments.run.job import build, disband, first, fit, run
from fitsmall.experiments.run.operations import counter, operations

__all__ = ["AMOUNTS", "Budget", "Pace", "Still", "pace", "spend"]

AMOUNTS = ("flops", "seconds", "steps")

_WARM, _TIMED = 3, 12  # steps
_POLL = 0.1  # seconds
_JOB = "FITSMALL_JOB"

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """What one optimizer step costs, on all processes together.

    Args:
        flops: Floating-point operations.
        seconds: Its duration.
    """

    flops: float
    seconds: float


@dataclass(frozen=True)
class Budget:
    """What training may cost, whatever the network.

    Args:
        flops: Floating-point operations in all.
        seconds: Time in all, at the pace that the network has on this machine.
        steps: Optimizer steps.
        scale: What the amount is multiplied with.
        dense: Fraction of it that is spent before compression begins.
        calibration: Steps in which a network is compressed that is not trained meanwhile.
        validations: Times that the curve is measured, spread evenly.

    Raises:
        ValueError: Not exactly one of the three is given, or a fraction is none.

    Example:
        >>> Budget(flops=1e9).steps_at(Pace(flops=4e6, seconds=0.1))
        250
    """

    flops: float | None = None
    seconds: float | None = None
    steps: int | None = None
    scale: float = 1.0
    dense: float = 0.5
    calibration: int = 20
    validations: int = 20

    def __post_init__(self) -> None:
        given = [value for value in (self.flops, self.seconds, self.steps) if value is not None]
        if len(given) != 1 or given[0] <= 0 or self.scale <= 0:
            raise ValueError(
                f"a budget is one of flops, seconds and steps, and positive: got flops="
                f"{self.flops}, seconds={self.seconds}, steps={self.steps}, scale={self.scale}"
            )
        if self.calibration < 1 or self.validations < 1:
            raise ValueError(
                f"budget.calibration and budget.validations are 1 or more, got "
                f"{self.calibration} and {self.validations}"
            )
        if not 0.0 <= self.dense < 1.0:
            raise ValueError(
                f"budget.dense is the fraction before compression begins, got {self.dense}"
            )

    def steps_at(self, pace: Pace) -> int:
        """Optimizer steps that it pays for.

        Raises:
            ValueError: Not even two, or there are no operations to pay for.
        """
        if self.steps is not None:
            steps = float(self.steps)
        elif self.flops is not None:
            if pace.flops == 0:
                raise ValueError(
                    "no floating-point operation of this network can be counted: give budget.steps "
                    "or budget.seconds instead"
                )
            steps = self.flops / pace.flops
        else:
            assert self.seconds is not None
            steps = self.seconds / pace.seconds
        steps = int(self.scale * steps)
        if steps < 2:
            raise ValueError(
                f"the budget pays for {steps} steps: one costs {pace.flops:.3g} operations and "
                f"{pace.seconds:.3g} seconds; give more, or take a smaller network or batch"
            )
        return steps


class Still(pl.Callback):
    """Holds the weights as they are: with it the callbacks that compress a network during training
    compress one that was trained before, without fine-tuning."""

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0


def pace(config: DictConfig) -> Pace:
    """Measure what a step costs, by taking a few."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    watch = _Watch()
    with counter() as counted:
        trainer, _ = fit(_with(config, quiet | {"max_steps": 1, "max_epochs": -1}), [], [])
    if config.budget.seconds is not None:
        fit(_with(config, quiet | {"max_steps": _WARM + _TIMED, "max_epochs": -1}), [watch], [])
    flops = float(counted.get_total_flops()) * trainer.world_size
    return Pace(flops, trainer.strategy.broadcast(watch.pace()))


class _Watch(pl.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step > len(self.times):  # one of several that are accumulated is no step
            self.times.append(time.perf_counter())

    def pace(self) -> float:
        """The median duration of a step."""
        steps = [after - before for before, after in pairwise(self.times)]
        return statistics.median(steps[_WARM:]) if steps else 0.0


def spend(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Train a network, compress it, and return what ``result.json`` says.

    Without methods among the callbacks all of the budget is spent on the network as it is. With
    ``fine_tune`` a fraction of it is, and the rest on training while it is compressed; otherwise
    the network is compressed once all is spent.

    Args:
        config: As ``configs/train.yaml`` composes it, with a ``budget``.
        overrides: Words that made the configuration, for the record.

    Raises:
        ValueError: The budget is none, or too small for the network.
    """
    settings: Any = OmegaConf.to_container(config.budget, resolve=True)
    budget, cost = Budget(**settings), _pace(config)
    total = budget.steps_at(cost)
    methods = any("_target_" in node for node in (config.get("callbacks") or {}).values())
    # At least one step is left to compress in.
    share = min(round(budget.dense * total), total - 1)
    before = share if methods and config.fine_tune else total
    after = 0 if not methods else total - before if config.fine_tune else budget.calibration
    validations = budget.validations

    folder, init = Path(config.folder), config.init
    result: dict[str, Any] = {}
    if before:
        plain = _limited(config, before, validations, callbacks={}, compression=None)
        plain.folder = str(Path(config.cache).absolute() / fingerprint(plain))
        result = _once(Path(plain.folder), lambda: finished(plain), lambda: run(plain, overrides))
        init = str(Path(plain.folder) / "model.fitsmall")
    error_before, seconds = result.get("error"), result.get("seconds", 0.0)
    if methods:
        still = {} if config.fine_tune else {"still": {"_target_": f"{__name__}.Still"}}
        observers = {**config.observers, **still}
        result = run(
            _limited(config, after, validations, init=init, observers=observers), overrides
        )
        seconds += result["seconds"]
    elif first():
        # Its run at W&B is one.
        own = shutil.ignore_patterns("wandb")
        shutil.copytree(plain.folder, folder, ignore=own, dirs_exist_ok=True)
    result = result | {
        "fingerprint": fingerprint(config),
        "size": _name(config.size) or _words_of("model", overrides) or config.model._target_,
        "compression": _compression(config, overrides) if methods else "none",
        "fine_tune": bool(config.fine_tune and methods),
        "budget": vars(budget),
        "flops_per_step": cost.flops,
        "seconds": seconds,
        "steps": before + after,
        "steps_before": before,
        "error_before": error_before,
        "init": init,
        "seed": config.seed,
        "overrides": overrides,
    }
    disband()
    if first():
        result |= _operations(config, folder / "model.fitsmall")
        record(folder / "result.json", result)
    return result


def _pace(config: DictConfig) -> Pace:
    """The pace of this network and data, measured once for all seeds and compressions."""
    changes: dict[str, Any] = {
        "callbacks": {},
        "compression": None,
        "fine_tune": None,
        "seed": 0,
        "init": None,
        "observers": {},
    }
    timed = config.budget.seconds is not None
    key = fingerprint(_with(config, {}, budget={"seconds": timed}, **changes))
    path = Path(config.cache) / f"{key}.pace.json"

    def known() -> Pace | None:
        return Pace(**json.loads(path.read_text())) if path.is_file() else None

    def measured() -> Pace:
        found = pace(config)
        if first():
            record(path, asdict(found))
        return found

    return _once(path, known, measured)


def _limited(config: DictConfig, steps: int, validations: int, **changes: Any) -> DictConfig:
    """The configuration of one training of so many steps."""
    batches = steps * config.trainer.accumulate_grad_batches
    limits = {
        "max_steps": steps,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": max(1, batches // validations),
    }
    return _with(config, limits, budget=None, reference=False, **changes)


def _with(config: DictConfig, trainer: dict[str, Any], **changes: Any) -> DictConfig:
    config = copy.deepcopy(config)
    OmegaConf.set_struct(config, False)
    config.trainer.update(trainer)
    config.update(changes)
    return config


def _once(path: Path, known: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What several jobs share: the first one that comes makes it, and the others wait for it.

    The processes that train together make it together: the first of them tells the others in a
    file that it has begun, since a cluster starts all of them at once.
    """
    group = _group()
    begun = path.with_suffix(".begun")
    if not first():
        while (found := known()) is None:
            if begun.is_file() and begun.read_text() == group:
                return make()
            time.sleep(_POLL)
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for {path}, which another job makes")
        lock.acquire()
    try:
        if (found := known()) is None:
            write(begun, group)
            found = make()
        return found
    finally:
        begun.unlink(missing_ok=True)
        lock.release()


def _group() -> str:
    """What tells the processes that train together from those of other jobs."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # by itself the same for all
        names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"]
    elif "SLURM_JOB_ID" in os.environ:
        names = ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    else:  # those that Lightning starts have the environment of the first
        os.environ.setdefault(_JOB, uuid.uuid4().hex)
        names = [_JOB]
    return " ".join(os.environ.get(name, "") for name in names)


def _operations(config: DictConfig, file: Path) -> dict[str, float]:
    """Of the restored network on a batch of held-out examples: all, and those that are needed."""
    module: pl.LightningModule = restore(build(config.model), file)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    total, needed = operations(
        module, lambda: trainer.validate(module, datamodule=build(config.data), verbose=False)
    )
    return {"operations": total, "operations_needed": needed}


def _name(size: Any) -> str:
    """What networks of a size are called; a list of widths is joined."""
    return "-".join(map(str, size)) if isinstance(size, ListConfig) else str(size or "")


def _compression(config: DictConfig, overrides: list[str]) -> str:
    words = f"{config.compression or ''} {_words_of('callbacks', overrides)}".strip()
    return words or "compressed"


def _words_of(group: str, overrides: list[str]) -> str:
    return " ".join(word for word in overrides if word.startswith(group))
