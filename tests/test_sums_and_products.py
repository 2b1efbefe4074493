"""Codes that are made of other codes: they come back bit for bit, however deeply they nest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitsmall.compressors import (
    Code,
    Dense,
    Factors,
    Integer,
    KMeans,
    Lookup,
    Quantize,
    Sparse,
    Sum,
    TopK,
    Truncate,
    inspect,
    load,
    read,
    same_bits,
    save,
)
from fitsmall.compressors.codes.dtypes import FLOATS
from fitsmall.compressors.codes.lattice import spread
from fitsmall.compressors.codes.product import product
from fitsmall.compressors.file.coding import CODERS
from fitsmall.compressors.file.reader import entries
from fitsmall.compressors.file.schema import MAX_DEPTH, Entry
from fitsmall.compressors.file.writer import estimate
from fitsmall.experiments.benchmarks.forged_files import forge


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(kind: str, weight: Tensor) -> Code:
    """A code of some kind that is like a weight."""
    mask = weight > 0
    if kind == "sparse":
        return Sparse(mask, Dense(weight[mask]))
    if kind == "shared":
        return KMeans(3).encode(weight)
    if kind == "pruned and shared":
        return Sparse(mask, KMeans(3).encode(weight[mask]))
    if kind == "integer":
        return Quantize(bits=4).encode(weight)
    if kind == "coded leaves":
        return Sparse(mask, TopK(0.5).encode(weight[mask]))
    return Dense(weight)


@st.composite
def trees(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, depth: int = 3) -> Code:
    """Sums and products of all kinds of codes, of all magnitudes."""
    kinds = ["dense", "sparse", "shared", "pruned and shared", "integer", "coded leaves"]
    kind = draw(st.sampled_from([*kinds, *["sum", "product"] * depth]))
    if kind == "sum":
        return Sum(*(draw(trees(shape, dtype, depth - 1)) for _ in range(2)))
    if kind == "product":
        rank = draw(st.integers(0, 3))
        form = draw(st.sampled_from(["channels", "separable"])) if len(shape) == 4 else "channels"
        rows, columns = shape[0], int(np.prod(shape[1:]))
        if form == "separable":
            rows, columns = shape[0] * shape[2], shape[1] * shape[3]
        left, right = (
            draw(trees(size, dtype, depth - 1)) for size in ((rows, rank), (rank, columns))
        )
        return Factors(left, right, torch.Size(shape), form)
    magnitude = draw(st.sampled_from([1.0, 1e-3, 30.0]))
    weight = random(*shape, seed=draw(st.integers(0, 99)), dtype=dtype) * magnitude
    return leaf(kind, weight)


@given(st.data())
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_tree_of_codes_comes_back(tmp_path: Path, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(4, 6), (3, 2, 2, 3), (1, 5, 2)]))
    dtype = data.draw(st.sampled_from(FLOATS))
    code = data.draw(trees(shape, dtype))
    path, coder = tmp_path / "tree", data.draw(st.sampled_from([*CODERS]))
    size = save(path, {"w": code}, coder)
    assert same_bits(load(path)["w"], code.decode())
    report = inspect(path)
    assert sum(tensor.bytes for tensor in report.tensors) + report.overhead == report.total == size


@dataclass(frozen=True, eq=False)
class Negated(Code):
    """A code of somebody else's."""

    of: Code

    @property
    def shape(self) -> torch.Size:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def decode(self) -> Tensor:
        return -self.of.decode()

    def bits(self) -> float:
        return self.of.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Negated(self.of.map(encode))


