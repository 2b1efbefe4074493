r"""Levels with a price: a weight takes the one of least error and bits, and others make up for it.

Optimal brain surgeon rounds the columns of a weight one by one, and later columns make up for the
error (:mod:`~fitsmall.compressors.repair.surgeon`). Here a weight ``t`` is not rounded to its
nearest level, but to

.. math:: \operatorname{argmin}_c \tfrac12 F (t - c)^2 + \lambda\, \mathrm{bits}(c),

with the curvature :math:`F` once later columns are free (Conzelmann and Bamler, 2025,
"Reducing storage of pretrained neural networks by rate-constrained quantization and entropy
coding"). Levels and bits are those of
:mod:`~fitsmall.compressors.choices.entropy_constrained`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numba
import numpy as np
import torch
from torch import Tensor

from fitsmall.compressors.choices.clusterings import CODEBOOK_DTYPE, clustered
from fitsmall.compressors.choices.entropy_constrained import Clustering, cheapest
from fitsmall.compressors.codes.code import Code
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection

__all__ = ["Priced"]

# Others make up for much of the error of a weight: the loss rises by about so much of what it would
# rise by for each weight alone.
_LEFT = 0.3


@dataclass(frozen=True)
class Priced(Projection):
    """The levels of least loss and bits, which are chosen where a weight is fitted to data.

    Args:
        price: Loss that a bit is worth.
        curvature: Sum of the second derivatives of the loss by the weights of the tensor. Those
            that a layer's inputs and outputs tell are right up to a factor.
    """

    price: float
    curvature: float

    def encode(self, weight: Tensor) -> Code:
        """The code of a weight that was fitted; its levels are rounded.

        Raises:
            ValueError: A weight is not finite.
        """
        if not weight.isfinite().all():
            raise ValueError("weights are not finite: training has diverged")
        return exact(weight.detach().to(CODEBOOK_DTYPE).to(weight.dtype))

    def support(self, weight: Tensor) -> Tensor:
        """All weights: zero is a level."""
        return torch.ones_like(weight, dtype=torch.bool)

    def levels(self, weight: Tensor, importance: Tensor) -> Levels:
        price = self.price * float(importance.sum()) / self.curvature
        found = clustered(weight, _LEFT * importance, price)
        zeros, kept = (
            torch.from_numpy(bits).reshape(weight.shape) for bits in found.rates.positions
        )
        return _PricedLevels(found, price, zeros, kept)


@dataclass(frozen=True, eq=False)
class _PricedLevels(Levels):
    """Levels, and the bits of each.

    Args:
        found: Levels of the weight.
        price: Error that a bit is worth.
        zeros: For each weight the bits that tell that it is zero.
        kept: For each weight the bits that tell that it is not.
    """

    found: Clustering
    price: float
    zeros: Tensor
    kept: Tensor

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, zeros=change(self.zeros), kept=change(self.kept))

    def best(self, values: Tensor, column: int, curvature: Tensor) -> Tensor:
        columns = (values, curvature, self.kept[..., column], self.zeros[..., column])
        w, f, on, off = (each.reshape(-1).cpu().double().numpy() for each in columns)
        index = np.empty(w.size, np.int64)
        _cheapest_of(
            w,
            f,
            on,
            off,
            self.found.codebook,
            self.found.zero,
            self.price,
            self.found.rates.levels,
            index,
        )
        levels = torch.from_numpy(self.found.codebook[index])
        return levels.view(values.shape).to(values)


@numba.njit(cache=True, nogil=True)
def _cheapest_of(w, f, on, off, codebook, zero, price, levels, index):  # type: ignore[no-untyped-def]
    """Write the best level of each weight of a column into ``index``."""
    for i in range(w.size):
        index[i] = cheapest(w[i], f[i], codebook, zero, price, levels, on[i], off[i])
