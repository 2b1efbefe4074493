"""The methods that every guarantee is tested with: a new callback joins by being listed here.

``every_case`` is for what depends on a method's own choices and state, ``each_coupling`` for what
depends on the loop around them alone, and ``every_criterion`` for what pruning gathers and saves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import Tensor, nn

from fitsmall.callbacks import (
    GradualPruning,
    LearningCompression,
    QuantizationAwareTraining,
    SizeTarget,
    WeightSharing,
)
from fitsmall.compressors import CRITERIA, KMeans, TopK
from fitsmall.compressors.codes.lattice import lattice
from fitsmall.compressors.training import Stage
from training import WEIGHTS, sparsity

__all__ = [
    "BY_CRITERION",
    "CASES",
    "COUPLINGS",
    "Case",
    "each_coupling",
    "every_case",
    "every_criterion",
]


@dataclass(frozen=True)
class Case:
    """Callbacks, and what they promise of the weights of :class:`training.Net` after training.

    Args:
        make: Makes the callbacks, their windows in fractions of training and over at 0.8 of it.
        sparsity: Fraction of zeros in all weights together; None for any.
        clusters: Most non-zero values in a weight.
        bits: Most bits of the integers in each row of a weight.
        average_bits: The same on average over all weights.
    """

    make: Callable[[], list[Stage]]
    sparsity: float | None = 0.0
    clusters: int | None = None
    bits: int | None = None
    average_bits: float | None = None

    def check(self, module: nn.Module, *names: str) -> None:
        names = names or WEIGHTS
        weights = [module.get_parameter(name) for name in names]
        zeros = sparsity(module, *names)
        rounded = self.bits is not None or self.average_bits is not None
        if self.sparsity is not None:
            # Rounding makes more of them.
            least = min(zeros, self.sparsity) if rounded else zeros
            assert least == pytest.approx(self.sparsity, abs=1e-6)
        if self.clusters is not None:
            for weight in weights:
                assert weight[weight != 0].unique().numel() <= self.clusters
        if self.bits is not None:
            assert max(map(width, weights)) <= self.bits
        if self.average_bits is not None:
            used = sum(width(weight) * weight.numel() for weight in weights)
            assert used <= self.average_bits * sum(weight.numel() for weight in weights)


def width(weight: Tensor) -> int:
    """Bits of the integers that a weight is made of."""
    found = lattice(weight.detach().float())
    assert found is not None
    return 1 + max(-int(found[1].min()) - 1, int(found[1].max())).bit_length()


BY_CRITERION = {
    f"pruning by {criterion}": Case(
        lambda criterion=criterion: [GradualPruning(0.8, criterion, stop=0.6)], sparsity=0.8
    )
    for criterion in CRITERIA
}

CASES = {
    "pruning by gradient": BY_CRITERION["pruning by gradient"],
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
        average_bits=3,
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
    "a target for the size": Case(
        lambda: [SizeTarget("2 KB", stop=0.8, include=None)], sparsity=None, clusters=100
    ),
}

# Hard before straight-through; straight-through alone, with hooks on layers; scales that are
# learned; proximal.
COUPLINGS = {
    name: CASES[name]
    for name in (
        "pruning, sharing",
        "straight-through pruning, optimal sharing",
        "pruning, learned quantization of weights",
        "learned pruning and sharing",
    )
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_coupling = pytest.mark.parametrize("case", COUPLINGS.values(), ids=COUPLINGS.keys())
every_criterion = pytest.mark.parametrize("case", BY_CRITERION.values(), ids=BY_CRITERION.keys())