WEIGHT = random(8, 12)
SCALES = random(8, 1).abs()
UNUSUAL: dict[str, Code] = {
    "a class of somebody else's": Negated(Dense(WEIGHT)),
    "a pruned codebook": (KMeans(5) | TopK(0.5)).encode(WEIGHT),
    "a shared codebook": (KMeans(5) | KMeans(2)).encode(WEIGHT),
    "shared scales": (Quantize(4) | KMeans(2)).encode(WEIGHT),
    "a sum of survivors": (TopK(0.5) | (KMeans(2) + TopK(0.5))).encode(WEIGHT),
    "a codebook larger than the tensor": Lookup(Dense(torch.arange(9.0)), torch.tensor([[7, 1]])),
    "a codebook too large to index": Lookup(Dense(torch.arange(7e4)), torch.tensor([[7, 69_999]])),
    "integers without weights": Integer(Dense(SCALES[:1]), torch.empty(1, 0, dtype=torch.int8)),
    "a type that is not compared": Lookup(Dense(torch.tensor([3j, 9.0])), torch.tensor([0, 1])),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_the_file_has_no_kind_for_comes_back_too(name: str, tmp_path: Path) -> None:
    code = UNUSUAL[name]
    size = save(tmp_path / "a", {"w": code})
    assert same_bits(load(tmp_path / "a")["w"], code.decode())
    assert estimate({"w": code}) == pytest.approx(size, abs=3)


def test_what_is_nested_too_deeply_is_added_up(tmp_path: Path) -> None:
    code: Code = Dense(WEIGHT)
    for seed in range(MAX_DEPTH + 3):
        code = Sum(code, TopK(0.9).encode(random(8, 12, seed=seed)))
    save(tmp_path / "deep", {"w": code})
    assert same_bits(load(tmp_path / "deep")["w"], code.decode())
    (entry,) = entries(tmp_path / "deep")[1]
    for _ in range(MAX_DEPTH):
        assert entry.kind == "sum"
        entry = entry.parts[0]
    assert entry.kind == "dense"


def test_a_product_is_smaller_than_what_it_multiplies_to(tmp_path: Path) -> None:
    weight = random(60, 5) @ random(5, 80) + 9 * (random(60, 80, seed=1) > 2)
    code = (Truncate(rank=5) + TopK(0.95)).encode(weight)
    size = save(tmp_path / "sum", {"w": code})
    assert size < 0.5 * save(tmp_path / "plain", {"w": code.decode()})
    assert size == pytest.approx(estimate({"w": code}), rel=0.01)
    (tensor,) = inspect(tmp_path / "sum").tensors
    assert (tensor.kept, tensor.bytes_dense) == (4800, 4 * 4800)
    assert tensor.bytes < tensor.shared_bytes < tensor.bytes_dense
    assert [entry.shape for entry, _ in read(tmp_path / "sum")] == [(60, 80)]


def test_a_code_under_several_names_is_stored_and_multiplied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Truncate(rank=2).encode(WEIGHT)
    once = save(tmp_path / "once", {"a": code})
    stored = {"a": code, "b": Sum(code, code), "c": code}
    assert save(tmp_path / "a", {"a": code, "c": code, "d": code}) < once + 20
    assert save(tmp_path / "a", stored) == pytest.approx(estimate(stored), abs=5)
    products = []
    monkeypatch.setattr(
        "fitsmall.compressors.file.reader.product",
        lambda left, right: products.append(left) or product(left, right),
    )
    found = load(tmp_path / "a")
    assert len(products) == 3
    assert same_bits(found["a"], code.decode())
    found["a"].zero_()
    assert same_bits(found["c"], code.decode())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_are_added_in_order_in_double_precision(dtype: torch.dtype) -> None:
    left, right = random(3, 40, dtype=dtype), random(40, 4, seed=1, dtype=dtype)
    # Python's floats are doubles, which it multiplies and adds one by one.
    expected = [[0.0] * 4 for _ in range(3)]
    for i in range(3):
        for j in range(4):
            for a, b in zip(left[i].tolist(), right[:, j].tolist(), strict=True):
                expected[i][j] += a * b
    rounded = torch.tensor(expected, dtype=torch.float64)
    if dtype != torch.float64:
        rounded = rounded.float().to(dtype)
    assert same_bits(product(left, right), rounded)


def test_rows_of_a_product_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = random(50, 7), random(7, 30)
    whole = product(left, right)
    monkeypatch.setattr("fitsmall.compressors.codes.product._BLOCK", 64)
    assert same_bits(product(left, right), whole)


def test_products_of_almost_nothing_are_padded(tmp_path: Path) -> None:
    """As many terms as the factors' few bytes could keep a reader busy with are not for free."""
    ones = Lookup(Dense(torch.tensor([0.5])), torch.zeros(2048, 8, dtype=torch.uint8))
    code = Factors(ones, Lookup(ones.codebook, ones.index.T), torch.Size([2048, 2048]))
    assert 60 < save(tmp_path / "a", {"w": code}) < 150
    assert same_bits(load(tmp_path / "a")["w"], torch.full((2048, 2048), 2.0))
    assert entries(tmp_path / "a")[1][0].padding > 0


F32 = torch.float32
ZEROS = Entry("w", (64, 64), F32, "sparse", positions=1)


def nested(depth: int) -> Entry:
    entry = ZEROS
    for _ in range(depth):
        entry = Entry("w", (64, 64), F32, "sum", parts=(entry, ZEROS))
    return entry


FORGED = {
    "nested more than 16 times": nested(MAX_DEPTH + 1),
    "more terms than its bytes allow": Entry(
        "w",
        (2048, 2048),
        F32,
        "product",
        parts=(
            Entry("w", (2048, 9), F32, "sparse", positions=1),
            Entry("w", (9, 2048), F32, "sparse", positions=1),
        ),
    ),
    "torch.int32, but a sum": Entry("w", (), torch.int32, "sum", parts=(ZEROS, ZEROS)),
    "is no matrix": Entry("w", (9,), F32, "product", parts=(ZEROS, ZEROS)),
    "part that is tied": Entry("w", (9,), F32, "sum", parts=(ZEROS, Entry("", (), F32, "alias"))),
    "an impossible shape": Entry(
        "w",
        (9, 9),
        F32,
        "product",
        parts=(Entry("w", (9, 2**50), F32, "sparse"), Entry("w", (2**50, 9), F32, "sparse")),
    ),
    "wrong number of values": Entry(
        "w", (9,), F32, "sum", parts=(ZEROS, Entry("w", (9,), F32, "dense", floats=8))
    ),
    "do not add up": Entry("w", (64, 64), F32, "sum", parts=(ZEROS, ZEROS), padding=99),
}


@pytest.mark.parametrize("message", FORGED)
def test_forged_sums_and_products_are_refused(message: str, tmp_path: Path) -> None:
    entry = FORGED[message]
    length = 2 if message == "do not add up" else entry.bytes
    (tmp_path / "forged").write_bytes(forge("ans", [entry], bytes(length)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "forged")


def test_parts_count_towards_the_limit(tmp_path: Path) -> None:
    """Each part of a sum has to be decoded, and both factors and their product are in memory."""
    for entry, asked in (
        (nested(3), 4 * 4 * 64**2),
        (
            Entry(
                "w",
                (8, 8),
                F32,
                "product",
                parts=(
                    Entry("w", (8, 1000), F32, "sparse", positions=1),
                    Entry("w", (1000, 8), F32, "sparse", positions=1),
                ),
            ),
            4 * (64 + 2 * 8000),
        ),
    ):
        (tmp_path / "a").write_bytes(forge("ans", [entry], b"\1" * entry.bytes))
        assert not load(tmp_path / "a", limit=asked)["w"].any()
        with pytest.raises(ValueError, match=f"pass limit={asked}"):
            load(tmp_path / "a", limit=asked - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum(Dense(torch.ones(2, 3)), Dense(torch.ones(3, 2))), "of one shape and dtype"),
        (lambda: Sum(Dense(torch.ones(2)), Dense(torch.ones(2).double())), "of one shape and"),
        (lambda: Sum(*[Dense(torch.ones(2, dtype=torch.bool))] * 2), "two floating-point tensors"),
        (
            lambda: Factors(Dense(torch.ones(4, 2)), Dense(torch.ones(3, 5)), torch.Size([4, 5])),
            r"factors of \(4, 2\) and \(3, 5\) do not give a weight of shape \(4, 5\)",
        ),
        (
            lambda: Factors(Dense(torch.ones(4)), Dense(torch.ones(5)), torch.Size([4, 5])),
            "do not give",
        ),
        (
            lambda: Factors(
                Dense(torch.ones(4, 1)), Dense(torch.ones(1, 5).half()), torch.Size([4, 5])
            ),
            "of one dtype",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_of_a_product(tmp_path: Path) -> None:
    integers = torch.arange(-12, 12, dtype=torch.int8).view(8, 3)
    left = Integer(Dense(SCALES), integers)
    assert torch.equal(left.decode(), integers * spread(SCALES, (8, 3)))
    code = Factors(left, Dense(WEIGHT[:3]), torch.Size([8, 12]))
    save(tmp_path / "a", {"w": code})
    assert same_bits(load(tmp_path / "a")["w"], code.decode())
