"""Properties that every projection must have, and literal cases for single ones."""

import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fitsmall.compressors import KMeans, Projection, TopK, exact, same_bits
from fitsmall.compressors.cluster import BINS, assign, linear
from fitsmall.compressors.prune import support

SINGLE = [TopK(0.0), TopK(0.5), TopK(1.0), KMeans(1), KMeans(3), KMeans(16)]
CHAINS = [
    TopK(0.5) | KMeans(2),
    TopK(0.9) | KMeans(5),
    KMeans(8, codebook_dtype="bfloat16"),
    TopK(0.75) | KMeans(4, codebook_dtype="float16"),
]
SHAPES = [(0,), (1,), (7,), (16, 9), (4, 3, 5, 5)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def feasible(projection: Projection, weight: Tensor) -> bool:
    """Whether a tensor is one that the projection can hold."""
    stages = [projection]
    while hasattr(stages[0], "first"):
        stages[:1] = [stages[0].first, stages[0].then]
    for stage in stages:
        if isinstance(stage, TopK):
            limit = round((1 - stage.sparsity) * weight.numel())
            if weight.count_nonzero() > limit:
                return False
        else:
            assert isinstance(stage, KMeans)
            if weight[weight != 0].unique().numel() > stage.clusters:
                return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projection", SINGLE + CHAINS, ids=str)
def test_feasible_idempotent_and_stored_exactly(
    projection: Projection, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    once = projection.project(weight)
    assert once.shape == weight.shape
    assert once.dtype == weight.dtype
    assert feasible(projection, once)
    assert same_bits(projection.project(once), once)
    assert same_bits(exact(once).decode(), once)
    assert same_bits(pickle.loads(pickle.dumps(projection)).project(weight), once)


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(8))
def test_kmeans_is_never_farther_than_the_optimum(clusters: int, seed: int) -> None:
    weight = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[:2] = weight[2]  # repeated values are one point of the search
    values = weight.sort().values
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in values.tensor_split(list(cuts)))
        for count in range(clusters)
        for cuts in itertools.combinations(range(1, 9), count)
    )
    assert float((KMeans(clusters).project(weight) - weight).square().sum()) <= best + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_topk_is_never_farther_than_the_optimum(seed: int) -> None:
    weight = torch.randn(7, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    best = min(
        float(weight[list(dropped)].square().sum())
        for dropped in itertools.combinations(range(7), 4)
    )
    error = (TopK(4 / 7).project(weight) - weight).square().sum()
    assert float(error) <= best + 1e-6


def test_kmeans_of_a_large_tensor_is_close_to_the_optimum() -> None:
    weight = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    assert weight.unique().numel() > BINS
    error = float((KMeans(8).project(weight) - weight).square().mean())
    # 0.03454: distortion of the optimal 8-level quantizer of a unit Gaussian (Max, 1960).
    assert error == pytest.approx(0.03454, rel=0.02)


@pytest.mark.parametrize("projection", [KMeans(4), TopK(0.5)], ids=str)
def test_diverged_weights_are_refused(projection: Projection) -> None:
    with pytest.raises(ValueError, match="diverge"):
        projection.project(torch.tensor([1.0, float("nan"), 2.0]))


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
    assert assign(torch.tensor([-5.0, 1.4, 1.6, 99.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [
        0,
        1,
        2,
        2,
    ]


def test_impossible_settings_name_themselves() -> None:
    with pytest.raises(ValueError, match="clusters=0"):
        KMeans(0)
    with pytest.raises(ValueError, match="'float7'"):
        KMeans(2, codebook_dtype="float7")
    with pytest.raises(ValueError, match=r"sparsity is a fraction in \[0, 1\], got 95"):
        TopK(95).project(torch.ones(3))


def test_repeated_values_are_still_clustered_exactly() -> None:
    values = torch.tensor([1.0, 1.0001, 1.0002, 1000.0]).repeat(8000)
    projected = KMeans(3).project(values)
    assert projected.unique().numel() == 3
    assert float((projected - values).square().sum()) < 8000 * 0.51e-8


def test_projections_take_parameters() -> None:
    layer = torch.nn.Linear(6, 4)
    for projection in SINGLE + CHAINS:
        assert not projection.project(layer.weight).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(95), r"fraction in \[0, 1\], got 95"),
        (lambda: KMeans(0), "at least 1 cluster"),
        (lambda: KMeans(5000), "at most 4096"),
        (lambda: KMeans(4, "int8"), "codebook_dtype is one of"),
        (lambda: KMeans(2, "float16").encode(torch.tensor([1e5, 1.0, 2.0])), "cannot hold"),
        (lambda: KMeans(2).encode(torch.tensor([1.0, float("nan")])), "diverge"),
    ],
)
def test_impossible_projections_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
