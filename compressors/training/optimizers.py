"""Optimizers and factors: what is known of a weight goes over to the two factors of it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.lowrank import matrix
from fitsmall.compressors.surgery.factors import Factored

__all__ = ["decay_", "transplant_"]

# What optimizers keep: averages of gradients, and of their squares.
_LINEAR = ("exp_avg", "momentum_buffer")
_SQUARE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")

# Optimizers that add the weight, times its decay, to the gradient; others shrink the weight itself.
_COUPLED = ("SGD", "Adam", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "ASGD", "Adadelta")


@torch.no_grad()
def transplant_(optimizer: Optimizer, weight: nn.Parameter, form: str, pair: Factored) -> bool:
    r"""Let an optimizer hold two factors in the place of their product ``W = U V``.

    With ``G`` the gradient of the weight, those of the factors are ``G V^T`` and ``U^T G``, and so
    are their averages. Of averages of squares ``S`` they are ``S (V^2)^T`` and ``(U^2)^T S``, as if
    the entries of ``G`` were independent.

    Returns:
        Whether all that the optimizer knew of the weight went over; state of other kinds is lost.
    """
    reduce, expand = pair.reduce.weight, pair.expand.weight
    for group in optimizer.param_groups:
        for place in [n for n, parameter in enumerate(group["params"]) if parameter is weight]:
            group["params"][place : place + 1] = [reduce, expand]
            if names := group.get("param_names"):
                path = names[place].rpartition(".")[0]
                names[place : place + 1] = [f"{path}.reduce.weight", f"{path}.expand.weight"]
    state: dict[str, Any] = optimizer.state.pop(weight, {})
    moments = {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
    if not state or not moments <= {*_LINEAR, *_SQUARE}:
        return not state
    left, right = pair.left, pair.right
    of_left = {key: _copied(value) for key, value in state.items() if key not in moments}
    of_right = {key: _copied(value) for key, value in state.items() if key not in moments}
    for key in moments:
        moment = matrix(state[key], form)
        u, v = (left.square(), right.square()) if key in _SQUARE else (left, right)
        of_left[key] = pair.like_left(moment @ v.T).contiguous()
        of_right[key] = pair.like_right(u.T @ moment).contiguous()
    optimizer.state[expand], optimizer.state[reduce] = of_left, of_right
    return True


@torch.no_grad()
def decay_(optimizer: Optimizer, pairs: Iterable[Factored], scale: float = 1.0) -> None:
    r"""Let weight decay act on products of factors, instead of on each factor.

    The gradient of ``||U V||^2 / 2`` is ``U V V^T`` and ``U^T U V``, and the optimizer itself will
    add ``U`` and ``V``: the difference goes to the gradients before its step, or to the factors
    where the optimizer shrinks those.

    Args:
        optimizer: Optimizer that is about to step.
        pairs: Layers that became two.
        scale: What the gradients are multiplied by at this moment.
    """
    groups = {p: g for g in optimizer.param_groups if g.get("weight_decay") for p in g["params"]}
    coupled = type(optimizer).__name__ in _COUPLED
    for pair in pairs:
        if pair.expand.weight not in groups and pair.reduce.weight not in groups:
            continue
        left, right = pair.left, pair.right
        for parameter, product in (
            (pair.expand.weight, pair.like_left(left @ (right @ right.T))),
            (pair.reduce.weight, pair.like_right((left.T @ left) @ right)),
        ):
            if parameter not in groups or parameter.grad is None:
                continue
            group, decay = groups[parameter], groups[parameter]["weight_decay"]
            difference = product - parameter
            if coupled and not group.get("decoupled_weight_decay"):
                parameter.grad.add_(difference, alpha=scale * decay)
            else:
                parameter.sub_(difference, alpha=float(group["lr"]) * decay)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
