"""Automatic widths: the exact solution, and the callback that gathers what it is found by."""

import itertools
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from fitsmall.callbacks import CompressedCheckpoint, GradualPruning, QuantizationAwareTraining
from fitsmall.compressors import Quantize
from fitsmall.compressors.choices.bitwidths import WIDTHS, assign, rounding_costs
from fitsmall.compressors.codes.lattice import lattice
from fitsmall.compressors.training import Plan
from training import WEIGHTS, Idle, Net, fit


@pytest.mark.parametrize("seed", range(40))
def test_widths_are_those_of_least_cost(seed: int) -> None:
    rng = random.Random(seed)
    names = "abcd"[: rng.randint(1, 4)]
    # Costs of layers, and of widths in a layer, lie orders of magnitude apart.
    costs = {
        name: {bits: 10 ** rng.uniform(-2, 2) * 4.0**-bits for bits in WIDTHS} for name in names
    }
    sizes = {name: {b: b * n for b in WIDTHS} for name in names for n in [rng.randint(1, 999)]}
    least, most = (sum(sizes[name][b] for name in names) for b in (2, 16))
    budget = rng.randint(least, most)

    def total(of: dict[str, dict[int, Any]], chosen: Any) -> Any:
        return sum(of[name][bits] for name, bits in zip(names, chosen, strict=True))

    every = itertools.product(WIDTHS, repeat=len(names))
    best = min(total(costs, chosen) for chosen in every if total(sizes, chosen) <= budget)
    found = assign(costs, sizes, budget)
    chosen = [found[name] for name in names]
    assert total(sizes, chosen) <= budget
    assert total(costs, chosen) == pytest.approx(best, rel=1e-6)


def test_a_budget_for_nothing() -> None:
    with pytest.raises(ValueError, match="budget is 7, and the smallest widths take 8"):
        assign({"a": {2: 1.0, 4: 0.0}}, {"a": {2: 8, 4: 16}}, 7)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_costs_are_those_of_the_projection(granularity: str) -> None:
    weight, curvature = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    blocks = (6, 1) if granularity == "channel" else (1, 1)
    costs = rounding_costs(weight, curvature.square(), blocks)
    assert [*costs] == [*WIDTHS]
    for bits, cost in costs.items():
        error = Quantize(bits, granularity).project(weight) - weight
        assert cost == pytest.approx(0.5 * float((curvature * error).square().sum()), rel=1e-5)


