"""The methods that every guarantee is tested with: a new callback joins by being listed here."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import nn

from pressfit.callbacks import GradualPruning, Method, WeightSharing
from pressfit.compressors import CRITERIA
from training import WEIGHTS, sparsity

__all__ = ["CASES", "every_case"]


@dataclass(frozen=True)
class Case:
    """Callbacks, and what they promise of the weights of :class:`training.Net` after training.

    Args:
        make: Makes the callbacks, their windows in fractions of training and over at 0.8 of it.
        sparsity: Fraction of zeros in all weights together.
        clusters: Most non-zero values in a weight.
    """

    make: Callable[[], list[Method]]
    sparsity: float = 0.0
    clusters: int | None = None

    def check(self, module: nn.Module, *names: str) -> None:
        names = names or WEIGHTS
        assert sparsity(module, *names) == pytest.approx(self.sparsity, abs=2e-3)
        for name in names:
            weight = module.get_parameter(name)
            if self.clusters is not None:
                assert weight[weight != 0].unique().numel() <= self.clusters


CASES = {
    **{
        f"pruning by {criterion}": Case(
            lambda criterion=criterion: [GradualPruning(0.8, criterion, stop=0.6)], sparsity=0.8
        )
        for criterion in CRITERIA
    },
    "straight-through pruning": Case(
        lambda: [GradualPruning(0.8, "hessian", "lamp", stop=0.6, coupling="straight_through")],
        sparsity=0.8,
    ),
    "sharing": Case(lambda: [WeightSharing(6, start=0.3, stop=0.8)], clusters=6),
    "pruning, sharing": Case(
        lambda: [
            GradualPruning(0.8, "adam", stop=0.5),
            WeightSharing(6, start=0.4, stop=0.8),
            WeightSharing(4, include="*.bias", start=0.4, stop=0.8),
        ],
        sparsity=0.8,
        clusters=6,
    ),
    "straight-through pruning, optimal sharing": Case(
        lambda: [
            GradualPruning(0.8, "activation", stop=0.6, coupling="straight_through"),
            WeightSharing(6, "optimal", "bfloat16", start=0.3, stop=0.8),
        ],
        sparsity=0.8,
        clusters=6,
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
