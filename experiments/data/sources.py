"""Where image data comes from: looked for on this machine, else downloaded, and verified.

Files are looked for in a folder of ``$FITSMALL_DATA``, and of ``../shared/data`` beside the
repository and the working directory.
"""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pooch
import torch
from PIL import Image
from torch import Tensor

from fitsmall.compressors.extras import install_command

__all__ = ["Split", "cifar10", "found", "mnist"]

Content = TypeVar("Content")


class Split(NamedTuple):
    """Images as bytes, shape ``(n, channels, height, width)``, and their classes."""

    images: Tensor
    labels: Tensor


def mnist() -> tuple[Split, Split]:
    """60,000 + 10,000 digits of 28 x 28 pixels (LeCun et al.), from the four original files.

    Returns:
        Training and test images, ``(n, 1, 28, 28)``.

    Raises:
        ValueError: A file's content is not the original one.
        OSError: No mirror answers.
    """
    parts = {name: _parse(_obtained("mnist", name, _MNIST_MIRRORS, _verified)) for name in _MNIST}
    train_images, train_labels, test_images, test_labels = parts.values()
    return (
        Split(train_images[:, None], train_labels.long()),
        Split(test_images[:, None], test_labels.long()),
    )


def cifar10() -> tuple[Split, Split]:
    """50,000 + 10,000 images of 32 x 32 pixels in ten classes (Krizhevsky, 2009), from the two
    parquet files of the Hub's dataset ``uoft-cs/cifar10``.

    Images are stored encoded, as PNG or as JPEG, so copies of the dataset may differ in pixels.

    Returns:
        Training and test images, ``(n, 3, 32, 32)``.

    Raises:
        ImportError: pyarrow, which reads parquet, is missing.
        ValueError: A file does not hold such images.
        OSError: The Hub does not answer.
    """
    train, test = (_obtained("cifar10", name, _CIFAR_MIRRORS, _decoded) for name in _CIFAR)
    return train, test


# MD5 of each file's *content*: the gzip containers of the mirrors differ.
_MNIST = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_CIFAR = (
    "plain_text/train-00000-of-00001.parquet",
    "plain_text/test-00000-of-00001.parquet",
)
_CIFAR_MIRRORS = ("https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/",)


def _folders() -> list[Path]:
    named = [Path(os.environ["FITSMALL_DATA"])] if "FITSMALL_DATA" in os.environ else []
    repository = Path(__file__).resolve().parents[2]
    return [*named, *(place.parent / "shared" / "data" for place in (repository, Path.cwd()))]


def found(folder: str, name: str) -> Path:
    """A file that cannot be downloaded, in a folder of ``$FITSMALL_DATA`` or beside it.

    Raises:
        FileNotFoundError: It is in none of them.
    """
    for place in _folders():
        if (place / folder / name).is_file():
            return place / folder / name
    raise FileNotFoundError(
        f"{folder}/{name} is in none of {', '.join(map(str, _folders()))}: put it into a folder, "
        "and name that one in FITSMALL_DATA"
    )


def _obtained(
    folder: str, name: str, mirrors: tuple[str, ...], read: Callable[[Path], Content]
) -> Content:
    """What a file holds, from the first place that has it."""
    for place in _folders():
        if (place / folder / name).is_file():
            return read(place / folder / name)
    problems = []
    for mirror in mirrors:
        cache = pooch.os_cache("fitsmall") / folder
        try:
            path = Path(pooch.retrieve(mirror + name, None, name.rpartition("/")[2], cache))
        except OSError as error:
            problems.append(str(error))
            continue
        try:
            return read(path)
        except ValueError as error:
            path.unlink()  # so that another attempt downloads it anew
            problems.append(str(error))
    raise OSError(
        f"cannot download {name} ({'; '.join(problems)}): put it at {folder}/{name} of a folder, "
        "and name that one in FITSMALL_DATA"
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


@lru_cache(maxsize=2)  # decoding takes seconds, and one run asks for it several times
def _decoded(path: Path) -> Split:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading CIFAR-10 needs {install_command('cifar10')}") from error
    try:
        table = parquet.read_table(path, columns=["img", "label"]).combine_chunks()
        encoded = table["img"].combine_chunks().field("bytes").to_pylist()
        pixels = [np.asarray(Image.open(io.BytesIO(content))) for content in encoded]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(table["label"].to_numpy().copy()).long()
    except (pyarrow.ArrowException, KeyError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no images of CIFAR-10: {error}") from error
    if images.shape[1:] != (3, 32, 32) or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(
            f"{path} holds no images of CIFAR-10 but of shape {tuple(images.shape[1:])}, with "
            f"labels from {labels.min()} to {labels.max()}"
        )
    return Split(images, labels)
