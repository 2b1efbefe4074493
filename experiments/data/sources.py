"""Files of image data: found on this machine or downloaded, and verified.

Files are searched in the folder ``$FITSMALL_DATA``, and in folders ``shared/data`` next to the
repository and next to the working directory.
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

__all__ = ["Split", "cifar10", "find_file", "mnist"]

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
        ValueError: The content of a file differs from the original.
        OSError: The files are not on this machine, and no mirror answers.
    """
    train_images, train_labels, test_images, test_labels = (
        _parse_idx(_read_or_download("mnist", name, _MNIST_MIRRORS, _read_mnist)) for name in _MNIST
    )
    return (
        Split(train_images[:, None], train_labels.long()),
        Split(test_images[:, None], test_labels.long()),
    )


def cifar10() -> tuple[Split, Split]:
    """50,000 + 10,000 images of 32 x 32 pixels in ten classes (Krizhevsky, 2009).

    They come from the two parquet files of ``uoft-cs/cifar10`` on the Hugging Face Hub. Those hold
    PNG or JPEG images, so copies of the data set may differ in their pixels.

    Returns:
        Training and test images, ``(n, 3, 32, 32)``.

    Raises:
        ImportError: pyarrow, which reads parquet, is not installed.
        ValueError: A file does not hold such images.
        OSError: The files are not on this machine, and the Hub does not answer.
    """
    train, test = (
        _read_or_download("cifar10", name, _CIFAR_MIRRORS, _read_cifar10) for name in _CIFAR
    )
    return train, test


# MD5 of each file's *content*: the gzip containers of the mirrors differ.
_MNIST = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}
_MNIST_BYTES = 16 + 60_000 * 28 * 28  # of the largest file, unpacked
_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_CIFAR = (
    "plain_text/train-00000-of-00001.parquet",
    "plain_text/test-00000-of-00001.parquet",
)
_CIFAR_MIRRORS = ("https://huggingface.co/datasets/uoft-cs/cifar10/resolve/main/",)


def find_file(folder: str, name: str) -> Path:
    """Find a file that cannot be downloaded.

    Args:
        folder: Folder within each of the places that are searched.
        name: Name of the file in it.

    Raises:
        FileNotFoundError: It is in none of them.
    """
    path = _find(folder, name)
    if path is None:
        raise FileNotFoundError(
            f"{folder}/{name} is in none of {', '.join(map(str, _search_path()))}: put it into a "
            "folder, and name that folder in the variable FITSMALL_DATA"
        )
    return path


def _find(folder: str, name: str) -> Path | None:
    paths = (place / folder / name for place in _search_path())
    return next((path for path in paths if path.is_file()), None)


def _search_path() -> list[Path]:
    named = [Path(os.environ["FITSMALL_DATA"])] if "FITSMALL_DATA" in os.environ else []
    repository = Path(__file__).resolve().parents[2]
    return [*named, *(place.parent / "shared" / "data" for place in (repository, Path.cwd()))]


def _read_or_download(
    folder: str, name: str, mirrors: tuple[str, ...], read: Callable[[Path], Content]
) -> Content:
    """Content of a file on this machine, or else from the first mirror that has it."""
    if path := _find(folder, name):
        return read(path)
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
            path.unlink()  # the next attempt downloads it again
            problems.append(str(error))
    raise OSError(
        f"cannot download {name} ({'; '.join(problems)}): save it as {folder}/{name} in a folder, "
        "and name that folder in the variable FITSMALL_DATA"
    )


def _read_mnist(path: Path) -> bytes:
    """Unpack a file and verify its checksum."""
    try:
        with gzip.open(path) as file:
            content = file.read(_MNIST_BYTES + 1)  # a small file can hold gigabytes of zeros
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if hashlib.md5(content).hexdigest() != _MNIST[path.name]:
        raise ValueError(f"{path} is not the original MNIST file: its checksum differs")
    return content


def _parse_idx(content: bytes) -> Tensor:
    """Tensor of an idx file: two zeros, type, number of sizes, sizes (big-endian), bytes."""
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(pixels.reshape(shape).copy())


@lru_cache(maxsize=2)  # decoding takes seconds, and a run needs the images several times
def _read_cifar10(path: Path) -> Split:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"CIFAR-10 needs pyarrow: {install_command('cifar10')}") from error
    try:
        table = parquet.read_table(path, columns=["img", "label"]).combine_chunks()
        encoded = table["img"].combine_chunks().field("bytes").to_pylist()
        pixels = [np.asarray(Image.open(io.BytesIO(content))) for content in encoded]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(table["label"].to_numpy().copy()).long()
    except (pyarrow.ArrowException, KeyError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold CIFAR-10: {error}") from error
    if images.shape[1:] != (3, 32, 32) or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(
            f"{path} does not hold CIFAR-10: its images have the shape {tuple(images.shape[1:])}, "
            f"and its labels go from {labels.min()} to {labels.max()}"
        )
    return Split(images, labels)
