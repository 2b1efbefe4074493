"""Compressed files of one training on the Pareto front of error and bytes."""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from fitsmall.callbacks.averaging import EMA
from fitsmall.callbacks.checkpoint import check_module, check_writable
from fitsmall.callbacks.driver import plan_of
from fitsmall.callbacks.monitored import MonitoredMetric
from fitsmall.compressors.file.writer import save
from fitsmall.compressors.training.sharding import whole

__all__ = ["ParetoCheckpoint"]


class ParetoCheckpoint(pl.Callback):
    """A callback that keeps the compressed files on the Pareto front of error and bytes.

    After each validation the weights are written to a compressed file. A file is removed once
    another one is at least as good in error and bytes, and better in one of them. ``pareto.json``
    in the folder lists the files, smallest first. A validation with an error of NaN writes none.

    For gradual methods this is the curve of error against bytes within one training; ``restore``
    loads each point into a plain module.

    Args:
        dirpath: Folder of the files.
        monitor: Name of a metric that the validation logs.
        mode: ``"min"`` if it is an error, the default, or ``"max"`` if it is an accuracy. Metrics
            that are usually the larger the better, such as ``val/acc``, need one.
        coder: Coder of the index streams, see :func:`~fitsmall.compressors.save`.

    Attributes:
        points: ``step``, ``bytes``, ``metric`` and ``path`` (within the folder) of each file.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        monitor: str = "val/error",
        mode: Literal["min", "max"] | None = None,
        coder: str = "context",
    ) -> None:
        super().__init__()
        self.dirpath, self.metric, self.coder = Path(dirpath), MonitoredMetric(monitor, mode), coder
        self.points: list[dict[str, Any]] = []
        self.fitting = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        if self.fitting and not trainer.global_step:
            self.points = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            check_writable(self.dirpath, self)
        check_module(pl_module, self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metric.expect(trainer, self)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metric = self.metric.validated(trainer)
        if metric is None or math.isnan(metric):
            return
        average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        validated = average.weights(pl_module) if average else pl_module.state_dict()
        tensors = {name: whole(tensor) for name, tensor in validated.items()}
        if not trainer.is_global_zero:
            return
        plan = plan_of(trainer)
        tensors = tensors if plan is None else plan.stored(tensors)
        path = self.dirpath / f"step{trainer.global_step}.fitsmall"
        try:
            size = save(path, tensors, self.coder)
        except OSError as error:  # a full disk must not cost a long training
            pl.utilities.rank_zero_warn(
                f"ParetoCheckpoint: {path} cannot be written ({error}): free some space"
            )
            return
        step = trainer.global_step
        point = {"step": step, "bytes": size, "metric": metric, "path": path.name}
        candidates = [*(p for p in self.points if p["path"] != path.name), point]
        self.points = sorted(
            (p for p in candidates if not any(self._beats(other, p) for other in candidates)),
            key=lambda p: p["bytes"],
        )
        for beaten in (p for p in candidates if p not in self.points):
            (self.dirpath / beaten["path"]).unlink(missing_ok=True)
        text = json.dumps(self.points, indent=2) + "\n"
        (self.dirpath / "pareto.json").write_text(text)

    def _beats(self, first: dict[str, Any], second: dict[str, Any]) -> bool:
        """Return whether a point is no worse in both, and better in one or earlier."""
        one, two = ((p["bytes"], self.metric.loss(p["metric"]), p["step"]) for p in (first, second))
        return one[0] <= two[0] and one[1] <= two[1] and one < two

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The training may have gone on after the checkpoint, and removed files.
        if self.fitting:
            self.points = [p for p in state_dict["points"] if (self.dirpath / p["path"]).exists()]
