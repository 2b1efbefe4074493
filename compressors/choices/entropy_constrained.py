r"""Entropy-constrained clustering: which levels a weight matrix gets, by their loss and their bits.

A weight :math:`w_i` of curvature :math:`F_i` becomes the level :math:`c_{a_i}`, which takes
:math:`r_i(a_i)` bits in the file (Chou et al., 1989; with curvatures Choi et al., 2017, "Towards
the limit of network quantization"):

.. math:: \min_{a, c} \sum_i \tfrac12 F_i (w_i - c_{a_i})^2 + \lambda\, r_i(a_i).

The price :math:`\lambda` of a bit decides at the same time which weights become zero, how many
levels a matrix has, and how fine they are. Zero is always a level. The bits are those of an ideal
adaptive coder which knows how many non-zero weights the row and the column of a weight have, so
that whole rows and columns empty themselves where that is cheap:

.. math:: r_i(a) = \begin{cases} -\log_2 (1 - p_i) & a = 0 \\
          -\log_2 p_i - \log_2 q_a & \text{else} \end{cases}
          \qquad p_i = \frac{p_{\text{row}}\, p_{\text{column}}}{p},

with the frequencies :math:`p` of non-zero weights, and :math:`q_a` of each level among them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["Clustering", "Rates", "cheapest", "cluster", "price_within"]

# Lloyd's iterations; later ones change hardly any bit.
_ROUNDS = 4
# Most levels, zero included, and how many of them next to a weight are compared.
_MOST_LEVELS, _NEAR = 255, 3
# Bits of a level in the codebook, and pseudo-observations of the frequency in a row or a column.
_LEVEL_BITS, _PRIOR = 16.0, 4.0
_LARGEST = 0.99  # probability of a non-zero weight
# Search for a price: its bounds, its longest first step, and the fall of its logarithm after which
# bits that do not rise never will.
_LOWEST, _HIGHEST, _LONGEST, _FULL = 1e-100, 1e30, 64.0, 2.0


Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Rates:
    """Bits of the weights of a matrix, as a coder that knows these frequencies needs them.

    Args:
        log_kept: Logarithm of the frequency of non-zero weights.
        levels: Bits of each level among the non-zero ones; 0 for the level 0.
        rows: What each row adds to the logarithm.
        columns: What each column adds to it.
    """

    log_kept: float
    levels: NDArray[np.float64]
    rows: NDArray[np.float64]
    columns: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        counts: NDArray[np.float64],
        zero: int,
        in_rows: NDArray[np.float64],
        in_columns: NDArray[np.float64],
    ) -> "Rates":
        """Return them from the counts of levels, and of non-zero weights in rows and columns."""
        kept = counts.sum() - counts[zero]
        levels = -np.log2(counts.clip(1) / max(kept, 1)) + _LEVEL_BITS / counts.clip(1)
        levels[zero] = 0.0
        frequency = (kept + 0.5) / (counts.sum() + 1)

        def excess(found: NDArray[np.float64], length: int) -> NDArray[np.float64]:
            if found.size == 1 or length == 1:
                return np.zeros(found.size)
            mine = (found + _PRIOR * frequency) / (length + _PRIOR)
            excess: NDArray[np.float64] = np.log(mine / frequency)
            return excess

        rows, columns = excess(in_rows, in_columns.size), excess(in_columns, in_rows.size)
        return cls(math.log(frequency), levels, rows, columns)

    @property
    def positions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bits that tell of each weight that it is zero, and bits that tell that it is not."""
        log_kept = self.log_kept + self.rows[:, None] + self.columns
        kept = np.exp(log_kept).clip(max=_LARGEST)
        return -np.log2(1 - kept), -np.log2(kept)


