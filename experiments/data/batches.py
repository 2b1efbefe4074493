"""Minibatches whose order is a pure function of a seed and the number of the epoch."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.training.sharding import processes

__all__ = ["Batches", "generator"]


class Batches:
    """Minibatches of examples that are taken together, by their numbers.

    Without a seed they come in order and complete. With one they are shuffled, and the last
    incomplete one is left out. Lightning saves their state in its checkpoints: a resumed run sees
    the batches that an uninterrupted one would have seen.

    Processes that train together share each batch, and measure all that comes in order.

    Args:
        size: Examples in a batch, of all processes together.
        seed: Seed of the order; None keeps the order.
        epoch: Returns the number of the epoch that an iteration is for.
    """

    def __init__(
        self, size: int, seed: int | None = None, epoch: Callable[[], int] = lambda: 0
    ) -> None:
        self.size, self.seed, self.epoch = size, seed, epoch
        self.taken = 0
        self.saved: dict[str, int] | None = None

    @abstractmethod
    def examples(self) -> int:
        """Their number."""

    @abstractmethod
    def take(self) -> Callable[[Tensor], Any]:
        """A function that makes a batch of the examples with these numbers, in this epoch."""

    def __len__(self) -> int:
        complete, rest = divmod(self.examples(), self.size)
        return complete + (self.seed is None and rest > 0)

    def __iter__(self) -> Iterator[Any]:
        saved, self.saved = self.saved, None
        self.taken = saved["taken"] if saved and saved["epoch"] == self.epoch() else 0
        order = torch.arange(self.examples())
        if self.seed is not None:
            order = order[torch.randperm(len(order), generator=generator(self.seed, self.epoch()))]
        take = self.take()
        rank, world = processes() if self.seed is not None else (0, 1)
        for index in order.split(self.size)[self.taken : len(self)]:
            self.taken += 1
            yield take(index[rank::world])

    def state_dict(self) -> dict[str, int]:
        """Epoch, and number of batches taken of it."""
        return {"epoch": self.epoch(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind that batch, if the next epoch to be read is that one."""
        self.saved = state_dict


def generator(seed: int, epoch: int) -> torch.Generator:
    """What draws the random numbers of an epoch."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)
