"""The choice of ranks: the loss metric, the spectrum of a weight in it, and the budget."""

import time

import pytest
import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.loss_metric import LossMetric
from fitsmall.compressors.choices.rank_choice import Options, choose_ranks, price_of, ranks_within
from fitsmall.compressors.projections.lowrank import Spectrum
from fitsmall.compressors.training import Plan, RankLearning
from fitsmall.compressors.training.methods.gradient_grams import GradientGrams


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_the_best_within_a_budget() -> None:
    """Against all combinations: what a price finds has the least error at its own cost."""
    weights = {"a": random(6, 8), "b": 2 * random(5, 9, seed=1)}
    options = {
        name: Options({"channels": Spectrum(weight)}, {"channels": 14.0}, weight.numel())
        for name, weight in weights.items()
    }
    tails = {name: [0.0, *Spectrum(weight).tails.tolist()] for name, weight in weights.items()}
    costs = {name: [weights[name].numel(), 14.0, 28.0, 42.0] for name in weights}
    for budget in range(28, 94):
        ranks = choose_ranks(options, price_of(options, budget))
        chosen = {name: rank.rank or 0 for name, rank in ranks.items()}
        cost = sum(costs[name][rank] for name, rank in chosen.items())
        error = sum(tails[name][rank] for name, rank in chosen.items())
        assert cost <= budget
        every = [(i, j) for i in range(4) for j in range(4)]
        assert error <= 1e-9 + min(
            tails["a"][i] + tails["b"][j] for i, j in every if costs["a"][i] + costs["b"][j] <= cost
        )
    with pytest.raises(ValueError, match="a rank of 1 everywhere costs 28"):
        price_of(options, 27)


def test_a_budget_is_spent_where_one_price_leaves_much_of_it() -> None:
    """Layers of equal singular values jump from rank 1 to dense at one price."""
    options = {
        str(n): Options({"channels": Spectrum(torch.eye(40) * (1 + n))}, {"channels": 80.0}, 1600.0)
        for n in range(4)
    }
    total, unit = 4 * 1600, 80
    for keep in (0.1, 0.3, 0.5, 0.8):
        ranks = ranks_within(options, keep * total)
        cost = sum(1600 if rank.rank is None else unit * rank.rank for rank in ranks.values())
        assert keep * total - unit < cost <= keep * total
    at_a_price = choose_ranks(options, price_of(options, 0.5 * total)).values()
    assert sum(1600 if rank.rank is None else unit * rank.rank for rank in at_a_price) < 0.3 * total


def test_the_metric_is_a_quadratic_form_of_the_loss() -> None:
    outputs, inputs = random(5, 50), random(4, 50, seed=1)
    a, b = outputs @ outputs.T, inputs @ inputs.T
    b *= a.trace() / b.trace()  # gradients have one sum of squares
    metric, change = LossMetric(a, b, damping=0.0), random(5, 4, 3, 3, seed=2)
    expected = sum(
        torch.trace(a @ change[:, :, i, j] @ b @ change[:, :, i, j].T)
        for i in range(3)
        for j in range(3)
    ) / (9 * a.trace())
    found = metric.whiten(change).square().sum()
    torch.testing.assert_close(found.float(), expected)
    torch.testing.assert_close(metric.unwhiten(metric.whiten(change)).float(), change)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_the_metric_takes_gradients_of_any_scale(scale: float) -> None:
    gradients, weight = [random(6, 4, 3, seed=seed) for seed in range(5)], random(6, 4, 3, seed=9)
    whitened = []
    for factor in (1.0, scale):
        grams = GradientGrams.of(factor * gradients[0])
        assert grams is not None
        for gradient in gradients[1:]:
            grams.update(factor * gradient, rate=0.1)
        for nothing in (torch.zeros(6, 4, 3), torch.full((6, 4, 3), float("inf"))):
            grams.update(nothing, rate=0.1)
            assert GradientGrams.of(nothing) is None
        whitened.append(grams.metric.whiten(weight) / factor)
        torch.testing.assert_close(grams.metric.unwhiten(factor * whitened[-1]), weight)
    torch.testing.assert_close(whitened[0], whitened[1])


def test_directions_with_little_gradient_still_need_ranks() -> None:
    """Where a few directions have nearly all gradients, as once a network has learned its data."""
    gradient = torch.zeros(120, 150)
    gradient[0, 0] = 1
    grams = GradientGrams.of(gradient)
    assert grams is not None
    tails = Spectrum(grams.metric.whiten(random(120, 150))).tails
    assert (tails[:-2] > tails[1:-1]).all()


def test_a_vocabulary_costs_no_more_than_its_weight() -> None:
    """Linear(64, 8000): the side of the vocabulary has a diagonal metric, and no square matrix."""
    gradient, weight = random(8000, 64), random(8000, 64, seed=1)
    gradient[100:] = 0  # tokens that a batch does not hold
    grams = GradientGrams.of(gradient)
    assert grams is not None
    assert grams.outputs.nbytes + grams.inputs.nbytes <= 2 * weight.nbytes
    torch.testing.assert_close(
        grams.outputs, gradient.square().sum(1) / grams.peak**2, atol=1e-6, rtol=1e-5
    )
    metric = grams.metric
    whitened = metric.whiten(weight)
    spectrum = Spectrum(whitened)
    values = torch.linalg.svdvals(whitened)
    torch.testing.assert_close(spectrum.values.float(), values, atol=1e-4, rtol=1e-4)
    left, right = spectrum.factors(5)
    error = (whitened - left @ right).square().sum()
    torch.testing.assert_close(error, values[5:].square().sum())
    assert torch.linalg.matrix_rank(metric.unwhiten(left @ right), rtol=1e-4) == 5


def test_setting_up_is_linear_in_the_number_of_layers() -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2000)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    start = time.process_time()
    plan = Plan([RankLearning(keep_size=0.8)], net, horizon=100)
    plan.hook([optimizer])
    plan.begin(horizon=100)
    assert time.process_time() - start < 3
