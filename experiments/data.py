"""Image data held as tensors: a minibatch is one indexing operation, never a loop over samples."""

import gzip
import hashlib
import math
import os
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import pooch
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["Augment", "Batches", "Digits", "Images", "Mnist", "Split"]


class Split(NamedTuple):
    """Images as bytes, shape ``(n, channels, height, width)``, and their classes."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Augment:
    """A random affine map of each image: ``x -> A x + b`` about the centre, bilinear.

    Args:
        shift: Most pixels that an image moves, in each direction.
        rotation: Most degrees that it turns.
        scale: Most that it grows or shrinks in width and, on its own, in height, as a fraction.
        shear: Most that a line leans, as a fraction.

    Example:
        >>> image = torch.eye(8).view(1, 1, 8, 8)
        >>> still = Augment()(image, torch.Generator())
        >>> torch.allclose(still, image, atol=1e-5)
        True
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Moved copies of float images ``(n, channels, height, width)``."""
        count, _, height, width = images.shape

        def within(bound: float) -> Tensor:
            return (2 * torch.rand(count, generator=random) - 1) * bound

        angle = within(math.radians(self.rotation))
        wide, high, lean = 1 + within(self.scale), 1 + within(self.scale), within(self.shear)
        # The grid spans -1 to 1, so a pixel is 2 / width of it.
        right, down = within(2 * self.shift / width), within(2 * self.shift / height)
        rows = [wide * angle.cos(), lean - wide * angle.sin(), right]
        rows += [high * angle.sin(), high * angle.cos(), down]
        maps = torch.stack(rows, 1).view(count, 2, 3)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


class Batches:
    """Minibatches ``(images in [0, 1], labels)`` of a split.

    Without a seed they come in order and complete. With one they are shuffled, the last
    incomplete one is left out, and an epoch is a pure function of the seed and its number: a
    resumed run sees the batches that an uninterrupted one would have seen.

    Args:
        split: Images and labels.
        size: Examples in a batch.
        seed: Seed of the order and of the augmentation; None keeps the order.
        epoch: Returns the number of the epoch that an iteration is for.
        augment: Transformation of the images, see :class:`Augment`.
        reuse: Epochs that see the same transformed images, in another order each.
        until: Epoch from which on images are left as they are.

    Example:
        >>> split = Split(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
        >>> [labels.tolist() for images, labels in Batches(split, size=2)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        augment: Augment | None = None,
        reuse: int = 1,
        until: float = math.inf,
    ) -> None:
        self.split, self.size, self.seed = split, size, seed
        self.epoch, self.augment, self.reuse, self.until = epoch, augment, reuse, until
        self._transformed = (-1, split.images)

    def __len__(self) -> int:
        count = len(self.split.labels)
        return math.ceil(count / self.size) if self.seed is None else count // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.split.labels))
        if self.seed is not None:
            order = order[torch.randperm(len(order), generator=_generator(self.seed, self.epoch()))]
        images = self._images()
        for index in order.split(self.size)[: len(self)]:
            yield images[index].float().div_(255), self.split.labels[index]

    def _images(self) -> Tensor:
        if self.augment is None or self.epoch() >= self.until:
            return self.split.images
        number = self.epoch() // self.reuse
        if self._transformed[0] != number:
            random = _generator(self.seed or 0, number)
            # In blocks that fit a processor's cache.
            blocks = self.split.images.split(512)
            moved = [self.augment(block.float(), random).round_().byte() for block in blocks]
            self._transformed = (number, torch.cat(moved))
        return self._transformed[1]


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


class Images(pl.LightningDataModule):
    """Training, held-out and test images.

    Args:
        batch_size: Examples in a training batch.
        held_out: Training images kept apart for validation: they make every choice.
        seed: Seed of the order of batches and of the augmentation.
        augment: Transformation of the training images.
        reuse: Epochs that see the same transformed images.
        augment_until: Fraction of the epochs after which training images are left as they are: a
            small network cannot afford to end on images that it will never be asked about.
    """

    def __init__(
        self,
        batch_size: int,
        held_out: int,
        seed: int = 0,
        augment: Augment | None = None,
        reuse: int = 1,
        augment_until: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= augment_until <= 1.0:
            raise ValueError(f"augment_until is a fraction of the epochs, got {augment_until}")
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self.augment, self.reuse, self.augment_until = augment, reuse, augment_until
        self.splits: tuple[Split, Split] | None = None

    @staticmethod
    @abstractmethod
    def load() -> tuple[Split, Split]:
        """Training and test images."""

    def setup(self, stage: str) -> None:
        self.splits = self.splits or self.load()

    def train_dataloader(self) -> Batches:
        split = Split(*(tensor[: -self.held_out or None] for tensor in self._split(0)))
        until = math.inf
        if self.trainer and self.augment_until < 1:
            if (self.trainer.max_epochs or -1) < 0:
                raise ValueError("augment_until is a fraction of the epochs: set max_epochs")
            until = self.augment_until * self.trainer.max_epochs  # type: ignore[operator]
        return Batches(
            split, self.batch_size, self.seed, self._epoch, self.augment, self.reuse, until
        )

    def val_dataloader(self) -> Batches:
        kept = [tensor[len(tensor) - self.held_out :] for tensor in self._split(0)]
        return Batches(Split(*kept), size=2048)

    def test_dataloader(self) -> Batches:
        return Batches(self._split(1), size=2048)

    def _split(self, which: int) -> Split:
        assert self.splits is not None, "setup comes first"
        return self.splits[which]

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0


class Digits(Images):
    """1,797 digits of 8 x 8 pixels, bundled with scikit-learn: 1,167 train, 270 held out, 360 test.

    The parts are drawn once for all: the original order goes by writer.
    """

    @staticmethod
    def load() -> tuple[Split, Split]:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=_generator(0, 0))
        pixels = torch.from_numpy(digits.images)[order, None]
        images, labels = (pixels * 255 / 16).round().byte(), torch.from_numpy(digits.target)[order]
        return Split(images[:-360], labels[:-360]), Split(images[-360:], labels[-360:])


class Mnist(Images):
    """60,000 + 10,000 digits of 28 x 28 pixels (LeCun et al.); the last of the 60,000 are held out.

    The four original files are looked for in ``$PRESSFIT_DATA/mnist`` and in
    ``../shared/data/mnist`` beside the repository and the working directory, else they are
    downloaded.

    Raises:
        ValueError: A file's content is not the original one.
        OSError: No mirror answers.
    """

    @staticmethod
    def load() -> tuple[Split, Split]:
        parts = {name: _parse(_content(name)) for name in _MNIST}
        train_images, train_labels, test_images, test_labels = parts.values()
        return (
            Split(train_images[:, None], train_labels.long()),
            Split(test_images[:, None], test_labels.long()),
        )


# MD5 of each file's *content*: the gzip containers of the mirrors differ.
_MNIST = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def _beside() -> list[Path]:
    """Where data may lie: beside the repository, or beside the working directory."""
    repository = Path(__file__).resolve().parents[1]
    return [folder.parent / "shared" / "data" for folder in (repository, Path.cwd())]


def _content(name: str) -> bytes:
    named = [Path(os.environ["PRESSFIT_DATA"])] if "PRESSFIT_DATA" in os.environ else []
    for folder in [*named, *_beside()]:
        if (folder / "mnist" / name).is_file():
            return _verified(folder / "mnist" / name)
    problems = []
    for mirror in _MIRRORS:
        try:
            path = Path(pooch.retrieve(mirror + name, None, name, pooch.os_cache("pressfit")))
        except OSError as error:
            problems.append(str(error))
            continue
        try:
            return _verified(path)
        except ValueError as error:
            path.unlink()  # so that another attempt downloads it anew
            problems.append(str(error))
    raise OSError(
        f"cannot download {name} ({'; '.join(problems)}): put the four MNIST files into a folder "
        "mnist and name its parent in PRESSFIT_DATA"
    )


def _verified(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if hashlib.md5(content).hexdigest() != _MNIST[path.name]:
        raise ValueError(f"{path} is not the original MNIST file: its checksum differs")
    return content


def _parse(content: bytes) -> Tensor:
    """The tensor of an idx file: two zeros, type, number of sizes, sizes (big-endian), bytes."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(pixels.reshape(shape).copy())
