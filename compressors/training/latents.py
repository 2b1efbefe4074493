"""Latents: the unprojected weights that an optimizer moves, kept in its own state.

A checkpoint of the optimizer saves them there, and they load with ``weights_only=True``.
"""

from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.training.sharding import local

__all__ = ["find_latent", "save_latent"]

_LATENT = "latent"


def find_latent(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor | None:
    """Return the latent of a parameter, or None if it has none."""
    latent: Tensor | None = optimizer.state.get(parameter, {}).get(_LATENT)
    return latent


def save_latent(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Copy a parameter to its latent, and return whether that was possible.

    It is impossible before the parameter's first update: many optimizers take any state that is not
    empty for an initialised one.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([weight])
        >>> save_latent(optimizer, weight)
        False
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> save_latent(optimizer, weight)
        True
    """
    state = optimizer.state.get(parameter, {})
    if not state and parameter.grad is None:
        return False
    if _LATENT in state:
        local(state[_LATENT]).copy_(local(parameter))
    else:
        optimizer.state[parameter][_LATENT] = parameter.detach().clone()
    return True
