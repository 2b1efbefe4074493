"""Images: read, verified, downloaded, shuffled, augmented."""

import gzip
import hashlib
import io
import struct
import tracemalloc
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from fitsmall.experiments.data import sources
from fitsmall.experiments.data.augmentation import Affine, CropFlip
from fitsmall.experiments.data.images import Cifar10, Digits, ImageBatches, Mnist
from fitsmall.experiments.data.sources import Split
from fitsmall.experiments.data.text import StandardLibrary, Texts


def test_digits_are_split_without_overlap() -> None:
    digits = Digits(batch_size=64, held_out=270)
    digits.setup("fit")
    parts = [digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader()]
    assert [len(part.split.labels) for part in parts] == [1167, 270, 360]
    seen = [
        {hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in part.split.images}
        for part in parts
    ]
    # A few of the 1,797 images are equal pixel for pixel.
    assert len(seen[0] | seen[1] | seen[2]) > 1780
    assert torch.equal(Digits.load()[1].labels, Digits.load()[1].labels)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    split = Split(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))

    def labels(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for _, batch in ImageBatches(split, 6, seed, lambda: epoch)]

    assert labels(0, 3) == labels(0, 3)
    assert labels(0, 3) != labels(0, 4)
    assert labels(0, 3) != labels(1, 3)
    assert [len(batch) for batch in labels(0, 3)] == [6, 6, 6]
    images, order = next(iter(ImageBatches(split, 20, 0)))
    assert torch.equal(images.flatten() * 255, order.float())


def test_batches_go_on_where_they_were() -> None:
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    whole = [batch.tolist() for batch in Texts(text, 10, 8, seed=0, epoch=lambda: 2)]
    begun = Texts(text, 10, 8, seed=0, epoch=lambda: 2)
    first = [batch.tolist() for batch, _ in zip(begun, range(3), strict=False)]
    resumed = Texts(text, 10, 8, seed=0, epoch=lambda: 2)
    # The loop above has taken a fourth batch to find that it was not needed.
    resumed.load_state_dict(begun.state_dict() | {"taken": 3})
    assert first + [batch.tolist() for batch in resumed] == whole
    assert begun.state_dict() == {"epoch": 2, "taken": 4}
    assert [batch.tolist() for batch in resumed] == whole  # the next epoch begins at its beginning


def test_the_standard_library_is_split_by_file() -> None:
    data = StandardLibrary(batch_size=4, length=64, evaluated=6_400)
    data.setup("fit")
    parts = {name: bytes(part.tolist()) for name, part in data.parts.items()}
    assert len(parts["train"]) > 5 * max(len(parts["val"]), len(parts["test"])) > 500_000
    assert b"class JSONDecoder(object):" in parts["test"]
    assert not any(b"class JSONDecoder(object):" in parts[name] for name in ("train", "val"))
    texts = next(iter(data.train_dataloader()))
    assert texts.shape == (4, 65)
    assert all(bytes(text.tolist()) in parts["train"] for text in texts)
    evaluated = [bytes(text.tolist()) for texts in data.test_dataloader() for text in texts]
    assert sum(map(len, evaluated)) == pytest.approx(6_400, rel=0.1)
    assert all(text in parts["test"] for text in evaluated)
    # They come from everywhere.
    assert parts["test"].index(evaluated[-1]) > 0.95 * len(parts["test"]) - 65


def test_augmentation_moves_an_image_by_whole_pixels() -> None:
    class OnePixel(Affine):
        def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            torch.rand = lambda count, generator: torch.ones(count)  # type: ignore[assignment]
            try:
                return super().__call__(images, generator)
            finally:
                torch.rand = original  # type: ignore[assignment]

    original = torch.rand
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1.0
    moved = OnePixel(shift=1.0)(image, torch.Generator())
    assert moved[0, 0, 3, 3] == pytest.approx(1.0, abs=1e-5)
    assert moved.sum() == pytest.approx(1.0, abs=1e-4)


def test_augmentation_ends_before_the_training_does() -> None:
    split = Split(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8), torch.arange(4))

    def images(epoch: int) -> torch.Tensor:
        batches = ImageBatches(split, 4, 0, lambda: epoch, Affine(shift=3.0), until=2)
        return next(iter(batches))[0]

    assert not torch.equal(images(1), images(2))
    assert torch.equal(images(2), torch.full((4, 1, 8, 8), 200 / 255))


def idx(array: torch.Tensor) -> bytes:
    head = struct.pack(">HBB", 0, 8, array.dim())
    return head + struct.pack(f">{array.dim()}i", *array.shape) + array.numpy().tobytes()


