"""Weight sharing: few distinct values per tensor, by exact one-dimensional k-means."""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Dense, Lookup, Sparse
from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection

__all__ = ["Codebook", "KMeans", "assign", "linear"]

# Up to this many distinct values k-means is exact; above, values are grouped into as many equal
# bins, whose error is far below that of a cluster.
BINS = 4096

CODEBOOK_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class KMeans(Projection):
    r"""Nearest tensor with at most ``k`` distinct non-zero values: ``min sum_i (w_i - c_{a_i})^2``.

    Dynamic programming over the sorted values finds the global optimum (Wang and Song, 2011,
    "Ckmeans.1d.dp"), exactly for up to 4,096 distinct values, and over 4,096 bins for more. Zeros
    stay zero and are not in a cluster, so that pruned weights need no entry of the codebook.

    Args:
        clusters: Number ``k`` of distinct non-zero values, 1 to 4,096; any number, not only
            powers of two, since the index is entropy coded.
        codebook_dtype: Name of the float type that centroids are rounded to; ``"bfloat16"``
            halves the codebook's bytes.

    Raises:
        ValueError: The weight holds NaN or infinity.

    Example:
        >>> KMeans(clusters=2).project(torch.tensor([1.0, 1.5, 0.0, -4.0, -5.0]))
        tensor([ 1.2500,  1.2500,  0.0000, -4.5000, -4.5000])
    """

    clusters: int
    codebook_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not isinstance(self.clusters, int) or not 1 <= self.clusters <= BINS:
            raise ValueError(
                f"KMeans needs a whole number of clusters from 1 to {BINS:,}, and got "
                f"clusters={self.clusters!r}"
            )
        if self.codebook_dtype not in CODEBOOK_DTYPES:
            known = ", ".join(CODEBOOK_DTYPES)
            raise ValueError(f"codebook_dtype is one of {known}, got {self.codebook_dtype!r}")

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        if not weight.isfinite().all():
            raise ValueError("cannot cluster NaN or infinity: did training diverge?")
        mask = weight != 0
        values = weight[mask]
        codebook = self.centroids(values)
        index = assign(values, codebook)
        if bool(mask.all()):
            return Lookup(Dense(codebook), index.view(weight.shape))
        return Sparse(mask, Lookup(Dense(codebook), index))

    def levels(self, weight: Tensor, importance: Tensor) -> Levels:
        mask = weight != 0
        return Codebook(self.centroids(weight[mask], importance[mask]))

    def centroids(self, values: Tensor, importance: Tensor | None = None) -> Tensor:
        """Return the optimal codebook of values: at most ``k`` centroids, ascending.

        Args:
            values: The values.
            importance: Positive weights of their squared errors; by default all are 1.

        Raises:
            ValueError: A centroid overflows or underflows the codebook's dtype.
        """
        flat = None if importance is None else importance.flatten().double().cpu()
        exact = _centroids(values.flatten(), self.clusters, flat)
        rounded = exact.to(getattr(torch, self.codebook_dtype)).to(values.dtype)
        if not (rounded.isfinite() & (rounded != 0)).all():
            raise ValueError(
                f"codebook_dtype={self.codebook_dtype!r} cannot hold the centroids "
                f"{exact[~rounded.isfinite() | (rounded == 0)].tolist()}: choose a wider range"
            )
        levels: Tensor = rounded.unique()
        return levels


@dataclass(frozen=True)
class Codebook(Levels):
    """The values of a codebook.

    Args:
        codebook: Ascending values.
    """

    codebook: Tensor

    def best(self, values: Tensor, column: int, curvature: Tensor) -> Tensor:
        return self.codebook[assign(values.contiguous(), self.codebook)]


def linear(values: Tensor, clusters: int) -> Tensor:
    """Return centroids that are evenly spaced from the smallest to the largest value.

    Han et al. (2016) found this initialisation best: large weights are few but important, and an
    initialisation by density leaves them without a centroid nearby.

    Example:
        >>> linear(torch.tensor([-1.0, 0.2, 2.0]), clusters=4)
        tensor([-1.,  0.,  1.,  2.])
    """
    low, high = (float(bound) for bound in values.aminmax())
    steps = torch.linspace(low, high, clusters, dtype=torch.float32, device=values.device)
    return steps.to(values.dtype)


