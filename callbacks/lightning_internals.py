"""All private names of Lightning that are used, each with the feature that needs it.

Tested with lightning 2.6.0 to 2.6.6, without 2.6.2 and 2.6.3, which were compromised releases.
:func:`require` raises an error before training that says which feature needs which version, instead
of an AttributeError during training.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from fitsmall.compressors.torch_internals import Private, is_there

__all__ = [
    "PRIVATE",
    "TESTED",
    "BatchCounts",
    "batch_counts",
    "before_first_fetch",
    "count_epoch_that_begins",
    "forget_last_save",
    "gradient_scaler",
    "loader_states",
    "require",
    "restore_logged_batches",
    "run_missed_validation",
    "stateful_loaders",
    "validation_is_due",
    "wrap_again",
]

TESTED = "lightning 2.6.0 to 2.6.6"

_RESUME, _RANKS, _AVERAGE = "RandomState", "RankLearning and ChannelPruning under DDP", "EMA"
_DDP = "lightning.pytorch.strategies:DDPStrategy"
_EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop"
_LOGGERS = "lightning.pytorch.trainer.connectors.logger_connector.logger_connector:_LoggerConnector"
_AVERAGING = "lightning.pytorch.callbacks:WeightAveraging"

PRIVATE = (
    Private(_DDP, "_setup_model", _RANKS),
    Private(_DDP, "_register_ddp_hooks", _RANKS),
    Private("lightning.pytorch.loops.fit_loop:_FitLoop", "_data_fetcher", _RESUME),
    Private(_EPOCH_LOOP, "_should_accumulate", _RESUME),
    Private(_EPOCH_LOOP, "_should_check_val_fx", _RESUME),
    Private(_EPOCH_LOOP, "_batches_that_stepped", _RESUME),
    Private(_EPOCH_LOOP, "_on_before_fetch", _RESUME),
    Private(_EPOCH_LOOP, "batch_progress", _RESUME),
    Private(_LOGGERS, "_first_loop_iter", _RESUME),
    Private("lightning.pytorch.callbacks:ModelCheckpoint", "_last_global_step_saved", _RESUME),
    Private("lightning.fabric.utilities.types", "_Stateful", _RESUME),
    Private("torch.utils._pytree", "tree_leaves", _RESUME),
    Private(_AVERAGING, "_average_model", _AVERAGE),
    Private(_AVERAGING, "_swap_models", _AVERAGE),
    Private(_AVERAGING, "_copy_average_to_current", _AVERAGE),
    Private(_AVERAGING, "_latest_update_step", _AVERAGE),
    Private(_AVERAGING, "_latest_update_epoch", _AVERAGE),
)


def require(feature: str) -> None:
    """Check that this version of Lightning has the private names that a feature needs.

    Raises:
        MisconfigurationException: A name is gone.
    """
    for private in PRIVATE:
        if private.feature == feature and not is_there(private):
            raise MisconfigurationException(
                f"{feature}: lightning {lightning.__version__} has no "
                f"{private.holder}.{private.name} any more: install {TESTED}"
            )


# Training.


def gradient_scaler(trainer: pl.Trainer) -> Any:
    """Return the gradient scaler of a Trainer's precision, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def wrap_again(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let a distributed strategy wrap a module again, after its parameters changed."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.strategy._setup_model(module)
        trainer.strategy._register_ddp_hooks()


# Resuming.


class BatchCounts(NamedTuple):
    """Progress within an epoch at the time of a checkpoint.

    Args:
        accumulated: Batches with gradients that no optimizer step has used yet.
        pending: Batches that are processed and not completed; 1 within on_train_batch_end.
        logged: Step of the next logged values.
        is_last_batch: Whether this batch is the last of its epoch.
    """

    accumulated: int
    pending: int
    logged: int
    is_last_batch: bool


def batch_counts(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> BatchCounts:
    """Return the progress that a checkpoint records, and correct its total of completed batches.

    Lightning does not count a pending batch when it resumes; at the next resume it would then start
    gradient accumulation at the wrong batch.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    pending = current["processed"] - current["completed"]
    total["completed"] = total["processed"] - pending
    loop = trainer.fit_loop.epoch_loop
    uncounted = (pending or trainer.validating) and not loop._should_accumulate()
    return BatchCounts(
        current["ready"] % trainer.accumulate_grad_batches,
        pending,
        loop._batches_that_stepped + bool(uncounted),
        progress["is_last_batch"],
    )


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Return whether a validation follows the batch that has just been processed."""
    fetcher = trainer.fit_loop._data_fetcher
    return bool(fetcher and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def loader_states(checkpoint: dict[str, Any]) -> list[dict[str, int]]:
    """Return the states of the loaders in a checkpoint."""
    states: list[dict[str, int]] = checkpoint["loops"]["fit_loop"]["state_dict"].get(
        "combined_loader", []
    )
    return states


def stateful_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the training loaders whose state Lightning saves, in its order."""
    from lightning.fabric.utilities.types import _Stateful
    from torch.utils._pytree import tree_leaves

    return [x for x in tree_leaves(trainer.train_dataloader) if isinstance(x, _Stateful)]


def forget_last_save(callbacks: Iterable[pl.Callback], step: int) -> None:
    """Keep ModelCheckpoint from saving the step that training resumes from a second time."""
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = step


def before_first_fetch(trainer: pl.Trainer, function: Callable[[], None]) -> None:
    """Call a function once, just before the next training batch is read.

    No hook of a callback comes there in an epoch that is resumed in its middle.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    before = loop._on_before_fetch

    def first() -> None:
        if (fetcher := trainer.fit_loop._data_fetcher) is not None:
            fetcher._start_profiler = before
        del loop._on_before_fetch
        function()
        before()

    loop._on_before_fetch = first


def restore_logged_batches(trainer: pl.Trainer, logged: int) -> None:
    """Continue the steps of logged values."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = logged


def count_epoch_that_begins(trainer: pl.Trainer) -> None:
    """Count the epoch that begins.

    Lightning does not when it resumes from the last step of an epoch: the next resume would skip
    the rest of this one, and the steps of logged values would shift.
    """
    epochs = trainer.fit_loop.epoch_progress
    if epochs.total.ready == epochs.total.processed:  # type: ignore[attr-defined]
        epochs.increment_ready()
        epochs.increment_started()


def run_missed_validation(trainer: pl.Trainer, epoch: int) -> None:
    """Run the validation that was due when a checkpoint was written.

    Args:
        trainer: The Trainer.
        epoch: Epoch of the checkpoint, to which logged values belong.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = trainer.fit_loop.epoch_progress.current
    connector = trainer._logger_connector
    now = progress.completed, loop._batches_that_stepped, connector._first_loop_iter
    progress.completed, loop._batches_that_stepped = epoch, now[1] - 1
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    progress.completed, loop._batches_that_stepped, connector._first_loop_iter = now
