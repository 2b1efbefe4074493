"""The trade-off of size and loss: a trained network's zeros and levels at several sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.clusterings import clustered, decoded
from fitsmall.compressors.choices.entropy_constrained import Clustering, price_within
from fitsmall.compressors.file.sizes import dense_bytes
from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.weights import twin_of

__all__ = ["Offer", "trade_off"]


@dataclass(frozen=True)
class Offer:
    """A size, and what the network becomes for it.

    Args:
        ratio: Dense bytes, as a multiple of the size.
        size: Estimated bytes of the file.
        clusterings: What each parameter becomes, and how much the loss rises for it by estimate, if
            weights are rounded and nothing makes up for it.
    """

    ratio: float
    size: int
    clusterings: Mapping[str, Clustering]

    @property
    def losses(self) -> dict[str, float]:
        """Estimated rise of the loss for each parameter."""
        return {name: found.loss for name, found in self.clusterings.items()}

    @property
    def loss(self) -> float:
        """Estimated rise of the loss."""
        return sum(self.losses.values())

    @torch.no_grad()
    def apply_(self, module: nn.Module) -> None:
        """Round the weights of a module."""
        for name, found in self.clusterings.items():
            parameter = module.get_parameter(name)
            parameter.copy_(decoded(found).view(parameter.shape))


@torch.no_grad()
def trade_off(
    module: nn.Module, curvatures: Mapping[str, Tensor], ratios: Sequence[float]
) -> list[Offer]:
    r"""Return what a network becomes at several sizes, all parameters at one price of a bit.

    To second order, with a diagonal curvature, rounding raises the loss by
    :math:`\sum_i F_i (w_i - c_{a_i})^2 / 2`. Levels are chosen with the mean of :math:`F_i` and its
    mean over the tensor (:mod:`~fitsmall.compressors.choices.entropy_constrained`). Sizes that
    cannot be reached are left out.

    Args:
        module: Trained module.
        curvatures: Second derivative :math:`F` of the loss by each parameter, by its name.
            Parameters without one stay as they are.
        ratios: How many times smaller than the dense bytes the file becomes.

    Example:
        >>> net = nn.Linear(64, 64)
        >>> curvatures = {"weight": torch.ones(64, 64)}
        >>> [offer] = trade_off(net, curvatures, ratios=[10])
        >>> abs(offer.size - 4 * (64 * 64 + 64) // 10) < 30
        True
    """
    dense = dense_bytes(module)
    zeros = twin_of(module)
    for name in curvatures:
        zeros.get_parameter(name).zero_()
    others = coded_size(zeros.state_dict())
    weights = {name: module.get_parameter(name) for name in curvatures}
    tiny = torch.finfo(torch.float32).tiny
    damped = {name: (each + each.mean()) / 2 + tiny for name, each in curvatures.items()}

    def found(price: float) -> dict[str, Clustering]:
        return {name: clustered(w, damped[name], price) for name, w in weights.items()}

    def bits(price: float) -> float:
        return sum(each.bits for each in found(price).values())

    offers: list[Offer] = []
    price = None
    for ratio in ratios:
        if dense / ratio <= others:
            continue
        price = price_within(bits, 8 * (dense / ratio - others), price)
        clusterings = {
            name: replace(each, loss=_loss(weights[name], curvatures[name], each))
            for name, each in found(price).items()
        }
        size = round(others + sum(each.bits for each in clusterings.values()) / 8)
        offers.append(Offer(ratio, size, clusterings))
    return offers


def _loss(weight: Tensor, curvature: Tensor, found: Clustering) -> float:
    """Return by how much the loss rises if a weight is rounded: without any damping."""
    rounded = decoded(found).view(weight.shape).to(weight)
    return float((curvature * (weight - rounded).square()).sum()) / 2
