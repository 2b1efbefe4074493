"""The methods that every guarantee is tested with: a new callback joins by being listed here."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import nn

from fitsmall.callbacks import (
    GradualPruning,
    LearningCompression,
    Method,
    QuantizationAwareTraining,
    WeightSharing,
)
from fitsmall.compressors import CRITERIA, KMeans, TopK
from fitsmall.compressors.lattice import lattice
from training import WEIGHTS, sparsity

__all__ = ["CASES", "every_case"]


@dataclass(frozen=True)
class Case:
    """Callbacks, and what they promise of the weights of :class:`training.Net` after training.

    Args:
        make: Makes the callbacks, their windows in fractions of training and over at 0.8 of it.
        sparsity: Fraction of zeros in all weights together.
        clusters: Most non-zero values in a weight.
        bits: Of the integers in each row of a weight.
    """

    make: Callable[[], list[Method]]
    sparsity: float = 0.0
    clusters: int | None = None
    bits: int | None = None

    def check(self, module: nn.Module, *names: str) -> None:
        names = names or WEIGHTS
        zeros = sparsity(module, *names)
        # Rounding makes more of them.
        least = min(zeros, self.sparsity) if self.bits else zeros
        assert least == pytest.approx(self.sparsity, abs=2e-3)
        for name in names:
            weight = module.get_parameter(name)
            if self.clusters is not None:
                assert weight[weight != 0].unique().numel() <= self.clusters
            if self.bits is not None:
                found = lattice(weight.detach().float())
                assert found is not None
                assert -(2 ** (self.bits - 1)) <= int(found[1].min())
                assert int(found[1].max()) < 2 ** (self.bits - 1)


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
    "quantization to automatic widths": Case(
        lambda: [
            QuantizationAwareTraining(
                "auto", None, start=0.3, stop=0.8, average_bits=3, reallocate=True
            )
        ],
        bits=8,
    ),
    "pruning, learned quantization of weights": Case(
        lambda: [
            GradualPruning(0.8, "adam", stop=0.5),
            QuantizationAwareTraining(3, None, "learned", start=0.3, stop=0.8),
        ],
        sparsity=0.8,
        bits=3,
    ),
    "learned pruning and sharing": Case(
        lambda: [LearningCompression(TopK(0.8) | KMeans(6), stop=0.8)],
        sparsity=0.8,
        clusters=6,
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
