"""Minibatches whose order depends only on a seed and the number of the epoch."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.training.sharding import processes

__all__ = ["Batches", "epoch_generator"]


class Batches:
    """An iterable of minibatches. A subclass makes each one by a single indexing operation.

    Without a seed, examples come in order and the last batch may be smaller. With a seed, they are
    shuffled and an incomplete last batch is dropped. Lightning saves the position in its
    checkpoints, so that a resumed run sees the same batches as an uninterrupted one.

    Processes that train together share each shuffled batch. Unshuffled batches, which validate and
    test, go to every process whole.

    Args:
        size: Examples in a batch, of all processes together.
        seed: Seed of the order; None keeps the order.
        epoch: Returns the number of the current epoch.
    """

    def __init__(
        self, size: int, seed: int | None = None, epoch: Callable[[], int] = lambda: 0
    ) -> None:
        self.size, self.seed, self.epoch = size, seed, epoch
        self.taken = 0
        self.resume_state: dict[str, int] | None = None

    @abstractmethod
    def num_examples(self) -> int:
        """Number of examples in an epoch."""

    @abstractmethod
    def batch_function(self) -> Callable[[Tensor], Any]:
        """A function from the numbers of examples to their batch, for the current epoch."""

    def __len__(self) -> int:
        complete, rest = divmod(self.num_examples(), self.size)
        return complete + (self.seed is None and rest > 0)

    def __iter__(self) -> Iterator[Any]:
        state, self.resume_state = self.resume_state, None
        self.taken = state["taken"] if state and state["epoch"] == self.epoch() else 0
        order = torch.arange(self.num_examples())
        if self.seed is not None:
            generator = epoch_generator(self.seed, self.epoch())
            order = order[torch.randperm(len(order), generator=generator)]
        make_batch = self.batch_function()
        rank, world_size = processes() if self.seed is not None else (0, 1)
        for index in order.split(self.size)[self.taken : len(self)]:
            self.taken += 1
            yield make_batch(index[rank::world_size])

    def state_dict(self) -> dict[str, int]:
        """Number of the epoch, and number of batches taken from it."""
        return {"epoch": self.epoch(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after these batches, if the next iteration is in the same epoch."""
        self.resume_state = state_dict


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator of the random numbers of one epoch."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)