@dataclass(frozen=True)
class Clustering:
    """Levels of a matrix, and an estimate of what they cost.

    Args:
        codebook: Different values, ascending; one of them is 0.
        index: Level of each weight, of the matrix's shape.
        bits: Estimated bits of all indexes and of the codebook.
        loss: Estimated rise of the loss, ``sum F (w - c)^2 / 2``.
        rates: Bits of each weight and level.
    """

    codebook: NDArray[np.float64]
    index: NDArray[np.int16]
    bits: float
    loss: float
    rates: Rates

    @property
    def zero(self) -> int:
        """Index of the level 0."""
        return int(np.flatnonzero(self.codebook == 0)[0])

    @property
    def kept(self) -> int:
        """Number of weights that are not zero."""
        return int(np.count_nonzero(self.index != self.zero))


def cluster(weight: Matrix, curvature: Matrix, price: float, zeros: bool = True) -> Clustering:
    r"""Return the levels of least loss and bits at a price of a bit, a local optimum.

    The first levels are an even grid, whose step is the best one for a high rate: an error of
    :math:`F \Delta^2 / 24` for each weight, against :math:`-\log_2 \Delta` bits.

    Args:
        weight: Matrix of weights; a row for each output.
        curvature: Second derivative of the loss for each weight, positive, of the same shape.
        price: Loss that a bit is worth; positive.
        zeros: Whether weights may become zero. Those that are zero stay so.

    Example:
        >>> weight = np.array([[1.0, 1.1, 0.1, 0.0], [-0.9, 1.0, 0.0, 0.1]], np.float32)
        >>> found = cluster(weight, np.ones_like(weight), price=0.001)
        >>> found.codebook.round(2), found.index.tolist()
        (array([-0.9 ,  0.  ,  1.03]), [[2, 2, 1, 1], [0, 2, 1, 1]])
        >>> cluster(weight, np.ones_like(weight), price=1.0).kept
        0
        >>> cluster(weight, np.ones_like(weight), price=1.0, zeros=False).kept
        6
    """
    rows, columns = weight.shape
    square = np.square(weight, dtype=np.float64)
    top = float(np.abs(weight).max()) if weight.size else 0.0
    mean = float((curvature * square).sum() / square.sum()) if top else 1.0
    step = max(math.sqrt(12 * price / (mean * math.log(2))), 2 * top / (_MOST_LEVELS - 1))
    half = max(round(top / step), int(not zeros)) if top else 0
    codebook = step * np.arange(-half, half + 1, dtype=np.float64)
    index = np.empty(weight.shape, np.int16)
    # Before anything is known of the frequencies, each weight takes the nearest level.
    rates = Rates(0.0, np.zeros(codebook.size), np.zeros(rows), np.zeros(columns))
    for number in range(_ROUNDS):
        zero = int(np.flatnonzero(codebook == 0)[0])
        tallies = _assign(
            weight,
            curvature,
            codebook,
            zero,
            price if number else 0.0,
            rates.log_kept,
            rates.levels,
            rates.rows,
            rates.columns,
            zeros,
            index,
        )
        counts, sums, weights, in_rows, in_columns, position_bits, loss = tallies
        means = np.divide(sums, weights, out=codebook.copy(), where=weights > 0)
        means[zero] = 0.0
        used = (counts > 0) | (np.arange(counts.size) == zero)
        ranks = (np.cumsum(used) - 1).astype(np.int16)
        codebook, counts = means[used], counts[used]
        rates = Rates.of(counts, int(ranks[zero]), in_rows, in_columns)
    index = ranks[index]
    total = float(position_bits + (counts * rates.levels).sum())
    return Clustering(codebook, index, total, float(loss), rates)


@numba.njit(cache=True, nogil=True)
def cheapest(w, f, codebook, zero, price, levels, on, off):  # type: ignore[no-untyped-def]
    """Return the level of least loss and bits for a weight ``w`` of curvature ``f``.

    Args:
        w: The weight.
        f: Its curvature.
        codebook: Ascending levels.
        zero: Index of the level 0.
        price: Loss that a bit is worth.
        levels: Bits of each level among the non-zero ones.
        on: Bits that tell that the weight is not zero.
        off: Bits that tell that it is; infinite if it must not be.
    """
    best, least = zero, 0.5 * f * w * w + price * off if off < np.inf else np.inf
    above = np.searchsorted(codebook, w)
    for level in range(max(0, above - _NEAR), min(codebook.size, above + _NEAR)):
        cost = 0.5 * f * (w - codebook[level]) ** 2 + price * (on + levels[level])
        if level != zero and cost < least:
            best, least = level, cost
    return best


