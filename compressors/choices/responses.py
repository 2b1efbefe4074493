r"""Ranks of a trained layer by its responses, and not only by its weights.

A layer's responses are ``y = W x + b``, after the batch-norm that follows it, if there is one. With
a matrix ``M`` of rank ``r``, a layer of weight ``M W`` responds with ``M y + c``, so that only a
matrix of ``m x m`` for ``m`` outputs has to be found. Three criteria find it:

=============  =====================================  ============================================
criterion      minimises                              found by
=============  =====================================  ============================================
``plain``      ``||W - M W||``                        singular value decomposition of ``W``
``whitened``   ``sum ||y - (M y + c)||^2``            principal components of the responses
``rectified``  ``sum ||relu(y) - relu(M y + c)||^2``  alternation, Zhang et al. (2015)
=============  =====================================  ============================================
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Map", "error", "plain", "rectified", "relu_singular_values", "smallest", "whitened"]

# Zhang et al.: weights of the coupling to the auxiliary responses, and alternations with each.
_COUPLINGS, _TURNS = (0.01, 1.0), 25

# Steps and random starts of the search for a maximum.
_STEPS, _STARTS = 100, 64


@dataclass(frozen=True, eq=False)
class Map:
    """``y -> M y + c``, the responses of a layer of lower rank.

    Args:
        matrix: ``M``, of shape ``m x m``.
        offset: ``c``, of ``m`` numbers.
    """

    matrix: Tensor
    offset: Tensor

    def __call__(self, responses: Tensor) -> Tensor:
        return responses @ self.matrix.T + self.offset


def plain(weight: Tensor, scale: Tensor, shift: Tensor, rank: int) -> Map:
    """Return the map of the nearest weight of a rank.

    Args:
        weight: ``m x n`` matrix.
        scale: Factors of the batch-norm, of ``m`` numbers; ones if there is none.
        shift: Responses to an input of zero, of ``m`` numbers.
        rank: Number of singular values that stay.

    Example:
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> plain(weight, torch.ones(2), torch.zeros(2), rank=1)(torch.tensor([[5.0, 7.0]]))
        tensor([[5., 0.]])
    """
    basis = torch.linalg.svd(weight, full_matrices=False).U[:, :rank]
    matrix = scale[:, None] * (basis @ basis.T) / scale
    return Map(matrix, shift - matrix @ shift)


def whitened(responses: Tensor, rank: int) -> Map:
    """Return the projection of responses onto principal components: least squared error of a rank.

    Args:
        responses: One response a row, ``N x m``.
        rank: Number of components.

    Example:
        >>> responses = torch.tensor([[1.0, 5.0], [-1.0, 5.0], [2.0, 5.0]])
        >>> whitened(responses, rank=1)(responses)
        tensor([[ 1.,  5.],
                [-1.,  5.],
                [ 2.,  5.]])
    """
    mean = responses.mean(0)
    centred = responses - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors[:, -rank:]
    matrix = basis @ basis.T
    return Map(matrix, mean - matrix @ mean)


def rectified(responses: Tensor, rank: int) -> Map:
    """Return the map of least squared error after a ReLU, found by alternation.

    Zhang, Zou, He and Sun (2015), "Accelerating very deep convolutional networks": auxiliary
    responses ``z`` are coupled to the map, ``sum ||relu(y) - relu(z)||^2 + l ||z - (M y + c)||^2``,
    and found in closed form for each number, alternating with the map, by reduced-rank regression.
    The search starts from :func:`whitened`, and its result is never worse on these responses.

    Args:
        responses: One response a row, ``N x m``.
        rank: Rank of the map.
    """
    wanted = responses.relu()
    best = whitened(responses, rank)
    least = float((wanted - best(responses).relu()).square().sum())
    found = best
    mean = responses.mean(0)
    centred = responses - mean
    gram = centred.T @ centred
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    for coupling in _COUPLINGS:
        for _ in range(_TURNS):
            answer = found(responses)
            # For z below zero relu(z) is 0; above, both terms are quadratic in z.
            below = answer.clamp_max(0)
            above = ((coupling * answer + wanted) / (coupling + 1)).clamp_min(0)
            lost = wanted.square() + coupling * (below - answer).square()
            kept = (wanted - above).square() + coupling * (above - answer).square()
            auxiliary = torch.where(kept < lost, above, below)
            target = auxiliary.mean(0)
            full = torch.linalg.solve(gram + ridge, centred.T @ (auxiliary - target)).T
            _, vectors = torch.linalg.eigh(full @ gram @ full.T)
            basis = vectors[:, -rank:]
            matrix = basis @ (basis.T @ full)
            found = Map(matrix, target - matrix @ mean)
            now = float((wanted - found(responses).relu()).square().sum())
            if now < least:
                best, least = found, now
    return best


def error(responses: Tensor, found: Map, relu: bool) -> float:
    """Return the squared error of the layer's outputs, as a fraction of their variance.

    Args:
        responses: One response a row, ``N x m``.
        found: Map of the layer of lower rank.
        relu: Whether a ReLU follows the layer.

    Example:
        >>> responses = torch.tensor([[1.0], [-3.0]])
        >>> nothing = Map(torch.zeros(1, 1), torch.zeros(1))
        >>> error(responses, nothing, relu=False), error(responses, nothing, relu=True)
        (1.25, 2.0)
    """
    outputs, answers = responses, found(responses)
    if relu:
        outputs, answers = outputs.relu(), answers.relu()
    variance = (outputs - outputs.mean(0)).square().sum().clamp_min(1e-30)
    return float((outputs - answers).square().sum() / variance)


def smallest(error_of: Callable[[int], float], tolerance: float, most: int) -> int:
    """Return the smallest rank whose error is within a tolerance, by bisection; else ``most``.

    Args:
        error_of: Error of a rank, which falls with the rank.
        tolerance: Largest error.
        most: Full rank.

    Example:
        >>> smallest(lambda rank: 1 / rank, tolerance=0.25, most=10)
        4
    """
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if error_of(middle) <= tolerance:
            high = middle
        else:
            low = middle + 1
    return low


def relu_singular_values(weight: Tensor) -> Tensor:
    r"""Return upper estimates of the ReLU singular values of a layer without bias.

    Dittmer, King and Maass (2020): ``s_k`` is the minimum, over ``L`` of rank ``k``, of
    ``max over ||x|| <= 1 of ||relu(W x) - relu(L x)||``. Here ``L`` is the truncated singular value
    decomposition, and the maximum is searched from many starts. Since ``relu(u) - relu(-u) = u``,

        sigma_{k+1} / 2 <= s_k <= sigma_{k+1}:

    on the whole ball a ReLU saves little; on real inputs it may save more.

    Args:
        weight: ``m x n`` matrix.

    Returns:
        Vector of ``s_k`` for k = 0, 1, ... up to the number of singular values minus 1.

    Example:
        >>> values = relu_singular_values(torch.diag(torch.tensor([4.0, 2.0])))
        >>> [round(float(value), 3) for value in values]
        [4.0, 2.0]
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    random = torch.Generator().manual_seed(0)
    found = []
    for rank, value in enumerate(values):
        lower = (left[:, :rank] * values[:rank]) @ right[:rank]
        starts = torch.randn(_STARTS, weight.shape[1], generator=random).to(weight)
        # These two points reach the lower bound.
        points = torch.cat([right[rank : rank + 1], -right[rank : rank + 1], starts])
        points = torch.nn.functional.normalize(points)
        highest = points.new_zeros(())
        for _ in range(_STEPS):
            whole, part = points @ weight.T, points @ lower.T
            gap = whole.relu() - part.relu()
            highest = torch.maximum(highest, gap.norm(dim=1).max())
            slope = (gap * (whole > 0)) @ weight - (gap * (part > 0)) @ lower
            points = torch.nn.functional.normalize(slope + 1e-12 * points)
        found.append(torch.minimum(highest, value))
    return torch.stack(found)
