"""Floating-point operations: all, and those that a network with zeros needs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

__all__ = ["counter", "operations"]

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


@contextmanager
def counter() -> Iterator[FlopCounterMode]:
    """A context that counts the products and sums of matrix products, convolutions, attention.

    Kernels that run a whole recurrent network or encoder layer at once are left out of use
    meanwhile: what is within them could not be counted.

    Example:
        >>> with counter() as counted:
        ...     _ = nn.Linear(3, 4)(torch.ones(2, 3))
        >>> counted.get_total_flops()
        48
    """
    mha, mkldnn, cudnn = torch.backends.mha, torch.backends.mkldnn, torch.backends.cudnn
    # What switching oneDNN off says of processors that this is none of.
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with (
            mkldnn.flags(enabled=False),
            cudnn.flags(enabled=False),
            FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counted,
        ):
            yield counted
    finally:
        mha.set_fastpath_enabled(fast)


def operations(module: nn.Module, forward: Callable[[], Any]) -> tuple[float, float]:
    """Operations of a forward pass: all, and those that are left without weights of zero.

    Their ratio is the theoretical speed-up of ShrinkBench (Blalock et al., 2020): no engine skips
    single zeros for nothing. What is computed outside of a layer, by a tied weight for example, is
    counted in full.

    Args:
        module: The module, whose weights are looked at.
        forward: Runs it, by whatever way.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False))
        >>> _ = net[0].weight.data[1:].zero_()
        >>> operations(net, lambda: net(torch.ones(2, 3)))
        (48.0, 12.0)
    """
    begun: dict[nn.Module, int] = {}
    saved, handles = [0.0], []

    def before(layer: nn.Module, _: Any) -> None:
        begun[layer] = counted.get_total_flops()

    def after(layer: Any, *_: Any) -> None:
        zeros = 1 - int(layer.weight.count_nonzero()) / layer.weight.numel()
        saved[0] += zeros * (counted.get_total_flops() - begun[layer])

    for layer in module.modules():
        if isinstance(getattr(layer, "weight", None), Tensor) and not [*layer.children()]:
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with counter() as counted:
        forward()
    for handle in handles:
        handle.remove()
    total = float(counted.get_total_flops())
    return total, total - saved[0]
