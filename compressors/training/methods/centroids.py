"""Centroids: the means of clusters, and the move of weights to them, in a step of weight sharing.

On the CPU each of the two is one compiled pass over the weights; on other devices torch does it.
Sums are in double precision and in a fixed order, so that a resumed run and every process get the
same centroids bit for bit.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["move_", "nearest", "precision", "sums"]

# Independent accumulators: an addition need not wait for the one before it.
_LANES = 4
# Largest number of entries of the matrix of memberships.
_BLOCK = 2**24


def precision(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: double where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sums(weights: Tensor, positions: Tensor, index: Tensor, clusters: int) -> Tensor:
    r"""Sum the weights of every cluster, ``s_j = sum over i with a_i = j of w_i``.

    Args:
        weights: Vector of weights.
        positions: Positions of the weights that are in a cluster; empty if all are.
        index: Cluster ``a_i`` of each of these.
        clusters: Number of clusters.

    Example:
        >>> weights, everywhere = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([], dtype=int)
        >>> sums(weights, everywhere, torch.tensor([0, 1, 0], dtype=torch.uint8), clusters=2)
        tensor([5., 2.], dtype=torch.float64)
    """
    if weights.device.type == "cpu":
        single = weights if _compiled(weights) else weights.float()
        vector, where, members = _arrays(single, positions, index)
        return torch.from_numpy(_sums(vector, where, members, clusters))
    return _product(weights, positions, index, clusters)


def move_(
    weights: Tensor, positions: Tensor, index: Tensor, codebook: Tensor, strength: float
) -> None:
    r"""Move weights towards their centroids, ``w_i <- w_i + strength (c_{a_i} - w_i)``.

    Args:
        weights: Vector of weights.
        positions: Positions of the weights that are in a cluster; empty if all are.
        index: Cluster ``a_i`` of each of these.
        codebook: Centroids ``c``.
        strength: In [0, 1].

    Example:
        >>> weights, everywhere = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([], dtype=int)
        >>> index, codebook = torch.tensor([0, 1, 0], dtype=torch.uint8), torch.tensor([3.0, 0.0])
        >>> move_(weights, everywhere, index, codebook, strength=0.5)
        >>> weights
        tensor([2.0000, 1.0000, 3.5000])
    """
    if _compiled(weights):
        vector, where, members = _arrays(weights, positions, index)
        if strength < 1.0:
            _blend(vector, where, members, codebook.numpy(), vector.dtype.type(strength))
        else:
            _replace(vector, where, members, codebook.numpy())
        return
    for start in range(0, len(index), _BLOCK):
        part = slice(start, start + _BLOCK)
        everywhere = len(index) == len(weights)
        at = part if everywhere else positions[part].long()
        weights[at] = weights[at].lerp(codebook[index[part].long()], strength)


def nearest(weights: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each weight.

    Args:
        weights: Weights.
        codebook: Ascending centroids.

    Example:
        >>> nearest(torch.tensor([-0.9, 0.2, 3.0]), torch.tensor([-1.0, 0.5, 1.0]))
        tensor([0, 1, 2])
    """
    return torch.bucketize(weights, (codebook[1:] + codebook[:-1]) / 2)


def _product(weights: Tensor, positions: Tensor, index: Tensor, clusters: int) -> Tensor:
    """Return sums as a product with the matrix of memberships.

    On a GPU scattered additions have no fixed order, but a product has.
    """
    values = weights if len(index) == len(weights) else weights[positions.long()]
    rows = max(1, _BLOCK // max(1, clusters))
    double = precision(weights.device)
    result = torch.zeros(clusters, dtype=double, device=weights.device)
    each = torch.arange(clusters, device=weights.device).unsqueeze(1)
    for members, block in zip(index.split(rows), values.split(rows), strict=True):
        result += (members == each).to(double) @ block.to(double)
    return result


def _compiled(weights: Tensor) -> bool:
    return weights.device.type == "cpu" and weights.dtype in (torch.float32, torch.float64)


def _arrays(weights: Tensor, positions: Tensor, index: Tensor) -> tuple[NDArray[np.generic], ...]:
    # For signed indexes numba checks whether they are negative.
    unsigned = index.numpy().view(f"u{index.element_size()}")
    return weights.detach().numpy(), positions.numpy(), unsigned


@numba.njit(cache=True, nogil=True)
def _sums(weights, positions, index, clusters):  # type: ignore[no-untyped-def]
    totals = np.zeros((_LANES, clusters))
    everywhere = positions.size == 0
    length = index.size // _LANES
    for i in range(length):
        for lane in range(_LANES):
            at = lane * length + i
            totals[lane, index[at]] += weights[at if everywhere else positions[at]]
    for at in range(_LANES * length, index.size):
        totals[0, index[at]] += weights[at if everywhere else positions[at]]
    return totals.sum(0)


@numba.njit(cache=True, nogil=True)
def _replace(weights, positions, index, codebook):  # type: ignore[no-untyped-def]
    everywhere = positions.size == 0
    for i in range(index.size):
        weights[i if everywhere else positions[i]] = codebook[index[i]]


@numba.njit(cache=True, nogil=True)
def _blend(weights, positions, index, codebook, strength):  # type: ignore[no-untyped-def]
    everywhere = positions.size == 0
    for i in range(index.size):
        at = i if everywhere else positions[i]
        weights[at] += strength * (codebook[index[i]] - weights[at])
