"""Optimizers: which of them a projection can follow, and the numbers that stages need of them."""

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fitsmall.compressors.torch_internals import unscales_gradients
from fitsmall.compressors.training.sharding import local, whole

__all__ = [
    "all_finite",
    "gradient_of",
    "gradient_scale",
    "hooks_not_called",
    "learning_rate_fraction",
    "like_gradient",
    "refuse",
    "unwrapped",
]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a wrapper such as Lightning Fabric's, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def refuse(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose steps a projection cannot follow.

    Raises:
        ValueError: The optimizer computes the loss at weights of its own, or swaps weights.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(  # noqa: TRY004  a mistake of settings
            f"{name} searches along a line, computing the loss at weights that are not compressed: "
            "use SGD, Adam or another optimizer that computes it once in a step"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(  # noqa: TRY004
            f"{name} swaps the weights for averages of its own, which are not compressed: use the "
            "optimizer that it is based on, with fitsmall.callbacks.EMA for the average"
        )


def hooks_not_called(optimizer: Optimizer) -> ValueError:
    """Return the error for an optimizer that does not call its step hooks."""
    return ValueError(
        f"{type(optimizer).__name__} does not call the hooks of its step, so that no projection "
        "can follow it: use an optimizer that derives from torch's Optimizer and calls its "
        "__init__; in a loop of your own, step it after plan.restore_"
    )


def all_finite(optimizer: Optimizer) -> bool:
    """Return whether all gradients are finite; a gradient scaler skips the step if they are not."""
    gradients = [
        parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    finite = [whole(gradient.isfinite().all()) for gradient in gradients]
    return bool(torch.stack(finite).all()) if finite else True


def gradient_scale(optimizer: Optimizer, scaler: GradScaler | None) -> float:
    """Return the factor by which gradients are still scaled just before a step."""
    # Fused optimizers take scaled gradients and unscale them in their step.
    scaled = scaler is not None and unscales_gradients(optimizer)
    return float(scaler.get_scale()) if scaler is not None and scaled else 1.0


def learning_rate_fraction(optimizer: Optimizer) -> float:
    """Return the learning rate as a fraction of the largest that its schedule has.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
        >>> schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.25)
        >>> learning_rate_fraction(optimizer)
        0.25
    """
    group = optimizer.param_groups[0]
    largest = max(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr"))
    return float(group["lr"]) / largest if largest else 1.0


def like_gradient(dense: Tensor, gradient: Tensor) -> Tensor:
    """Return a dense tensor in the layout of a gradient; a sparse one has only some of its rows."""
    return dense.sparse_mask(gradient.coalesce()) if gradient.is_sparse else dense


def gradient_of(parameter: nn.Parameter, scale: float) -> Tensor | None:
    """Return this process's part of a parameter's gradient, divided by a scale."""
    if parameter.grad is None:
        return None
    gradient = local(parameter.grad)
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return gradient if scale == 1.0 else gradient / scale
