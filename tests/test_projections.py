"""Properties that every projection must have, and literal cases for single ones."""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fitsmall.compressors
from fitsmall.compressors import (
    Additive,
    Chain,
    Code,
    Factors,
    Integer,
    KMeans,
    Projection,
    Quantize,
    Sum,
    TopK,
    Truncate,
    exact,
    load,
    same_bits,
    save,
)
from fitsmall.compressors.codes.dtypes import FLOATS
from fitsmall.compressors.projections.cluster import BINS, assign, linear
from fitsmall.compressors.projections.prune import support
from fitsmall.compressors.repair.priced import Priced

Feasible = Callable[[Code], bool]
SHAPES = [(0,), (1,), (7,), (16, 9), (4, 3, 5, 5)]


@dataclass(frozen=True)
class Case:
    """A projection with settings that represent it.

    Args:
        projection: The projection.
        feasible: Whether a code is one that the projection may give.
        shapes: Shapes of weights that it takes.
        idempotent: ``"exactly"``, to ``"rounding"``, or ``"no"``.
    """

    projection: Projection
    feasible: Feasible
    shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)
    idempotent: str = "exactly"


def sparse(sparsity: float) -> Feasible:
    return lambda code: (
        int(code.decode().count_nonzero()) <= round((1 - sparsity) * code.shape.numel())
    )


def shared(levels: int) -> Feasible:
    return lambda code: code.decode().unique().numel() <= levels + 1  # zero is no level


def on_a_grid(bits: int, blocks: Callable[[torch.Size], tuple[int, ...]]) -> Feasible:
    def feasible(code: Code) -> bool:
        if not code.shape.numel():
            return True
        assert isinstance(code, Integer)
        return code.width <= bits and tuple(code.scales.shape) == blocks(code.shape)

    return feasible


def half_precision(code: Code) -> bool:
    weight = code.decode()
    halves = (weight.to(dtype).to(weight.dtype) for dtype in (torch.float16, torch.bfloat16))
    return any(same_bits(weight, half) for half in halves)


def of_rank(rank: int, form: str = "channels") -> Feasible:
    return lambda code: isinstance(code, Factors) and (code.rank, code.form) == (rank, form)


def both(*properties: Feasible) -> Feasible:
    return lambda code: all(feasible(code) for feasible in properties)


def parts(first: Feasible, second: Feasible) -> Feasible:
    return lambda code: isinstance(code, Sum) and first(code.first) and second(code.second)


def channels(shape: torch.Size) -> tuple[int, ...]:
    return (shape[0], *[1] * (len(shape) - 1))


def whole(shape: torch.Size) -> tuple[int, ...]:
    return (1,) * len(shape)


