"""Floating-point operations of a network: all of them, and those that zero weights do not save."""

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

__all__ = ["count_operations", "operation_counter"]

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# Attention kernels of CPUs, which torch's counter does not know. It passes shapes, not tensors.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def operation_counter() -> Iterator[FlopCounterMode]:
    """Count multiplications and additions of matrix products, convolutions and attention.

    Within the context, torch does not use the fused kernels that run a whole recurrent network or
    transformer layer: the counter could not see into them.

    Example:
        >>> with operation_counter() as counter:
        ...     _ = nn.Linear(3, 4)(torch.ones(2, 3))
        >>> counter.get_total_flops()
        48
    """
    mha, mkldnn, cudnn = torch.backends.mha, torch.backends.mkldnn, torch.backends.cudnn
    # Switching oneDNN off warns about processors with TF32, on all others too.
    warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with (
            mkldnn.flags(enabled=False),
            cudnn.flags(enabled=False),
            FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter,
        ):
            yield counter
    finally:
        mha.set_fastpath_enabled(fast)


def count_operations(module: nn.Module, forward: Callable[[], Any]) -> tuple[float, float]:
    """Operations of a forward pass: all, and those left after skipping weights that are zero.

    Their ratio is the theoretical speed-up of ShrinkBench (Blalock et al., 2020). No engine skips
    single zeros for free. An operation outside of a layer, for example with a tied weight, counts
    in full.

    Args:
        module: Module whose weights are searched for zeros.
        forward: Function that runs the module.

    Returns:
        Number of all operations, and of the needed ones.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4, bias=False))
        >>> _ = net[0].weight.data[1:].zero_()
        >>> count_operations(net, lambda: net(torch.ones(2, 3)))
        (48.0, 12.0)
    """
    counts: dict[nn.Module, int] = {}
    saved, handles = [0.0], []

    def before(layer: nn.Module, _: Any) -> None:
        counts[layer] = counter.get_total_flops()

    def after(layer: Any, *_: Any) -> None:
        zeros = 1 - int(layer.weight.count_nonzero()) / layer.weight.numel()
        saved[0] += zeros * (counter.get_total_flops() - counts[layer])

    for layer in module.modules():
        if isinstance(getattr(layer, "weight", None), Tensor) and not [*layer.children()]:
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    with operation_counter() as counter:
        forward()
    for handle in handles:
        handle.remove()
    total = float(counter.get_total_flops())
    return total, total - saved[0]