@numba.njit(cache=True, nogil=True)
def _assign(weight, curvature, codebook, zero, price, kept, levels, rows, columns, zeros, index):  # type: ignore[no-untyped-def]
    """Write the best level of each weight into ``index``, and return tallies of them.

    Returns:
        For each level the number of its weights, the sum of their ``F w`` and of their ``F``; the
        numbers of non-zero weights in rows and in columns; the bits of all positions; the loss.
    """
    counts, sums, weights = np.zeros((3, codebook.size))
    in_rows, in_columns = np.zeros(rows.size), np.zeros(columns.size)
    row_factors, column_factors = np.exp(kept + rows), np.exp(columns)
    position_bits = loss = 0.0
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w, f = weight[i, j], curvature[i, j]
            probability = min(row_factors[i] * column_factors[j], _LARGEST)
            off = -np.log2(1 - probability)
            if w == 0:  # as most weights of a sparse matrix
                index[i, j] = zero
                counts[zero] += 1
                weights[zero] += f
                position_bits += off
                continue
            on = -np.log2(probability)
            best = cheapest(w, f, codebook, zero, price, levels, on, off if zeros else np.inf)
            index[i, j] = best
            counts[best] += 1
            sums[best] += f * w
            weights[best] += f
            loss += 0.5 * f * (w - codebook[best]) ** 2
            if best != zero:
                in_rows[i] += 1
                in_columns[j] += 1
            position_bits += on if best != zero else off
    return counts, sums, weights, in_rows, in_columns, position_bits, loss


def price_within(
    bits: Callable[[float], float],
    budget: float,
    near: float | None = None,
    tolerance: float = 0.02,
    tries: int = 64,
) -> float:
    """Return a price at which something costs at most a budget of bits, and nearly all of it.

    Bits are about a power of the price, so that the search goes by their logarithms. It ends early
    where bits no longer rise, since a tensor has no more levels.

    Args:
        bits: Bits at a price; they fall as the price rises.
        budget: Most bits.
        near: A price to begin the search at.
        tolerance: Fraction of the budget that may be left.
        tries: Number of prices that are tried, but for those that find one within the budget.

    Raises:
        ValueError: No price is high enough.

    Example:
        >>> round(price_within(lambda price: 100 / price, budget=20), 2)
        5.05
    """
    price, aim = near or 1e-6, math.log((1 - tolerance / 2) * budget)
    # Logarithms of a price and its bits: the highest price of too many bits, the lowest of few
    # enough, and the one of the most bits within the budget.
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    best: tuple[float, float] | None = None
    for number in count(1):
        cost = bits(price)
        here = math.log(price), math.log(max(cost, 1e-9))
        if cost > budget:
            low = here
            if price > _HIGHEST:
                raise ValueError(f"at least {cost:,.0f} are needed, and {budget:,.0f} given")
        else:
            high, best = here, max(best or here, here, key=lambda pair: pair[1])
            full = low is None and here[0] < best[0] - _FULL
            if cost >= (1 - tolerance) * budget or full:
                break
        if best is not None and (number >= tries or price < _LOWEST):
            break
        if low is None or high is None:
            # About the inverse of the square root; longer steps if that is not enough.
            step = 2 * (here[1] - aim)
            longest = math.log(_LONGEST if near is None else 2.0) * number
            price *= math.exp(math.copysign(min(max(abs(step), 0.02 * 1.5**number), longest), step))
        else:
            if abs(high[0] - low[0]) < tolerance / 100:
                break
            part = (low[1] - aim) / (low[1] - high[1])
            price = math.exp(low[0] + min(max(part, 0.2), 0.8) * (high[0] - low[0]))
    assert best is not None
    return math.exp(best[0])
