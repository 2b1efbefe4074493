"""Literal tensors for every criterion, allocation and schedule."""

import weakref

import pytest
import torch

from fitsmall.compressors import ALLOCATIONS, CRITERIA, Cosine, Cubic, Iterative, LinearRamp, OneShot
from fitsmall.compressors.allocation import Lazy, global_

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
STATISTICS = {
    "gradient": torch.tensor([[0.5, 0.0], [-1.0, 2.0]]),
    "squared_gradient": torch.tensor([[1.0, 2.0], [0.0, 0.5]]),
    "movement": torch.tensor([[-1.0, 2.0], [0.0, 3.0]]),
    "input_norm": torch.tensor([[10.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", [[1.0, 2.0], [3.0, 4.0]]),
        ("gradient", [[0.5, 0.0], [3.0, 8.0]]),
        ("activation", [[10.0, 2.0], [30.0, 4.0]]),
        ("hessian", [[0.5, 4.0], [0.0, 4.0]]),
        ("adam", [[0.5, 2 * 2**0.5], [0.0, 8 * 0.5**0.5]]),
        ("movement", [[-1.0, 2.0], [0.0, 3.0]]),
    ],
)
def test_criterion(name: str, expected: list[list[float]]) -> None:
    criterion = CRITERIA[name]
    needed = {key: STATISTICS[key] for key in criterion.statistics}
    torch.testing.assert_close(criterion.score(WEIGHT, needed), torch.tensor(expected))


SCORES = {
    "small": torch.tensor([[5.0, 6.0]]),
    "wide": torch.tensor([[1.0, 2.0, 3.0, 4.0, 7.0, 8.0, 9.0, 10.0]]),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", {"small": 1, "wide": 4}),
        # The five largest of all are 6, 7, 8, 9 and 10.
        ("global", {"small": 1, "wide": 4}),
        # Densities (1 + 2) : (1 + 8) weights until "small" is full, 5 - 2 = 3 for "wide".
        ("erk", {"small": 1, "wide": 4}),
        # 6^2 / 6^2 = 1; 5^2 / 61 = 0.41; wide: 1, 0.45, 0.26, ...: 1, 1, 0.45, 0.41, 0.26.
        ("lamp", {"small": 2, "wide": 3}),
    ],
)
def test_allocation(name: str, expected: dict[str, int]) -> None:
    assert ALLOCATIONS[name](SCORES, 0.5) == expected


def test_erk_fills_small_layers_before_large_ones() -> None:
    scores = {"small": torch.ones(2, 2), "wide": torch.ones(100, 100)}
    kept = ALLOCATIONS["erk"](scores, 0.9)
    assert kept == {"small": 4, "wide": 996}


def test_lamp_spares_a_layer_of_small_weights() -> None:
    scores = {"large": torch.tensor([10.0, 10.0, 10.0, 10.0]), "tiny": torch.tensor([0.1, 0.2])}
    assert ALLOCATIONS["global"](scores, 0.5) == {"large": 3, "tiny": 0}
    assert ALLOCATIONS["lamp"](scores, 0.5) == {"large": 2, "tiny": 1}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.97, 1.0])
def test_every_allocation_spends_its_budget(allocation: str, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(30, 20), (20, 3, 5, 5), (10, 30)]
    scores = {str(s): torch.rand(s, generator=generator) for s in shapes}
    total = sum(score.numel() for score in scores.values())
    kept = ALLOCATIONS[allocation](scores, sparsity)
    assert all(0 <= kept[name] <= scores[name].numel() for name in scores)
    # Per-tensor rounding may move the total of uniform and erk by half a weight a tensor.
    slack = 0 if allocation in ("global", "lamp") else len(shapes) / 2
    assert abs(sum(kept.values()) - round((1 - sparsity) * total)) <= slack


@pytest.mark.parametrize("seed", range(5))
def test_global_threshold_equals_sorting_all_scores(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Negative scores, ties and both zeros, as movement gives them.
    scores = {str(i): torch.randn(50 + i, generator=generator).round(decimals=1) for i in range(4)}
    scores["0"][:3] = torch.tensor([0.0, -0.0, -torch.inf])
    for keep in (1, 40, 120, 205):
        flat = torch.cat(list(scores.values()))
        threshold = flat.sort(descending=True).values[keep - 1]
        kept = global_(scores, 1 - keep / flat.numel())
        assert sum(kept.values()) == keep
        for name, score in scores.items():
            assert (score > threshold).sum() <= kept[name] <= (score >= threshold).sum()


def test_global_holds_one_tensor_of_scores_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def compute(name: str) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None], "an earlier score is still alive"
        score = torch.arange(1000.0) + ord(name)
        alive.append(weakref.ref(score))
        return score

    global_(Lazy(dict.fromkeys("abc"), compute), 0.5)
    assert len(alive) >= 3


def test_scores_with_nan_name_their_tensor() -> None:
    with pytest.raises(ValueError, match=r"fc1.*NaN"):
        global_({"fc1": torch.tensor([1.0, float("nan")])}, 0.5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (OneShot(), [1.0, 1.0, 1.0, 1.0]),
        (LinearRamp(), [0.0, 0.25, 0.5, 1.0]),
        (Cubic(), [0.0, 0.578125, 0.875, 1.0]),
        (Cosine(), [0.0, 0.146447, 0.5, 1.0]),
        (Iterative(rounds=2), [0.5, 0.5, 1.0, 1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedule(schedule: LinearRamp, expected: list[float]) -> None:
    assert [schedule(t) for t in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected, abs=1e-6)


def test_cubic_is_fast_first() -> None:
    """The inverted cubic ``t^3`` takes most weights at the end, when they matter most."""
    assert Cubic()(0.1) > 0.25
    assert Cubic()(0.9) > 0.99
