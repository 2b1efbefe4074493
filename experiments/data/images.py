"""Image data held as tensors: a minibatch is one indexing operation, never a loop over examples.

Images are bytes on the device that trains, and are augmented there.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fitsmall.experiments.data.augmentation import Augmentation
from fitsmall.experiments.data.batches import Batches, epoch_generator
from fitsmall.experiments.data.sources import Split, cifar10, mnist

__all__ = ["Cifar10", "Digits", "ImageBatches", "Images", "Mnist"]


class ImageBatches(Batches):
    """Minibatches ``(images in [0, 1], labels)`` of a split.

    Args:
        split: Images and labels.
        size: Examples in a batch.
        seed: Seed of the order and of the augmentation; None keeps the order.
        epoch: Returns the number of the current epoch.
        augment: Transformation of the images, see :mod:`~fitsmall.experiments.data.augmentation`.
        reuse: Number of epochs with the same augmented images, each in another order.
        until: Number of epochs with augmentation.
        mean: Image to subtract from each image.

    Example:
        >>> split = Split(torch.full((5, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(5))
        >>> [labels.tolist() for images, labels in ImageBatches(split, size=2)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        augment: Augmentation | None = None,
        reuse: int = 1,
        until: float = math.inf,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__(size, seed, epoch)
        self.split, self.mean = split, mean
        self.augment, self.reuse, self.until = augment, reuse, until
        self._augmented = (-1, split.images)

    def num_examples(self) -> int:
        return len(self.split.labels)

    def batch_function(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        images = self._augmented_images()

        def make_batch(index: Tensor) -> tuple[Tensor, Tensor]:
            index = index.to(images.device)
            chosen = images[index].float().div_(255)
            if self.mean is not None:
                chosen.sub_(self.mean)
            return chosen, self.split.labels[index]

        return make_batch

    def _augmented_images(self) -> Tensor:
        if self.augment is None or self.epoch() >= self.until:
            return self.split.images
        number = self.epoch() // self.reuse
        if self._augmented[0] != number:
            generator = epoch_generator(self.seed or 0, number)
            # In blocks that fit into a processor's cache.
            blocks = self.split.images.split(512)
            moved = [self.augment(block.float(), generator).round_().byte() for block in blocks]
            self._augmented = (number, torch.cat(moved))
        return self._augmented[1]


class Images(pl.LightningDataModule):
    """Images for training, validation and test.

    Args:
        batch_size: Images in a training batch.
        held_out: Number of training images kept for validation. All choices are made by them.
        seed: Seed of the order of batches and of the augmentation.
        augment: Transformation of the training images.
        reuse: Number of epochs with the same augmented images.
        augment_until: Fraction of the epochs with augmentation. A small network gains from ending
            on images like those of the test.
        centre: Whether to subtract the mean of all training images, held-out ones included.

    Raises:
        ValueError: ``augment_until`` is not in [0, 1].
    """

    def __init__(
        self,
        batch_size: int,
        held_out: int,
        seed: int = 0,
        augment: Augmentation | None = None,
        reuse: int = 1,
        augment_until: float = 1.0,
        centre: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= augment_until <= 1.0:
            raise ValueError(
                f"augment_until is a fraction of the epochs, in [0, 1]; got {augment_until}"
            )
        self.batch_size, self.held_out, self.seed = batch_size, held_out, seed
        self.augment, self.reuse, self.augment_until = augment, reuse, augment_until
        self.centre = centre
        self.mean: Tensor | None = None
        self.splits: tuple[Split, Split] | None = None

    @staticmethod
    @abstractmethod
    def load() -> tuple[Split, Split]:
        """Training and test images."""

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        train, test = self.splits or self.load()
        self.splits = (
            Split(*(tensor.to(device) for tensor in train)),
            Split(*(tensor.to(device) for tensor in test)),
        )
        if self.centre:
            self.mean = self.splits[0].images.float().mean(0) / 255

    def train_dataloader(self) -> ImageBatches:
        split = Split(*(tensor[: -self.held_out or None] for tensor in self._get_split(0)))
        until = math.inf
        if self.trainer and self.augment_until < 1:
            if (self.trainer.max_epochs or -1) < 0:
                raise ValueError(
                    "augment_until is a fraction of the epochs: set trainer.max_epochs"
                )
            until = self.augment_until * self.trainer.max_epochs  # type: ignore[operator]
        return ImageBatches(
            split,
            self.batch_size,
            self.seed,
            self._epoch,
            self.augment,
            self.reuse,
            until,
            self.mean,
        )

    def val_dataloader(self) -> ImageBatches:
        kept = [tensor[len(tensor) - self.held_out :] for tensor in self._get_split(0)]
        return ImageBatches(Split(*kept), size=2048, mean=self.mean)

    def test_dataloader(self) -> ImageBatches:
        return ImageBatches(self._get_split(1), size=2048, mean=self.mean)

    def _get_split(self, number: int) -> Split:
        assert self.splits is not None, "setup() comes first"
        return self.splits[number]

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0


class Digits(Images):
    """1,797 digits of 8 x 8 pixels from scikit-learn: 1,167 train, 270 are held out, 360 test.

    The split is random but fixed, since the original order is by writer.
    """

    @staticmethod
    def load() -> tuple[Split, Split]:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=epoch_generator(0, 0))
        pixels = torch.from_numpy(digits.images)[order, None]
        images, labels = (pixels * 255 / 16).round().byte(), torch.from_numpy(digits.target)[order]
        return Split(images[:-360], labels[:-360]), Split(images[-360:], labels[-360:])


class Mnist(Images):
    """60,000 + 10,000 digits of 28 x 28 pixels, see
    :func:`~fitsmall.experiments.data.sources.mnist`."""

    load = staticmethod(mnist)


class Cifar10(Images):
    """50,000 + 10,000 images of 3 x 32 x 32 pixels in ten classes, see
    :func:`~fitsmall.experiments.data.sources.cifar10`."""

    load = staticmethod(cifar10)
