r"""Ranks of a trained layer by what it answers, instead of by its weights alone.

A layer's responses are ``y = W x + b``, through the batch-norm behind it where there is one. With a
rank-``r`` matrix ``M`` the layer of weight ``M W`` answers ``M y + c``: whatever the inputs look
like, all that matters is a matrix of the outputs' size. Three criteria find it:

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

# Zhang et al.: the coupling of the auxiliary responses, and the turns with each.
_COUPLINGS, _TURNS = (0.01, 1.0), 25

_STEPS, _STARTS = 100, 64


@dataclass(frozen=True, eq=False)
class Map:
    """``y -> M y + c``, what a layer of lower rank makes of the responses.

    Args:
        matrix: ``M``, of shape ``m x m``.
        offset: ``c``, of ``m`` numbers.
    """

    matrix: Tensor
    offset: Tensor

    def __call__(self, responses: Tensor) -> Tensor:
        return responses @ self.matrix.T + self.offset


def plain(weight: Tensor, scale: Tensor, shift: Tensor, rank: int) -> Map:
    """The map of the nearest weight of a rank.

    Args:
        weight: ``m x n`` matrix.
        scale: What the batch-norm multiplies outputs by, of ``m`` numbers; ones if there is none.
        shift: What responses are where the inputs are zero.
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
    """Responses projected onto their principal components: the least squared error of a rank.

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
    """The least squared error behind a ReLU, which does not see what lies below zero.

    Zhang, Zou, He and Sun (2015), "Accelerating very deep convolutional networks": auxiliary
    responses ``z`` are coupled to the map, ``sum ||relu(y) - relu(z)||^2 + l ||z - (M y + c)||^2``,
    and found in closed form for each number, in turns with the map by regression of reduced rank.
    It starts from :func:`whitened` and is never worse, on these responses.

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
            # Below zero what was positive is lost as a whole; above it, both terms are quadratic.
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
    """Squared error of the layer's outputs, as a fraction of their variance.

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
    """The smallest rank whose error is within a tolerance, by bisection; the full one if none is.

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
    r"""Upper estimates of the ReLU singular values of a layer without bias.

    Dittmer, King and Maass (2020): ``s_k`` is the least that any ``L`` of rank ``k`` can make
    ``max over ||x|| <= 1 of ||relu(W x) - relu(L x)||``. Here ``L`` is the best of its rank in the
    usual sense, and the maximum is climbed from many starts. Since ``relu(u) - relu(-u) = u``,

        sigma_{k+1} / 2 <= s_k <= sigma_{k+1}:

    on the whole ball a ReLU saves little; what it saves depends on the inputs.

    Args:
        weight: ``m x n`` matrix.

    Returns:
        For k = 0, 1, ... up to the number of singular values less one.

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
        # From these two the bound from below is reached at once.
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
