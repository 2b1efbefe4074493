"""The zoo's networks that need torch alone; ``make zoo`` runs all, with every method."""

import pytest

from fitsmall.experiments.zoo.__main__ import table
from fitsmall.experiments.zoo.cells import METHODS, Cell, run_cell
from fitsmall.experiments.zoo.networks import NETWORKS

SMALLEST = (
    "LSTM", "LSTM, projected", "GRU", "RNN", "Bags", "Attention", "WeightNormed", "UNet",
    "Standardised", "Experts", "Adversaries", "Demo",
)  # fmt: skip
# Each network with the next one, too.
OTHERS = ("prune + share", "EMA", "ranks", "bf16-mixed", "quantize 8/8")


@pytest.mark.parametrize("method", ["prune + quantize", "next"])
@pytest.mark.parametrize("network", SMALLEST)
def test_networks_are_covered_and_restored(network: str, method: str) -> None:
    method = OTHERS[SMALLEST.index(network) % len(OTHERS)] if method == "next" else method
    cell = run_cell(network, method)
    assert (cell.outcome, cell.remark) == ("works", "")
    assert cell.coverage >= 0.9 or method == "ranks"


def test_the_zoo_is_large() -> None:
    assert len(NETWORKS) >= 60
    assert len({entry.family for entry in NETWORKS.values()}) >= 40
    assert len(METHODS) == 12


def test_the_table_shows_every_outcome() -> None:
    cells = [
        Cell("LSTM", "prune", "works", 0.951, "", 1.0),
        Cell("LSTM", "ranks", "refused", 0.0, "ValueError: why\nmore", 1.0),
        Cell("LSTM", "EMA", "works", 0.053, "", 1.0),
    ]
    text = table(cells)
    assert "| LSTM | LSTM | yes | refused | yes, 5% |" in text
    assert "2 works, 1 refused." in text
    assert "- LSTM: refused, ranks: ValueError: why" in text
