"""Resuming to the bit: what a checkpoint of Lightning's leaves out, the random state and the place
in the data."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler

from fitsmall.compressors.training.sharding import processes

__all__ = ["RandomState", "ResumableLoader"]


class RandomState(pl.Callback):
    """Save the state of all random number generators, of every process, in checkpoints.

    Python's, NumPy's, torch's on the CPU and on every CUDA device. With a
    :class:`ResumableLoader`, or other data that come in an order of their own, a resumed training
    then equals the uninterrupted one bit for bit, dropout and augmentation included, as long as
    they are drawn in the training process.

    It also gives every loader that has a state its place back, since Lightning forgets it where
    ``configure_optimizers`` asks for ``estimated_stepping_batches``.

    Gradients that are being accumulated are in no checkpoint: one that is written between two
    steps (a validation may do so) goes back to the weights of the step before and is not exact,
    which is pointed out. ModelCheckpoint does so by itself at the first batch after a resume; that
    is prevented. A validation that was due when the checkpoint was written is made up for, unless
    that was the end of training; Lightning leaves it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[str, Any] | None = None
        self.places: list[dict[str, int]] = []
        self.fitting = True
        self.resumed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.fitting = stage == "fit"

    def state_dict(self) -> dict[str, Any]:
        _, world = processes()
        states = [_state()] * world
        if world > 1:
            dist.all_gather_object(states, states[0])
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fitting:
            self.saved = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # Lightning forgets a batch in this sum when it resumes, and misplaces the windows of
        # accumulation the next time it does.
        current, total = progress["current"], progress["total"]
        pending = current["processed"] - current["completed"]  # 1 in on_train_batch_end
        total["completed"] = total["processed"] - pending
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        uncounted = (pending or trainer.validating) and not loop._should_accumulate()
        checkpoint["callbacks"].setdefault(self.state_key, {}).update(
            logged=loop._batches_that_stepped + bool(uncounted),
            epoch=trainer.current_epoch,
            validate=bool(pending and fetcher and loop._should_check_val_fx(fetcher)),
        )
        gathered = current["ready"] % trainer.accumulate_grad_batches
        if trainer.training and gathered and not progress["is_last_batch"]:
            pl.utilities.rank_zero_warn(
                f"RandomState: a checkpoint was written {gathered} batches behind step "
                f"{trainer.global_step:,}, without the gradients accumulated since then: resuming "
                "from it will not be exact; save every so many train steps"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.fitting:
            self.places = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # As Lightning chose those whose state it saved.
        loaders = [x for x in tree_leaves(trainer.train_dataloader) if isinstance(x, _Stateful)]
        for loader, place in zip(loaders, self.places, strict=False):
            loader.load_state_dict(place)
        self.places = []
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                # It would take the step that it resumes from for one that it has not saved yet.
                callback._last_global_step_saved = trainer.global_step
        self.resumed = trainer.global_step > 0
        if self.saved is None:
            return
        if len(self.saved["processes"]) != trainer.world_size:
            pl.utilities.rank_zero_warn(
                f"RandomState: the checkpoint is of {len(self.saved['processes'])} processes, and "
                f"this training has {trainer.world_size}: random numbers will differ"
            )
        self._draw_anew(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_up(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.resumed:
            # When it resumes from the last step of an epoch, Lightning forgets to count the epoch
            # that begins, so that the next resume would skip the rest of it, and shifts the axis
            # of the curves.
            epochs = trainer.fit_loop.epoch_progress
            if epochs.total.ready == epochs.total.processed:  # type: ignore[attr-defined]
                epochs.increment_ready()
                epochs.increment_started()
        self._make_up(trainer)
        self.resumed = False

    def _draw_anew(self, trainer: pl.Trainer) -> None:
        states = self.saved["processes"] if self.saved else []
        if len(states) == trainer.world_size:
            _set_state(states[trainer.global_rank])

    def _make_up(self, trainer: pl.Trainer) -> None:
        """Validate what Lightning left out, as if the epoch or batch before had not ended."""
        if self.saved is None:
            return
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.saved["logged"]
        if self.saved["validate"]:
            progress = trainer.fit_loop.epoch_progress.current
            connector = trainer._logger_connector
            now = progress.completed, loop._batches_that_stepped, connector._first_loop_iter
            progress.completed, loop._batches_that_stepped = self.saved["epoch"], now[1] - 1
            self._draw_anew(trainer)  # Lightning has drawn a number since
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            progress.completed, loop._batches_that_stepped, connector._first_loop_iter = now
        self.saved = None


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose order depends on the seed and the epoch alone, and which goes on in the
    middle of an epoch.

    Lightning saves its state in checkpoints by itself, and tells it the epoch. On several processes
    each takes every ``n``-th example, of an order that all agree upon. It draws nothing from the
    global generators. What worker processes draw (augmentation, say) starts anew on resuming.

    Args:
        dataset: A dataset with a length.
        batch_size: Examples in a batch.
        shuffle: Another order in each epoch.
        seed: Seed of the order, and of the worker processes.
        kwargs: The other arguments of a DataLoader.

    Raises:
        TypeError: The dataset has no length, or another order is asked for.

    Example:
        >>> loader = ResumableLoader(range(6), batch_size=2, shuffle=True)
        >>> next(iter(loader)), loader.state_dict()
        (tensor([2, 5]), {'epoch': 0, 'batch': 1})
        >>> loader.load_state_dict({"epoch": 0, "batch": 1})
        >>> list(loader)
        [tensor([3, 0]), tensor([1, 4])]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"ResumableLoader: {type(dataset).__name__} has no length, so that there is no "
                "order of its own to go on in: use a DataLoader"
            )
        if "generator" in kwargs or "batch_sampler" in kwargs:
            raise TypeError("ResumableLoader has an order of its own: give it shuffle and seed")
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.batch = 0
        self.saved: dict[str, int] | None = None
        # Lightning puts in a sampler of its own to overfit on few batches.
        sampler = kwargs.pop("sampler", None) or _EpochSampler(dataset, shuffle=shuffle, seed=seed)
        generator = torch.Generator()  # from which workers are seeded
        super().__init__(dataset, batch_size, sampler=sampler, generator=generator, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # This runs at the first batch: by then Lightning has told the sampler the epoch.
        saved, self.saved = self.saved, None
        self.epoch, self.batch = getattr(self.sampler, "epoch", 0), 0
        if saved is not None and saved["epoch"] == self.epoch:
            self.batch = saved["batch"]
        taken = self.batch
        if isinstance(self.sampler, _EpochSampler):
            self.sampler.start, taken = self.batch * (self.batch_size or 1), 0
        self.generator.manual_seed(self.seed + self.epoch)
        for batch in itertools.islice(super().__iter__(), taken, None):
            self.batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and number of batches taken of it."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind that batch, if the next epoch to be read is that one."""
        self.saved = state_dict


class _EpochSampler(DistributedSampler[Any]):
    """This process's examples of an epoch, from ``start`` on. Lightning leaves a sampler of this
    class as it is, and processes are known only once it has started them."""

    def __init__(self, dataset: Any, shuffle: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        self._join()
        return itertools.islice(super().__iter__(), self.start, None)

    def __len__(self) -> int:
        self._join()
        return super().__len__()

    def _join(self) -> None:
        epoch, (rank, world) = self.epoch, processes()
        super().__init__(self.dataset, world, rank, self.shuffle, self.seed)
        self.epoch = epoch


def _state() -> dict[str, Any]:
    """Plain numbers and tensors, which load without unpickling."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_state(state: dict[str, Any]) -> None:
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