def assign(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the centroid nearest to each value.

    Args:
        values: Tensor of values.
        codebook: Ascending centroids.

    Example:
        >>> assign(torch.tensor([0.4, 0.6, 9.0]), torch.tensor([0.0, 1.0, 2.0]))
        tensor([0, 1, 2])
    """
    if codebook.numel() == 0:
        return torch.zeros(values.shape, dtype=torch.long, device=values.device)
    middles = (codebook[1:].double() + codebook[:-1].double()) / 2
    # Rounded down, so that a value lies above the rounded middle if it lies above the middle.
    edges = middles.to(values.dtype)
    edges = torch.where(edges > middles, edges.nextafter(edges - torch.inf), edges)
    return torch.bucketize(values, edges)


def _centroids(values: Tensor, clusters: int, importance: Tensor | None) -> Tensor:
    """Return at most ``clusters`` optimal centroids, ascending."""
    # A tensor that is clustered already must not change. For most others the first values show that
    # they are not, without sorting all of them.
    if values[:BINS].unique().numel() <= clusters:
        levels: Tensor = values.unique()
        if levels.numel() <= clusters:
            return levels
    counts, points = _histogram(values.double().cpu(), importance)
    ends = _partition(counts, points, clusters)
    sums = np.add.reduceat(counts * points, ends[:-1])
    centroids = sums / np.add.reduceat(counts, ends[:-1])
    return torch.from_numpy(centroids).to(values)


def _histogram(
    values: Tensor, importance: Tensor | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights of values and their points: distinct values, or means of bins if too many.

    The weight of a value is the sum of its importances, or its number.
    """
    points = index = None
    if values[: 4 * BINS].unique().numel() <= BINS:  # otherwise all need not be sorted
        points, index = values.unique(return_inverse=True)
    if points is None or index is None or points.numel() > BINS:
        low, high = values.min(), values.max()
        index = ((values - low) * (BINS / (high - low))).long().clamp_max(BINS - 1)
        points = None
    importance = torch.ones_like(values) if importance is None else importance
    counts = torch.bincount(index, importance)
    if points is None:
        sums = torch.bincount(index, values * importance)
        filled = counts > 0
        counts, points = counts[filled], sums[filled] / counts[filled]
    return counts.numpy(), points.numpy()


@numba.njit(cache=True)
def _partition(counts, points, clusters):  # type: ignore[no-untyped-def]
    """Ends of the optimal clusters of sorted points: cluster ``j`` is ``[ends[j], ends[j + 1])``.

    ``D_j(m) = min over i of D_{j-1}(i) + sse(i, m)`` is the least error of ``j`` clusters on the
    first ``m`` points. The best ``i`` grows with ``m``, so the middle ``m`` of a range halves the
    search for both sides: ``O(k n log n)`` instead of ``O(k n^2)``.
    """
    n = points.size
    clusters = min(clusters, n)
    # Centring keeps the difference of squares accurate for points far from zero.
    centred = points - (counts * points).sum() / counts.sum()
    weight, first, second = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
    weight[1:] = counts.cumsum()
    first[1:] = (counts * centred).cumsum()
    second[1:] = (counts * centred**2).cumsum()
    error = np.empty(n + 1)
    error[0] = 0.0
    error[1:] = second[1:] - first[1:] ** 2 / weight[1:]
    start = np.zeros((clusters + 1, n + 1), np.int64)
    stack = np.empty((64, 4), np.int64)
    for j in range(2, clusters + 1):
        previous = error.copy()
        stack[0] = (j, n, j - 1, n - 1)
        depth = 1
        while depth > 0:
            depth -= 1
            low, high, left, right = stack[depth]
            m = (low + high) // 2
            best, where = np.inf, left
            for i in range(max(left, j - 1), min(right, m - 1) + 1):
                w, s = weight[m] - weight[i], first[m] - first[i]
                candidate = previous[i] + max(0.0, second[m] - second[i] - s * s / w)
                if candidate < best:
                    best, where = candidate, i
            error[m], start[j, m] = best, where
            if low < m:
                stack[depth] = (low, m - 1, left, where)
                depth += 1
            if m < high:
                stack[depth] = (m + 1, high, where, right)
                depth += 1
    ends = np.empty(clusters + 1, np.int64)
    ends[clusters] = n
    for j in range(clusters, 0, -1):
        ends[j - 1] = start[j, ends[j]]
    return ends
