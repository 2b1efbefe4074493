"""Floating-point operations: all, and those that a network with zeros needs."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

__all__ = ["counter", "needed"]

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# The kernels of processors, which torch leaves out; it sees shapes in the place of tensors.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    """A context that counts the products and sums of matrix products, convolutions, attention.

    Example:
        >>> with counter() as counted:
        ...     _ = nn.Linear(3, 4)(torch.ones(2, 3))
        >>> counted.get_total_flops()
        48
    """
    return FlopCounterMode(display=False, custom_mapping=_ATTENTION)


def needed(counted: FlopCounterMode, module: nn.Module) -> float:
    """Operations that are left if those with a weight of zero are not done.

    This is the theoretical speed-up's denominator as ShrinkBench has it (Blalock et al., 2020): no
    engine skips single zeros for nothing.

    Args:
        counted: What counted a forward pass of the module.
        module: The module, whose weights are looked at.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False))
        >>> _ = net[0].weight.data[1:].zero_()
        >>> with counter() as counted:
        ...     _ = net(torch.ones(2, 3))
        >>> needed(counted, net)
        12.0
    """
    saved = 0.0
    counts: dict[str, dict[Any, int]] = counted.get_flop_counts()
    for name, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and not any(True for _ in layer.children()):
            done = sum(counts.get(f"{type(module).__name__}.{name}", {}).values())
            saved += done * (1 - int(weight.count_nonzero()) / weight.numel())
    return counted.get_total_flops() - saved