def test_mnist_is_read_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3)
    labels = torch.tensor([7, 1], dtype=torch.uint8)
    (tmp_path / "mnist").mkdir()
    digests = {}
    for name in sources._MNIST:
        content = idx(images if "images" in name else labels)
        digests[name] = hashlib.md5(content).hexdigest()
        (tmp_path / "mnist" / name).write_bytes(gzip.compress(content))
    monkeypatch.setenv("FITSMALL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is not the original MNIST file"):
        Mnist.load()
    monkeypatch.setattr(sources, "_MNIST", digests)
    train, test = Mnist.load()
    bomb, *_ = (tmp_path / "mnist").iterdir()
    bomb.write_bytes(gzip.compress(bytes(2**27), 1))  # half a megabyte
    tracemalloc.start()
    with pytest.raises(ValueError, match="is not the original MNIST file"):
        Mnist.load()
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert torch.equal(train.images[:, 0], images)
    assert test.labels.tolist() == [7, 1]


def test_mnist_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setenv("FITSMALL_DATA", str(tmp_path))
    monkeypatch.setattr(sources, "_search_path", list)
    monkeypatch.setattr(sources.pooch, "retrieve", refuse)
    with pytest.raises(OSError, match=r"no network.*FITSMALL_DATA"):
        Mnist.load()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_mnist_is_downloaded_once_and_damage_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    digests = {}
    for name in sources._MNIST:
        content = idx(torch.zeros(2, 3, 3, dtype=torch.uint8))
        digests[name] = hashlib.md5(content).hexdigest()
        (served / name).write_bytes(gzip.compress(content)[:-9])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("FITSMALL_DATA", raising=False)
    monkeypatch.setattr(sources, "_search_path", list)
    monkeypatch.setattr(sources, "_MNIST", digests)
    monkeypatch.setattr(sources, "_MNIST_MIRRORS", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(sources.pooch, "os_cache", lambda _: cache)
    with pytest.raises(OSError, match="is damaged"):
        Mnist.load()
    for path in served.iterdir():
        path.write_bytes(gzip.compress(idx(torch.zeros(2, 3, 3, dtype=torch.uint8))))
    assert Mnist.load()[0].images.shape == (2, 1, 3, 3)
    server.shutdown()
    assert Mnist.load()[1].images.shape == (2, 1, 3, 3)  # from the cache


def encoded(images: torch.Tensor) -> list[dict[str, object]]:
    rows = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    return rows


def write_cifar(folder: Path, images: torch.Tensor, labels: list[int]) -> None:
    for name in sources._CIFAR:
        path = folder / "cifar10" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"img": encoded(images), "label": labels}), path)
    sources._read_cifar10.cache_clear()


def test_cifar10_is_read_from_the_columns_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITSMALL_DATA", str(tmp_path))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    write_cifar(tmp_path, images, [3, 0, 9, 1])
    train, test = Cifar10.load()
    assert torch.equal(train.images, images)
    assert test.labels.tolist() == [3, 0, 9, 1]


def test_what_is_no_cifar10_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITSMALL_DATA", str(tmp_path))
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    write_cifar(tmp_path, images, [3, 10])
    with pytest.raises(ValueError, match=r"train-00000.*labels go from 3 to 10"):
        Cifar10.load()
    write_cifar(tmp_path, images[..., :28], [3, 1])
    with pytest.raises(ValueError, match=r"train-00000.*shape \(3, 32, 28\)"):
        Cifar10.load()
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "cifar10" / sources._CIFAR[0])
    with pytest.raises(ValueError, match=r"train-00000.*does not hold CIFAR-10"):
        Cifar10.load()
    (tmp_path / "cifar10" / sources._CIFAR[0]).write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"train-00000.*does not hold CIFAR-10"):
        Cifar10.load()


def test_crops_are_windows_of_the_image_in_a_border() -> None:
    images = torch.arange(1.0, 1 + 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for seed in range(40):
        moved = CropFlip(border=2)(images, torch.Generator().manual_seed(seed)).numpy()
        for number in range(2):
            windows = {
                (row, column, flip): padded[number, :, row : row + 4, column : column + 5][
                    ..., ::flip
                ]
                for row in range(5)
                for column in range(5)
                for flip in (1, -1)
            }
            found = [at for at, window in windows.items() if np.array_equal(window, moved[number])]
            assert len(found) == 1
            seen.add(found[0])
    assert {flip for *_, flip in seen} == {1, -1}
    assert {row for row, *_ in seen} == {column for _, column, _ in seen} == set(range(5))
