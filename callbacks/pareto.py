"""The set of compressed files that no other beats in both error and bytes."""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from fitsmall.callbacks.averaging import EMA
from fitsmall.callbacks.checkpoint import check_writable
from fitsmall.callbacks.monitored import Metric
from fitsmall.compressors.file.writer import save
from fitsmall.compressors.training.sharding import whole

__all__ = ["ParetoCheckpoint"]


class ParetoCheckpoint(pl.Callback):
    """Keep every compressed file that no other one beats in both error and bytes.

    After each validation the weights are written as a compressed file; it stays as long as no
    other one is at least as good in both and better in one. ``pareto.json`` in the folder lists
    them, smallest first; what has no error, NaN, is not among them. With methods that act gradually
    this is the curve of error against bytes of one training, each point of which ``restore`` puts
    into a plain module.

    Args:
        dirpath: Folder of the files.
        monitor: Name of the metric of the validation.
        mode: ``"min"`` if it is an error, ``"max"`` if it is an accuracy.
        coder: Coder of the index streams, see :func:`~fitsmall.compressors.save`.

    Attributes:
        points: Step, bytes, metric and path of the files that are kept.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        monitor: str = "val/error",
        mode: Literal["min", "max"] = "min",
        coder: str = "context",
    ) -> None:
        super().__init__()
        self.dirpath, self.metric, self.coder = Path(dirpath), Metric(monitor, mode), coder
        self.points: list[dict[str, Any]] = []
        self.fitting = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"
        if self.fitting and not trainer.global_step:
            self.points = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            check_writable(self.dirpath, self)

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
        path = self.dirpath / f"step{trainer.global_step}.fitsmall"
        try:
            size = save(path, tensors, self.coder)
        except OSError as error:  # a long training is not to be lost for a full disk
            pl.utilities.rank_zero_warn(
                f"ParetoCheckpoint: {path} cannot be written ({error}): free some space"
            )
            return
        step = trainer.global_step
        point = {"step": step, "bytes": size, "metric": metric, "path": path.name}
        rivals = [*(rival for rival in self.points if rival["path"] != path.name), point]
        self.points = sorted(
            (mine for mine in rivals if not any(self._beats(rival, mine) for rival in rivals)),
            key=lambda mine: mine["bytes"],
        )
        for rival in rivals:
            if rival not in self.points:
                (self.dirpath / rival["path"]).unlink(missing_ok=True)
        text = json.dumps(self.points, indent=2) + "\n"
        (self.dirpath / "pareto.json").write_text(text)

    def _beats(self, first: dict[str, Any], second: dict[str, Any]) -> bool:
        """No worse in both, and better in one; of equal ones the earlier."""
        mine, other = (
            (p["bytes"], self.metric.loss(p["metric"]), p["step"]) for p in (first, second)
        )
        return mine[0] <= other[0] and mine[1] <= other[1] and mine < other

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A training that was killed later on may have removed a file that was beaten then.
        if self.fitting:
            self.points = [p for p in state_dict["points"] if (self.dirpath / p["path"]).exists()]
