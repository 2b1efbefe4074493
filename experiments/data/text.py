"""Text as bytes: the source code of Python's standard library, which every machine has."""

import hashlib
import math
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from fitsmall.experiments.data.batches import Batches, epoch_generator

__all__ = ["StandardLibrary", "Texts", "split_of"]

# Installed packages, tests, and tables that programs wrote.
_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
_EXCLUDED |= {"__pycache__", "pydoc_data", "turtledemo", "ensurepip"}


class Texts(Batches):
    """Batches of texts, of shape ``(size, length + 1)``, cut from one long text.

    With a seed, the first cut of each epoch is at a random position, so that over the epochs every
    byte is predicted from contexts of all lengths.

    Args:
        text: Bytes, of shape ``(n,)``.
        length: Number of bytes to predict in each text.
        size: Texts in a batch.
        seed: Seed of cuts and order; None keeps the order.
        epoch: Returns the number of the current epoch.
        every: Keep one text of so many.

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

    def num_examples(self) -> int:
        texts = (len(self.text) - 1) // self.length
        # A random first cut may leave the last text incomplete.
        return math.ceil((texts - (self.seed is not None)) / self.every)

    def batch_function(self) -> Callable[[Tensor], Tensor]:
        offset = 0
        if self.seed is not None:
            generator = epoch_generator(self.seed, self.epoch())
            offset = int(torch.randint(self.length, (), generator=generator))
        positions = offset + torch.arange(self.length + 1)

        def make_batch(index: Tensor) -> Tensor:
            chosen = self.every * self.length * index[:, None] + positions
            return self.text[chosen.to(self.text.device)].long()

        return make_batch


def split_of(name: str) -> str:
    """Split of a file, by a hash of its name: of ten files, eight train, one validates, one tests.

    Example:
        >>> [split_of(name) for name in ("abc.py", "ast.py", "json/decoder.py")]
        ['train', 'train', 'test']
    """
    number = hashlib.sha256(name.encode()).digest()[0] % 10
    return {8: "val", 9: "test"}.get(number, "train")


@cache
def _library() -> dict[str, Tensor]:
    """Text of each split: its files in order of their names, with a zero byte before each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, bytearray] = {"train": bytearray(), "val": bytearray(), "test": bytearray()}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _EXCLUDED & {*name.parts}:
            parts[split_of(name.as_posix())] += b"\0" + path.read_bytes()
    if min(map(len, parts.values())) < 100_000:
        raise OSError(
            f"{root} does not hold the source code of Python's standard library: choose other "
            "data, or a Python that has it"
        )
    return {name: torch.frombuffer(part, dtype=torch.uint8) for name, part in parts.items()}


class StandardLibrary(pl.LightningDataModule):
    """The standard library of the running Python, split by file: about 8 MB for training.

    It needs no download. Results depend on the version of Python, and compare within one version.

    Args:
        batch_size: Texts in a training batch.
        length: Number of bytes to predict in each text.
        evaluated: Approximate number of bytes to validate on, and of bytes to test on.
        seed: Seed of cuts and order.

    Raises:
        OSError: This Python was installed without its source code.
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
        # Texts from all files, since neighbours are alike.
        every = max(1, len(self.parts[name]) // self.evaluated)
        return Texts(self.parts[name], self.length, size=64, every=every)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0
