"""A data loader that continues where a checkpoint was written."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from fitsmall.compressors.training.sharding import processes

__all__ = ["ResumableLoader"]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can resume in the middle of an epoch.

    Its order depends only on the seed and the epoch. Lightning saves its state in checkpoints and
    sets its epoch. With ``n`` processes each takes every ``n``-th example of one order. It does not
    use the global random number generators. Those of worker processes, which augmentation may use,
    start again when a training resumes.

    Args:
        dataset: A dataset with a length.
        batch_size: Number of examples in a batch.
        shuffle: Whether each epoch has another random order.
        seed: Seed of the order, and of the worker processes.
        kwargs: Other arguments of a DataLoader, but no ``generator`` and no ``batch_sampler``.

    Raises:
        TypeError: The dataset has no length, or there is an argument that sets another order.

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
                f"ResumableLoader: {type(dataset).__name__} has no length, and no order "
                "that could continue: use a DataLoader"
            )
        if "generator" in kwargs or "batch_sampler" in kwargs:
            raise TypeError("ResumableLoader sets the order itself: use shuffle and seed")
        self.shuffle, self.seed = shuffle, seed
        self.epoch = self.batch = 0
        self.saved: dict[str, int] | None = None
        # Lightning passes a sampler when it overfits on few batches.
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
        """Return the epoch, and the number of its batches that were read."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next iteration after that batch, if it is of the same epoch."""
        self.saved = state_dict


class _EpochSampler(DistributedSampler[Any]):
    """A sampler of this process's examples of an epoch, from ``start`` on.

    A DistributedSampler, since Lightning does not replace those. It learns the number of processes
    when it is used, since the loader may exist before they do.
    """

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
