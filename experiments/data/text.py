"""Text as bytes: the source of Python's standard library, which every machine has."""

import hashlib
import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from fitsmall.experiments.data.batches import Batches, generator

__all__ = ["StandardLibrary", "Texts", "split_of"]

# Not the library itself: installed packages, tests, and tables that no one has written.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
_LEFT_OUT |= {"__pycache__", "pydoc_data", "turtledemo", "ensurepip"}


class Texts(Batches):
    """Batches ``(size, length + 1)`` of texts, cut from one long text.

    With a seed the first cut of an epoch is anywhere, so that every byte is predicted from all
    distances.

    Args:
        text: Bytes ``(n,)``.
        length: Bytes that are predicted in each text.
        size: Texts in a batch.
        seed: Seed of cuts and order; None keeps the order.
        epoch: Returns the number of the epoch that an iteration is for.
        every: Take one of so many texts.

    Example:
        >>> text = torch.arange(10, dtype=torch.uint8)
        >>> [batch.tolist() for batch in Texts(text, length=4, size=2)]
        [[[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]]
    """

    def __init__(
        self,
        text: Tensor,
        length: int,
        size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        every: int = 1,
    ) -> None:
        super().__init__(size, seed, epoch)
        self.text, self.length, self.every = text, length, every

    def examples(self) -> int:
        texts = (len(self.text) - 1) // self.length
        # A cut that is moved leaves the last text without its end.
        return math.ceil((texts - (self.seed is not None)) / self.every)

    def take(self) -> Callable[[Tensor], Tensor]:
        offset = 0
        if self.seed is not None:
            random = generator(self.seed, self.epoch())
            offset = int(torch.randint(self.length, (), generator=random))
        places = offset + torch.arange(self.length + 1)

        def batch(index: Tensor) -> Tensor:
            chosen = self.every * self.length * index[:, None] + places
            return self.text[chosen.to(self.text.device)].long()

        return batch


def split_of(name: str) -> str:
    """Which split a file is in, by its name alone: of ten, eight train, one is held out, one tests.

    Example:
        >>> [split_of(name) for name in ("abc.py", "ast.py", "json/decoder.py")]
        ['train', 'train', 'test']
    """
    number = hashlib.sha256(name.encode()).digest()[0] % 10
    return {8: "val", 9: "test"}.get(number, "train")


@cache
def _library() -> dict[str, Tensor]:
    """The text of each split: its files in order, with a zero in front of each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, bytearray] = {"train": bytearray(), "val": bytearray(), "test": bytearray()}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _LEFT_OUT & {*name.parts}:
            parts[split_of(name.as_posix())] += b"\0" + path.read_bytes()
    if min(map(len, parts.values())) < 100_000:
        raise OSError(f"{root} does not hold the source of Python's standard library")
    return {name: torch.frombuffer(part, dtype=torch.uint8) for name, part in parts.items()}


class StandardLibrary(pl.LightningDataModule):
    """The source of the Python that runs, split by file: no download, some 8 MB to train on.

    What the numbers are depends on Python's version, and they compare within one.

    Args:
        batch_size: Texts in a training batch.
        length: Bytes that are predicted in each text.
        evaluated: About as many bytes of the held-out files are used, and of the test files.
        seed: Seed of cuts and order.

    Raises:
        OSError: This Python came without its source.
    """

    def __init__(
        self, batch_size: int = 16, length: int = 256, evaluated: int = 131_072, seed: int = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.length, self.evaluated = batch_size, length, evaluated
        self.seed = seed
        self.parts: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.parts = {name: part.to(device) for name, part in _library().items()}

    def train_dataloader(self) -> Texts:
        return Texts(self.parts["train"], self.length, self.batch_size, self.seed, self._epoch)

    def val_dataloader(self) -> Texts:
        return self._evaluated("val")

    def test_dataloader(self) -> Texts:
        return self._evaluated("test")

    def _evaluated(self, name: str) -> Texts:
        # From all files: those beside each other are alike.
        every = max(1, len(self.parts[name]) // self.evaluated)
        return Texts(self.parts[name], self.length, size=64, every=every)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
