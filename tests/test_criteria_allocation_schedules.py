"""Literal tensors for every criterion, allocation and schedule, and the user's own ones."""

import math
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from fitsmall.compressors import (
    ALLOCATIONS,
    CRITERIA,
    STATISTICS,
    Allocation,
    Block,
    Cosine,
    Criterion,
    Cubic,
    Exponential,
    Iterative,
    LinearRamp,
    OneShot,
    Schedule,
    Unstructured,
)
from fitsmall.compressors.choices import schedules
from fitsmall.compressors.choices.allocation import (
    Lazy,
    SetScores,
    as_allocation,
    erk,
    global_,
    uniform,
)
from fitsmall.compressors.choices.criteria import as_criterion, magnitude, uniform_noise
from fitsmall.compressors.choices.schedules import as_schedule

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
GATHERED = {
    "gradient": torch.tensor([[0.5, 0.0], [-1.0, 2.0]]),
    "squared_gradient": torch.tensor([[1.0, 2.0], [0.0, 0.5]]),
    "movement": torch.tensor([[-1.0, 2.0], [0.0, 3.0]]),
    "input_norm": torch.tensor([[10.0, 1.0]]),
    "uniform": torch.tensor([[0.25, 0.5], [0.75, 0.0]]),
}
# By hand, of every criterion.
EXPECTED_SCORES = {
    "magnitude": [[1.0, 2.0], [3.0, 4.0]],
    "gradient": [[0.5, 0.0], [3.0, 8.0]],
    "activation": [[10.0, 2.0], [30.0, 4.0]],
    "hessian": [[0.5, 4.0], [0.0, 4.0]],
    "adam": [[0.5, 2 * 2**0.5], [0.0, 8 * 0.5**0.5]],
    "movement": [[-1.0, 2.0], [0.0, 3.0]],
    "random": [[0.25, 0.5], [0.75, 0.0]],
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion(name: str) -> None:
    criterion = as_criterion(name)
    expected = torch.tensor(EXPECTED_SCORES[name])
    torch.testing.assert_close(criterion(WEIGHT, GATHERED), expected)
    needed = {key: GATHERED[key] for key in criterion.statistics}
    torch.testing.assert_close(criterion(WEIGHT, needed), expected)
    assert str(criterion) == name
    assert pickle.loads(pickle.dumps(criterion)) == criterion


def test_every_statistic_has_a_criterion() -> None:
    assert {s for criterion in CRITERIA.values() for s in criterion.statistics} == {*STATISTICS}


def saliency(weight: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    return (weight * statistics["gradient"]).abs() + statistics["movement"]


def test_a_criterion_may_need_several_statistics() -> None:
    criterion = Criterion(saliency, ("gradient", "movement"))
    assert criterion(WEIGHT, GATHERED).tolist() == [[-0.5, 2.0], [3.0, 11.0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: as_criterion("magnitud"), ValueError, r"'magnitud': did you mean magnitude\?"),
        (lambda: as_criterion(3), TypeError, r"a name, a function .* or a Criterion.*, got 3"),
        (lambda: Criterion("hessian"), TypeError, "got 'hessian'"),
        (lambda: Criterion(saliency, "gradient"), TypeError, r"statistics=\('gradient',\)"),
        (
            lambda: Criterion(saliency, ("gradients",)),
            ValueError,
            r"statistic of saliency 'gradients': did you mean gradient or squared_gradient\?",
        ),
        (
            lambda: as_criterion(saliency)(WEIGHT, GATHERED),
            ValueError,
            r"saliency looks up.*write Criterion\(saliency, statistics=\('gradient',\)\)",
        ),
        (
            lambda: Criterion(saliency, ("gradient",))(WEIGHT, GATHERED),
            ValueError,
            r"write Criterion\(saliency, statistics=\('gradient', 'movement'\)\)",
        ),
        (
            lambda: as_criterion(lambda w, s: s["move"])(WEIGHT, GATHERED),
            ValueError,
            r"'move': did you mean movement\?",
        ),
        (lambda: CRITERIA["adam"](WEIGHT, {}), ValueError, r"adam needs.*\['squared_gradient'\]"),
        (
            lambda: as_criterion(lambda w, s: w.sum(1))(WEIGHT, {}),
            ValueError,
            r"<lambda> must return one score.*\(2, 2\), its scores \(2,\)",
        ),
        (lambda: as_criterion(lambda w, s: 1.0)(WEIGHT, {}), TypeError, "not 1.0"),
        (lambda: as_criterion(lambda w, s: w > 0)(WEIGHT, {}), TypeError, r"not torch\.bool"),
    ],
)
def test_criteria_that_cannot_work(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_lookup_error_of_the_criterion_itself_passes() -> None:
    table: dict[str, Tensor] = {}
    with pytest.raises(KeyError, match="gradient"):
        as_criterion(lambda weight, statistics: table["gradient"])(WEIGHT, {})


def test_noise_depends_on_name_and_seed_alone() -> None:
    # The same in every process, where Python's own hash of a string differs.
    expected = torch.tensor([0.9249, 0.8930])
    torch.testing.assert_close(uniform_noise("fc.weight", (2,), 0), expected, atol=1e-4, rtol=0)
    noise = uniform_noise("fc.weight", (64, 64), seed=3)
    assert noise.equal(uniform_noise("fc.weight", (64, 64), seed=3))
    assert 0 <= noise.min() < 0.01
    assert 0.99 < noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)
    others = [uniform_noise("fc2.weight", (64, 64), 3), uniform_noise("fc.weight", (64, 64), 4)]
    for other in others:
        together = torch.stack([noise.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(together)[0, 1])) < 0.05


SCORES = {
    "small": torch.tensor([[5.0, 6.0]]),
    "wide": torch.tensor([[1.0, 2.0, 3.0, 4.0, 7.0, 8.0, 9.0, 10.0]]),
}
EXPECTED_COUNTS = {
    "uniform": {"small": 1, "wide": 4},
    # The five largest of all are 6, 7, 8, 9 and 10.
    "global": {"small": 1, "wide": 4},
    # Densities (1 + 2) : (1 + 8) weights until "small" is full, 5 - 2 = 3 for "wide".
    "erk": {"small": 1, "wide": 4},
    # 6^2 / 6^2 = 1; 5^2 / 61 = 0.41; wide: 1, 0.45, 0.26, ...: 1, 1, 0.45, 0.41, 0.26.
    "lamp": {"small": 2, "wide": 3},
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocation(name: str) -> None:
    assert as_allocation(name)(SCORES, 0.5) == EXPECTED_COUNTS[name]
    assert str(as_allocation(name)) == name
    assert as_allocation(name)({}, 0.5) == {}


def test_erk_fills_small_layers_before_large_ones() -> None:
    scores = {"small": torch.ones(2, 2), "wide": torch.ones(100, 100)}
    kept = ALLOCATIONS["erk"](scores, 0.9)
    assert kept == {"small": 4, "wide": 996}


def test_erk_has_the_densities_of_the_weights_whatever_the_sets() -> None:
    shapes = {"conv": torch.Size([16, 8, 3, 3]), "fc": torch.Size([64, 96])}
    weights = {name: torch.ones(shape) for name, shape in shapes.items()}
    # Densities (16 + 8 + 3 + 3) / 1152 and (64 + 96) / 6144.
    assert erk(weights, 0.9) == {"conv": 115, "fc": 614}
    blocks = SetScores(Block(4, 8), shapes, weights.__getitem__)
    assert blocks.num_sets == {"conv": 36, "fc": 192}
    # The same densities of blocks of 32, 3.6 and 19.2, and not those of matrices of 4 x 9 and
    # 16 x 12 scores, which would be 6.9 and 15.9.
    assert ALLOCATIONS["erk"](blocks, 0.9) == {"conv": 4, "fc": 19}


@pytest.mark.parametrize(
    "name", [n for n, allocation in ALLOCATIONS.items() if allocation.by_shape]
)
def test_allocations_by_shape_need_no_scores(name: str) -> None:
    shapes = {"a": torch.Size([8, 8]), "b": torch.Size([16, 12])}

    def compute(name: str) -> Tensor:
        raise AssertionError("scores are not needed")

    for structure in (Unstructured(), Block(2, 2)):
        early = ALLOCATIONS[name](SetScores(structure, shapes), 0.5)
        assert early == ALLOCATIONS[name](SetScores(structure, shapes, compute), 0.5)


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


def test_the_users_own_allocation() -> None:
    def first(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        return {"wide": 3, "small": 2}

    assert as_allocation(first)(SCORES, 0.5) == {"small": 2, "wide": 3}
    assert not as_allocation(first).by_shape
    assert as_allocation(lambda scores, sparsity: {"a": 1 // len(scores)})({}, 0.5) == {}
    assert as_allocation(Allocation(first, by_shape=True)).by_shape


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ({"small": 1}, ValueError, "fair leaves out wide"),
        ({"small": 1, "wide": 4, "huge": 0}, ValueError, "fair invents huge"),
        ({"small": 3, "wide": 2}, ValueError, "fair keeps 3 of the 2 sets of small"),
        ({"small": -1, "wide": 6}, ValueError, "fair keeps -1 of the 2 sets of small"),
        ({"small": 1.0, "wide": 4}, TypeError, "whole numbers of sets, not 1.0 for small"),
        ([1, 4], TypeError, r"numbers by name, not \[1, 4\]"),
        ({"small": 2, "wide": 7}, ValueError, "keeps 9 of 10 sets, and a sparsity of 0.5 keeps 5"),
    ],
)
def test_what_an_allocation_returns_is_checked(
    result: Any, error: type[Exception], message: str
) -> None:
    def fair(scores: Mapping[str, Tensor], sparsity: float) -> Any:
        return result

    with pytest.raises(error, match=message):
        as_allocation(fair)(SCORES, 0.5)


def test_allocations_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"unknown allocation 'globl': did you mean global\?"):
        as_allocation("globl")
    with pytest.raises(TypeError, match=r"a name or a function .*, got 0\.5"):
        as_allocation(0.5)  # type: ignore[arg-type]


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
    shapes = dict.fromkeys("abc", torch.Size([1000]))
    ALLOCATIONS["global"](SetScores(Unstructured(), shapes, compute), 0.5)


def test_scores_with_nan_name_their_tensor() -> None:
    with pytest.raises(ValueError, match=r"fc1.*NaN"):
        global_({"fc1": torch.tensor([1.0, float("nan")])}, 0.5)


# At 0, a quarter, a half and the end.
EXPECTED_STRENGTHS = {
    OneShot(): [1.0, 1.0, 1.0, 1.0],
    LinearRamp(): [0.0, 0.25, 0.5, 1.0],
    Cubic(): [0.0, 0.578125, 0.875, 1.0],
    Cosine(): [0.0, 0.146447, 0.5, 1.0],
    Exponential(first=0.0001): [0.0001, 0.001, 0.01, 1.0],
    Iterative(rounds=2): [0.5, 0.5, 1.0, 1.0],
}


@pytest.mark.parametrize("schedule", EXPECTED_STRENGTHS, ids=lambda value: type(value).__name__)
def test_schedule(schedule: Schedule) -> None:
    strengths = [as_schedule(schedule)(t) for t in (0.0, 0.25, 0.5, 1.0)]
    assert strengths == pytest.approx(EXPECTED_STRENGTHS[schedule], abs=1e-6)


def test_every_schedule_is_tested() -> None:
    public = {name for name in schedules.__all__ if isinstance(getattr(schedules, name), type)}
    assert public == {type(schedule).__name__ for schedule in EXPECTED_STRENGTHS}


def test_cubic_is_fast_first() -> None:
    """The inverted cubic ``t^3`` takes most weights at the end, when they matter most."""
    assert Cubic()(0.1) > 0.25
    assert Cubic()(0.9) > 0.99


def overshoot(progress: float) -> float:
    return 2 * progress


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (overshoot, ValueError, r"schedule overshoot must return a strength in \[0, 1\], not 2.0 "),
        (lambda progress: -progress, ValueError, r"<lambda> must.* not -0\.5 at 0\.5"),
        (lambda progress: math.nan, ValueError, "not nan at 0"),
        (lambda progress: 2.0 * (progress == 0), ValueError, "not 2.0 at 0"),
        (lambda progress: 2.0 * (progress == 1), ValueError, "not 2.0 at 1"),
        (lambda progress: None, TypeError, "not None"),
        ("cubic", TypeError, "a function of progress, as Cubic.* got 'cubic'"),
        (Cubic, TypeError, r"an object, Cubic\(\), not the class"),
    ],
)
def test_schedules_that_cannot_work(schedule: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_schedule(schedule)


def test_from_yaml() -> None:
    config = OmegaConf.create(
        """
        _target_: builtins.dict
        partial: {_target_: fitsmall.compressors.choices.criteria.magnitude, _partial_: true}
        function:
          _target_: hydra.utils.get_method
          path: fitsmall.compressors.choices.criteria.magnitude
        criterion:
          _target_: fitsmall.compressors.Criterion
          score: {_target_: fitsmall.compressors.choices.criteria.adam, _partial_: true}
          statistics: [squared_gradient]
        allocation: {_target_: fitsmall.compressors.choices.allocation.uniform, _partial_: true}
        by_shape:
          _target_: fitsmall.compressors.Allocation
          allocate:
            _target_: hydra.utils.get_method
            path: fitsmall.compressors.choices.allocation.uniform
          by_shape: true
        schedule: {_target_: math.pow, _partial_: true, _args_: [0.5]}
        ramp: {_target_: fitsmall.compressors.LinearRamp}
        """
    )
    made = instantiate(config)
    assert as_criterion(made["partial"])(WEIGHT, {}).equal(WEIGHT.abs())
    assert as_criterion(made["function"]) == Criterion(magnitude)
    assert as_criterion(made["criterion"]).statistics == ("squared_gradient",)
    assert str(made["criterion"]) == "adam"
    assert as_allocation(made["allocation"])(SCORES, 0.5) == EXPECTED_COUNTS["uniform"]
    assert as_allocation(made["by_shape"]) == Allocation(uniform, by_shape=True)
    assert as_schedule(made["schedule"])(1.0) == 0.5
    assert as_schedule(made["ramp"]) == LinearRamp()