MATRICES, KERNELS = SHAPES[3:], SHAPES[4:]
CASES: dict[type[Projection], list[Case]] = {
    TopK: [Case(TopK(sparsity), sparse(sparsity)) for sparsity in (0.0, 0.5, 1.0)],
    KMeans: [
        *(Case(KMeans(clusters), shared(clusters)) for clusters in (1, 3, 16)),
        Case(KMeans(8, codebook_dtype="bfloat16"), shared(8)),
    ],
    Quantize: [
        *(Case(Quantize(bits), on_a_grid(bits, channels)) for bits in (2, 5, 8)),
        Case(Quantize(4, "tensor"), on_a_grid(4, whole)),
        Case(Quantize(3, 8), on_a_grid(3, lambda shape: (shape[0], shape[1] // 8)), [(6, 32)]),
        Case(Quantize(4, axis=1), on_a_grid(4, lambda shape: (1, shape[1], 1, 1)), KERNELS),
        Case(Quantize(16), half_precision),
    ],
    Priced: [Case(Priced(price=0.01, curvature=100.0), half_precision)],
    Truncate: [
        *(Case(Truncate(rank), of_rank(rank), MATRICES, "rounding") for rank in (1, 4)),
        Case(Truncate(energy=0.7), lambda code: isinstance(code, Factors), MATRICES, "no"),
        Case(Truncate(2, form="separable"), of_rank(2, "separable"), KERNELS, "rounding"),
    ],
    Chain: [
        Case(TopK(0.5) | KMeans(2), both(sparse(0.5), shared(2))),
        Case(TopK(0.75) | KMeans(4, "float16"), both(sparse(0.75), shared(4))),
        Case(TopK(0.5) | Quantize(4), both(sparse(0.5), on_a_grid(4, channels))),
    ],
    Additive: [
        Case(KMeans(4) + TopK(0.9), parts(shared(4), sparse(0.9)), idempotent="no"),
        Case(Truncate(2) + TopK(0.9), parts(of_rank(2), sparse(0.9)), MATRICES, "no"),
    ],
}
ALL = [case for cases in CASES.values() for case in cases]
every_case = pytest.mark.parametrize("case", ALL, ids=lambda case: str(case.projection))


def subclasses(of: type[Projection]) -> Iterator[type[Projection]]:
    for found in of.__subclasses__():
        yield found
        yield from subclasses(found)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_public_projection_is_listed() -> None:
    """One that is missing gets none of the tests below: add it to ``CASES``."""
    public = {
        found
        for found in subclasses(Projection)
        if found.__module__.startswith(fitsmall.compressors.__name__)
        and not found.__name__.startswith("_")
    }
    assert public == CASES.keys()
    assert all(isinstance(case.projection, kind) for kind in CASES for case in CASES[kind])


@every_case
def test_results_are_feasible_and_projected_onto_themselves(case: Case) -> None:
    for shape, dtype in itertools.product(case.shapes, FLOATS):
        weight = random(*shape, dtype=dtype)
        code = case.projection.encode(weight)
        once = code.decode()
        assert (once.shape, once.dtype) == (weight.shape, dtype)
        assert (code.shape, code.dtype) == (weight.shape, dtype)
        assert case.feasible(code), (shape, dtype)
        twice = case.projection.project(once)
        if case.idempotent == "exactly":
            assert same_bits(twice, once), (shape, dtype)
        elif case.idempotent == "rounding":
            error = (twice.double() - once.double()).norm() / once.double().norm()
            assert error < 32 * torch.finfo(dtype).eps, (shape, dtype)


@every_case
def test_only_the_weight_decides(case: Case, tmp_path: Path) -> None:
    """Not the state of a generator, the object, the layout of memory or a gradient."""
    again = pickle.loads(pickle.dumps(case.projection))
    assert again == case.projection
    assert hash(again) == hash(case.projection)
    for shape in case.shapes:
        weight = random(*shape)
        before = weight.clone()
        once = case.projection.project(weight)
        assert same_bits(weight, before)
        torch.manual_seed(len(shape))
        assert same_bits(again.project(weight), once)
        strided = torch.stack([weight, weight], dim=-1)[..., 0]
        assert same_bits(case.projection.project(strided), once)
        parameter = case.projection.project(torch.nn.Parameter(weight))
        assert same_bits(parameter, once)
        assert not parameter.requires_grad


@every_case
def test_codes_and_what_they_decode_to_survive_the_file(case: Case, tmp_path: Path) -> None:
    codes = {
        f"{shape} {dtype}": case.projection.encode(random(*shape, dtype=dtype))
        for shape in case.shapes
        for dtype in FLOATS
    }
    tensors = {name: code.decode() for name, code in codes.items()}
    stored: Mapping[str, Tensor | Code]
    for stored in (codes, tensors):
        save(tmp_path / "a", stored, coder="ans")
        for name, tensor in load(tmp_path / "a").items():
            assert same_bits(tensor, tensors[name]), name
    for name, tensor in tensors.items():
        assert same_bits(exact(tensor).decode(), tensor), name


@every_case
def test_diverged_weights_are_refused(case: Case) -> None:
    if case.projection == TopK(1.0):
        pytest.skip("keeps none of them")
    weight = random(*case.shapes[-1])
    weight.view(-1)[5] = float("nan")
    with pytest.raises(ValueError, match="diverge"):
        case.projection.project(weight)


def topk_optimum(projection: TopK, weight: Tensor) -> float:
    dropped = weight.numel() - round((1 - projection.sparsity) * weight.numel())
    squares = weight.square().tolist()
    return min(map(math.fsum, itertools.combinations(squares, dropped)))


def kmeans_optimum(projection: KMeans, weight: Tensor) -> float:
    """Clusters of the nearest tensor are runs of the sorted values."""
    values = weight.sort().values
    return min(
        sum(float((part - part.mean()).square().sum()) for part in values.tensor_split(list(cuts)))
        for count in range(projection.clusters)
        for cuts in itertools.combinations(range(1, weight.numel()), count)
    )


def truncate_optimum(projection: Truncate, weight: Tensor) -> float:
    """Rank 1 of 2 x 4: the best direction of the columns, out of many."""
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    directions = torch.stack([angles.cos(), angles.sin()])
    return float((weight.square().sum() - (directions.T @ weight).square().sum(dim=1)).min())


EXACT: list[tuple[Projection, Callable[..., float], tuple[int, ...]]] = [
    *((TopK(sparsity), topk_optimum, (7,)) for sparsity in (2 / 7, 4 / 7)),
    *((KMeans(clusters), kmeans_optimum, (9,)) for clusters in range(1, 6)),
    (Truncate(1), truncate_optimum, (2, 4)),
]


@pytest.mark.parametrize(
    ("projection", "optimum", "shape"), EXACT, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_exact_ones_are_never_farther_than_the_optimum(
    projection: Projection, optimum: Callable[..., float], shape: tuple[int, ...]
) -> None:
    for seed in range(8):
        weight = random(*shape, seed=seed, dtype=torch.float64)
        weight.view(-1)[:2] = weight.view(-1)[2]  # equal values
        error = float((projection.project(weight) - weight).square().sum())
        assert error <= optimum(projection, weight) + 1e-12


@pytest.mark.parametrize("case", CASES[Additive], ids=lambda case: str(case.projection))
def test_sums_are_nearer_than_their_first_part(case: Case) -> None:
    assert isinstance(case.projection, Additive)
    for seed, shape in itertools.product(range(4), MATRICES):
        weight = random(*shape, seed=seed)
        alone = (weight - case.projection.first.project(weight)).norm()
        assert (weight - case.projection.project(weight)).norm() < alone


def test_kmeans_of_a_large_tensor_is_close_to_the_optimum() -> None:
    weight = random(50_000)
    assert weight.unique().numel() > BINS
    error = float((KMeans(8).project(weight) - weight).square().mean())
    # 0.03454: distortion of the optimal 8-level quantizer of a unit Gaussian (Max, 1960).
    assert error == pytest.approx(0.03454, rel=0.02)


def test_support_breaks_ties_by_position_and_keeps_the_exact_count() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0])
    assert support(scores, 3).tolist() == [True, True, True, False, False]
    for keep in range(6):
        assert int(support(torch.ones(5), keep).sum()) == keep
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        support(scores, 6)


def test_chains_keep_pruned_zeros_and_cluster_only_survivors() -> None:
    weight = torch.tensor([0.1, -0.2, 5.0, 7.0, -3.0, 0.05, -5.0, 0.3])
    projected = (TopK(0.5) | KMeans(2)).project(weight)
    assert projected.tolist() == [0.0, 0.0, 6.0, 6.0, -4.0, 0.0, -4.0, 0.0]


def test_linear_start_and_assignment() -> None:
    assert linear(torch.tensor([0.0, 9.0, 1.0]), 4).tolist() == [0.0, 3.0, 6.0, 9.0]
    nearest = assign(torch.tensor([-5.0, 1.4, 1.6, 99.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert nearest.tolist() == [0, 1, 2, 2]


def test_repeated_values_are_still_clustered_exactly() -> None:
    values = torch.tensor([1.0, 1.0001, 1.0002, 1000.0]).repeat(8000)
    projected = KMeans(3).project(values)
    assert projected.unique().numel() == 3
    assert float((projected - values).square().sum()) < 8000 * 0.51e-8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(95), r"sparsity is a fraction in \[0, 1\], got 95"),
        (lambda: KMeans(0), "whole number of clusters from 1 .* clusters=0"),
        (lambda: KMeans(5000), "from 1 to 4,096"),
        (lambda: KMeans(4, "int8"), "codebook_dtype is one of .* got 'int8'"),
        (lambda: KMeans(2, "float16").encode(torch.tensor([1e5, 1.0, 2.0])), "cannot hold"),
        (lambda: Quantize(9), "bits=9"),
        (lambda: Quantize(4, 8).encode(torch.ones(3, 12)), "groups of 8 do not divide"),
        (lambda: Truncate(0), "rank is at least 1, got 0"),
    ],
)
def test_impossible_settings_name_themselves(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
