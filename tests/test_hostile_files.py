"""Files that somebody damaged or forged, and files of every format version there has been.

The first are small editions of ``python -m fitsmall.experiments.benchmarks.fuzz_file``. A new
format version gets a golden file of each coder: ``python tests/test_hostile_files.py 3`` writes
them for version 3, once, with the code that introduces it; add the number to ``VERSIONS``.
"""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitsmall.compressors import Code, Dense, Factors, Sum, exact, load, same_bits, save
from fitsmall.compressors.file.coding import CODERS
from fitsmall.compressors.file.schema import Entry
from fitsmall.experiments.benchmarks.forged_files import (
    forge,
    greedy,
    mutate,
    put_together,
    seeds,
    take_apart,
)
from fitsmall.experiments.benchmarks.fuzz_file import accepts

VERSIONS = (1, 2, 3)
GOLDEN = Path(__file__).with_name("golden")


@given(st.sampled_from(seeds()), st.integers(0, 2**32))
@settings(
    max_examples=600, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, seed: bytes, dice: int) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(mutate(seed, Random(dice)))
    accepts(path)  # raises for what is neither taken nor refused as it should be


@given(st.binary(max_size=300))
@settings(
    max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_noise_is_refused(tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "noise"
    path.write_bytes(noise)
    assert not accepts(path)


def test_honest_files_are_accepted(tmp_path: Path) -> None:
    for seed in seeds():
        path = tmp_path / "honest"
        path.write_bytes(seed)
        assert accepts(path)
        parts = take_apart(seed)
        assert parts is not None
        assert put_together(parts) == seed


def test_files_that_promise_all_they_may_are_read(tmp_path: Path) -> None:
    taken = []
    for file in greedy(500):
        path = tmp_path / "greedy"
        path.write_bytes(file)
        taken.append(accepts(path, limit=None))
    # All but values that Huffman codes cannot decode from noise.
    assert taken == [True, False, *[True] * 7]


def test_a_few_bytes_cannot_ask_for_a_day_of_work(tmp_path: Path) -> None:
    """As by a full tree of sums, which needs no name for each of its 8,192 parts."""
    path, half = tmp_path / "tree", torch.float16
    tree = Entry("tree", (0,), half, "dense", half)
    for _ in range(13):
        tree = replace(tree, kind="sum", parts=(tree, tree))
    file = forge("ans", [tree], b"")
    assert len(file) < 400
    path.write_bytes(file)
    assert not accepts(path)
    with pytest.raises(ValueError, match=f"lists more than {len(file) + 1024:,} tensors"):
        load(path)


def test_an_honest_directory_may_be_long(tmp_path: Path) -> None:
    tied = torch.ones(1)
    state = {f"layers.{i}.{name}": tied for i in range(1000) for name in ("a", "b", "c")}
    save(tmp_path / "long", state)
    assert len(load(tmp_path / "long")) == 3000


def golden(version: int) -> dict[str, Tensor | Code]:
    """A tensor of every kind there is in a version, by integer arithmetic alone."""
    i = torch.arange(24 * 30).view(24, 30)
    dense = (i * 7919 % 257 - 128) / 64
    sparse = dense * (i * 104729 % 11 == 0)
    shared = ((i * 7919 % 6 - 3) / 4) * (i % 3 == 0)
    found: dict[str, Tensor | Code] = {}
    if version >= 2:
        scales = (2 * i[:, :1] // 30 + 65) / 256
        found |= {"integer.weight": scales * (i * 7919 % 16 - 8), "up": scales.T * (i.T % 7)}
    if version >= 3:
        left, right = Dense(dense[:, :2] / 3), exact(shared[:2])
        product = Factors(left, right, torch.Size([24, 30]))
        kernels = Factors(left, right, torch.Size([4, 5, 6, 6]), "separable")
        found |= {"sum": Sum(exact(sparse), product), "kernels": Sum(kernels, kernels)}
        # One or two of the four weights at the same place of the kernels, 2:4 structure.
        first, second = i[:8, None] * 7919 % 5 % 4, i[:8, None] * 31337 % 7 % 4
        member = torch.arange(4).view(4, 1)
        pairs = ((first == member) | (second == member)).flatten(1) * (i[:8, :1] + 1.0)
        found |= {"pairs": pairs.view(8, 4, 5, 6)}
    return found | {
        "dense.weight": dense,
        "sparse.weight": sparse,
        "shared.weight": shared,
        "tied.weight": shared,
        "half": sparse.half(),
        "brain": shared.bfloat16(),
        "double": dense[:3].double() / 3,
        "conv": sparse.view(6, 4, 5, 6),
        "steps": torch.tensor(123456789),
        "small": (i[:2] % 100).to(torch.int8),
        "mask": i[:2] % 2 == 0,
        "nothing": torch.empty(0, 3),
    }


def golden_file(version: int, coder: str) -> Path:
    """Files of the first two versions have the suffix and the magic of the project's first name."""
    return GOLDEN / f"v{version}_{coder}.{'pressfit' if version < 3 else 'fitsmall'}"


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_every_version_are_read(version: int, coder: str) -> None:
    found = load(golden_file(version, coder))
    expected = golden(version)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        whole = tensor.decode() if isinstance(tensor, Code) else tensor
        assert same_bits(found[name], whole), name


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (VERSIONS[-1] + 1, f"has format version {VERSIONS[-1] + 1}, .*: upgrade fitsmall"),
        (0, "has format version 0, this fitsmall reads versions 1 to 3: no fitsmall wrote it"),
    ],
)
def test_other_versions_say_what_is_needed(version: int, message: str, tmp_path: Path) -> None:
    content = bytearray(golden_file(1, "ans").read_bytes())
    content[4] = version
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "other")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in CODERS:
        version = int(sys.argv[1])
        save(golden_file(version, name), golden(version), name)