def automatic(scale: str = "mse", **kwargs: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(
        "auto",
        8,
        scale,
        start=0.3,
        stop=0.8,
        observe_steps=5,
        **kwargs,  # type: ignore[arg-type]
    )


def widest(module: nn.Module, name: str) -> int:
    """Largest integer of a weight."""
    found = lattice(module.get_parameter(name).detach())
    assert found is not None
    return int(found[1].abs().max())


@pytest.mark.parametrize("scale", ["mse", "learned"])
def test_widths_fit_the_average(scale: str, tmp_path: Path) -> None:
    quantization = automatic(scale, average_bits=3.75)
    module = fit(tmp_path, quantization)
    assert quantization.search is not None
    chosen = quantization.search.chosen
    assert sum(bits * module.get_parameter(n).numel() for n, bits in chosen.items()) <= 3.75 * 2960
    assert chosen["head.weight"] > chosen["body.0.weight"]
    for name, bits in chosen.items():
        assert 2 ** (bits - 2) <= widest(module, name) <= 2 ** (bits - 1)


def test_what_was_found_is_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization = automatic(average_bits=4, overrides={"head": 8})
    with caplog.at_level("INFO"):
        fit(tmp_path, quantization)
    assert "weights of automatic bits within 4 bits on average (mse)" in caplog.text
    rows = caplog.text.split("widths of weights, within 4 bits on average: cost ")[1].splitlines()
    assert "bits everywhere" in rows[0]
    assert rows[1].split() == ["weight", "weights", "bits", "sensitivity", "cost", "bytes"]
    name, weights, bits, sensitivity, cost, size = rows[2].split()
    assert (name, weights, bits, size) == ("body.0.weight", "2,560", "3", "960")
    assert float(sensitivity) > 0 < float(cost)
    assert rows[3].split() == ["head.weight", "400", "8", "(given)", "400"]


@pytest.mark.parametrize("limit", [2200, 3000, 4500])
def test_the_file_is_no_larger_than_it_may(limit: int, tmp_path: Path) -> None:
    checkpoint = CompressedCheckpoint(tmp_path)
    fit(tmp_path, automatic(max_bytes=limit), checkpoint, max_epochs=8)
    assert checkpoint.path is not None
    assert 0.8 * limit < checkpoint.path.stat().st_size <= limit


def test_rounding_of_zeros_costs_nothing(tmp_path: Path) -> None:
    pruned, dense = automatic(average_bits=4), automatic(average_bits=4)
    fit(tmp_path, GradualPruning(0.95, stop=0.2, exclude="head"), pruned)
    fit(tmp_path, dense)
    assert pruned.search is not None
    assert dense.search is not None
    name = "body.0.weight"
    assert pruned.search.costs[name][2] < 0.5 * dense.search.costs[name][2]


class Log(pl.Callback):
    """Widths after every step."""

    def __init__(self, quantization: QuantizationAwareTraining) -> None:
        self.quantization = quantization
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.quantization.search is not None
        self.seen.append(dict(self.quantization.search.chosen))


@pytest.mark.parametrize("scale", ["mse", "learned"])
def test_widths_are_chosen_once_more(scale: str, tmp_path: Path) -> None:
    """The head's gradients vanish after the first choice, so that it needs no bits any more."""

    class Settled(Net):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = super().forward(images)
            scale = 1.0 if self.global_step < 14 else 1e-3
            return self.body(images)[:, :10] * (1 - scale) + logits * scale

    quantization = automatic(scale, average_bits=3.75, reallocate=True)
    log = Log(quantization)
    module = fit(tmp_path, quantization, log, module=Settled())
    assert log.seen[11] == {}
    assert log.seen[12] == log.seen[21] == {"body.0.weight": 3, "head.weight": 8}
    assert log.seen[22] == log.seen[-1] == {"body.0.weight": 4, "head.weight": 2}
    assert widest(module, "head.weight") <= 2


def test_layers_that_join_later_share_the_budget(tmp_path: Path) -> None:
    quantization = automatic(average_bits=3, overrides={"body": 2})
    log = Log(quantization)
    fit(tmp_path, quantization, log, module=Idle())
    assert [*log.seen[15]] == ["head.weight"]
    assert [*log.seen[-1]] == ["head.weight", "spare.weight"]
    assert log.seen[15]["head.weight"] == 8
    assert 2 * 2560 + 400 * log.seen[-1]["head.weight"] + 100 * log.seen[-1]["spare.weight"] <= 9180


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "weight_bits='auto' needs one budget, average_bits or max_bytes"),
        ({"average_bits": 4, "max_bytes": 9000}, "needs one budget"),
        ({"average_bits": 1}, "average_bits=1 is not between 2 and 16"),
        (
            {"average_bits": 4, "overrides": {"head": "auto"}},
            "an override is a number of bits, or a pair",
        ),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        automatic(**settings)


def test_sizes_count_the_scales_of_integers_alone() -> None:
    """Forty channels of eight weights: a 32-bit scale for each channel, but none with 16 bits."""
    stage = QuantizationAwareTraining("auto", None, max_bytes=1000)
    Plan([stage], nn.Linear(8, 40))
    assert stage.search is not None
    sizes = stage.search.sizes["weight"]
    assert (sizes[2], sizes[8], sizes[16]) == (40 * (16 + 32), 40 * (64 + 32), 40 * 128)


def test_budgets_of_fixed_widths() -> None:
    with pytest.raises(ValueError, match="average_bits, reallocate needs weight_b"):
        QuantizationAwareTraining(4, average_bits=4, reallocate=True)
    with pytest.raises(ValueError, match="got bits='auto'"):
        QuantizationAwareTraining(4, overrides={"head": ("auto", 4)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 1000}, "max_bytes=1,000 is below 1,833, which 2 bits take"),
        (
            {"average_bits": 4, "overrides": {"body": 8}},
            "average_bits=4 is below 7.19, which 2 bits take",
        ),
    ],
)
def test_budgets_beyond_reach(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, automatic(**settings))


def test_inputs_of_automatic_widths_have_their_own_bits(tmp_path: Path) -> None:
    quantization = automatic(average_bits=4, overrides={"head": ("auto", 2)})
    module = fit(tmp_path, quantization)
    assert quantization.search is not None
    assert {*quantization.search.chosen} == {*WEIGHTS}
    assert int(module.head.input_quantizer.bits) == 2
