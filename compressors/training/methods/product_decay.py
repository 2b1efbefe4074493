"""Weight decay on a product of two factors, instead of on each factor."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fitsmall.compressors.surgery.factors import Factored
from fitsmall.compressors.torch_internals import probe_of

__all__ = ["decay_products_", "decays_weights_directly"]

# Settings of the probe: its weight of 1 moves little, but far more than rounding errors.
_RATE, _DECAY, _STEPS = 1e-4, 0.1, 20


@torch.no_grad()
def decay_products_(
    optimizer: Optimizer, pairs: Iterable[Factored], gradient_scale: float = 1.0
) -> None:
    r"""Correct weight decay so that it acts on products of factors.

    The gradients of ``||U V||^2 / 2`` are ``U V V^T`` and ``U^T U V``. The optimizer itself adds
    those of ``(||U||^2 + ||V||^2) / 2``, which are ``U`` and ``V``. The difference is added to the
    gradients before its step, or to the factors themselves if its decay is decoupled.

    Args:
        optimizer: Optimizer that is about to step.
        pairs: Pairs of layers in the place of one.
        gradient_scale: Factor by which the gradients are still scaled; 1 if they are unscaled.
    """
    groups = {p: g for g in optimizer.param_groups if g.get("weight_decay") for p in g["params"]}
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
            if decays_weights_directly(optimizer, group):
                parameter.sub_(difference, alpha=float(group["lr"]) * decay)
            else:
                parameter.grad.add_(difference, alpha=gradient_scale * decay)


def decays_weights_directly(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether an optimizer's weight decay is decoupled, as AdamW's is.

    It is found by behaviour: a copy of the optimizer moves a weight of 1, with and without decay.
    Decoupled decay multiplies the weight by ``1 - lr * decay`` in each step, whatever the gradients
    are; other decay is added to the gradient.

    Args:
        optimizer: The optimizer, which stays as it is.
        group: Its group of parameters whose settings count.

    Example:
        >>> weights = [nn.Parameter(torch.ones(2))]
        >>> adam, adamw = torch.optim.Adam(weights), torch.optim.AdamW(weights)
        >>> [decays_weights_directly(own, own.param_groups[0]) for own in (adam, adamw)]
        [False, True]
    """
    if isinstance(optimizer, _GRADIENT_DESCENT):
        return False
    kind = (type(optimizer), *sorted((k, str(v)) for k, v in group.items() if k not in _VARYING))
    if kind not in _KNOWN:
        settings = {**group, "lr": _RATE}
        try:
            plain = _moved(optimizer, {**settings, "weight_decay": 0.0})
            decayed = _moved(optimizer, {**settings, "weight_decay": _DECAY})
        except Exception:  # noqa: BLE001  an optimizer that no CPU or no small weight will do for
            documented = isinstance(optimizer, torch.optim.AdamW)
            return bool(group.get("decoupled_weight_decay", documented))
        # An optimizer that averages or normalises gradients turns decay that was added to them into
        # a larger or smaller change.
        shrunk = _STEPS * _RATE * _DECAY
        _KNOWN[kind] = abs((plain - decayed) - shrunk) < 0.005 * shrunk
    return _KNOWN[kind]


# Without momentum both kinds of decay change a weight by the same amount, to first order. torch
# documents that these optimizers add decay to the gradient.
_GRADIENT_DESCENT = (torch.optim.SGD, torch.optim.ASGD)

# Results by class and settings, without parameters and settings that a schedule changes.
_KNOWN: dict[tuple[Any, ...], bool] = {}
_VARYING = {"params", "param_names", "lr", "initial_lr", "max_lr", "weight_decay"}


def _moved(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return a weight that began as 1, after a few steps with gradients that vary."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    probe = probe_of(optimizer, group, weight)
    for step in range(_STEPS):
        weight.grad = torch.full_like(weight, (1.0, -0.1, -0.5)[step % 3])
        probe.step()
    return float(weight.detach())
