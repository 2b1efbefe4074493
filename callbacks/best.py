"""The best weights, once they are compressed: what counts before would be a dense network."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pressfit.callbacks.averaging import EMA
from pressfit.callbacks.method import plan_of
from pressfit.callbacks.metric import Metric
from pressfit.callbacks.sharding import whole
from pressfit.compressors.artifact import save

__all__ = ["EarlyStoppingOnceCompressed", "ModelCheckpointOnceCompressed", "ParetoCheckpoint"]


class _OnceCompressed(pl.Callback):
    """Hides a training from a callback until every method has reached its full strength."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if _compressed(trainer):
            super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compressed(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _compressed(trainer):
            super().on_validation_end(trainer, pl_module)


class ModelCheckpointOnceCompressed(_OnceCompressed, ModelCheckpoint):
    """Lightning's ModelCheckpoint, which sees nothing of the training until every method has
    reached its full strength.

    A dense network has a lower error than the compressed one that it becomes: the best of all
    epochs would come from before. It takes ModelCheckpoint's arguments; for resuming keep a plain
    ModelCheckpoint beside it.
    """


class EarlyStoppingOnceCompressed(_OnceCompressed, EarlyStopping):
    """Lightning's EarlyStopping, whose patience begins when every method has reached its full
    strength. It takes EarlyStopping's arguments."""


def _compressed(trainer: pl.Trainer) -> bool:
    plan = plan_of(trainer)
    return plan is None or plan.complete


class ParetoCheckpoint(pl.Callback):
    """Keep every compressed file that no other one beats in both error and bytes.

    After each validation the weights are written as a compressed file; it stays as long as no
    other one is at least as good in both and better in one. ``pareto.json`` in the folder lists
    them, smallest first. With methods that act gradually this is the curve of error against bytes
    of one training, each point of which ``restore`` puts into a plain module.

    Args:
        dirpath: Folder of the files.
        monitor: Name of the metric of the validation.
        mode: ``"min"`` if it is an error, ``"max"`` if it is an accuracy.
        coder: Coder of the index streams, see :func:`~pressfit.compressors.save`.

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

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metric = self.metric.validated(trainer)
        if metric is None:
            return
        average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        validated = average.weights(pl_module) if average else pl_module.state_dict()
        tensors = {name: whole(tensor) for name, tensor in validated.items()}
        if not trainer.is_global_zero:
            return
        self.dirpath.mkdir(parents=True, exist_ok=True)
        path = self.dirpath / f"step{trainer.global_step}.pressfit"
        point = {
            "step": trainer.global_step,
            "bytes": save(path, tensors, self.coder),
            "metric": metric,
            "path": path.name,
        }
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
        self.points = state_dict["points"]
