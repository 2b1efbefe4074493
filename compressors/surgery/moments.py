"""Moments: carry an optimizer's state of a parameter over to the parameters that replace it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Successor", "transplant_"]

# Names under which optimizers keep averages of gradients, and of squared gradients.
_LINEAR = ("exp_avg", "momentum_buffer")
_SQUARE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


class Successor(NamedTuple):
    """A parameter that replaces another.

    Args:
        name: Its name in the module, for optimizers that keep names.
        parameter: The parameter.
        moment: Function from the replaced parameter's average of gradients to its own.
        square: The same function for averages of squared gradients.
    """

    name: str
    parameter: nn.Parameter
    moment: Callable[[Tensor], Tensor]
    square: Callable[[Tensor], Tensor]


@torch.no_grad()
def transplant_(optimizer: Optimizer, old: nn.Parameter, successors: Sequence[Successor]) -> bool:
    """Replace a parameter of an optimizer by its successors, and carry its moments over.

    The successors take the parameter's position in its group. An optimizer without the parameter
    stays as it is.

    Args:
        optimizer: Optimizer to change.
        old: The parameter.
        successors: Parameters that replace it.

    Returns:
        Whether the whole state was carried over. State of another kind than averages of gradients
        and of their squares is dropped.

    Example:
        >>> old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([old], lr=1.0, momentum=0.9)
        >>> optimizer.state[old]["momentum_buffer"] = torch.tensor([3.0, 4.0])
        >>> first = lambda moment: moment[:1]
        >>> transplant_(optimizer, old, [Successor("new", new, first, first)])
        True
        >>> optimizer.state[new]
        {'momentum_buffer': tensor([3.])}
    """
    for group in optimizer.param_groups:
        for at in [n for n, parameter in enumerate(group["params"]) if parameter is old]:
            group["params"][at : at + 1] = [own.parameter for own in successors]
            if names := group.get("param_names"):
                names[at : at + 1] = [own.name for own in successors]
    state: dict[str, Any] = optimizer.state.pop(old, {})
    moments = {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == old.shape}
    if not state or not moments <= {*_LINEAR, *_SQUARE}:
        return not state
    for own in successors:
        optimizer.state[own.parameter] = {
            key: (own.square if key in _SQUARE else own.moment)(value).contiguous()
            if key in moments
            else _copied(value)
            for key, value in state.items()
        }
    return True


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
