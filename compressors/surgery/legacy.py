"""Names of tensors in files of the project's first name, which marked changed layers otherwise."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fitsmall.compressors.surgery.protocol import Layout, TensorSpec
from fitsmall.compressors.surgery.quantizers import QUANTIZER

__all__ = ["with_marks"]

T = TypeVar("T", Tensor, TensorSpec)


def with_marks(
    stored: Mapping[str, T], expected: Layout, mark: Callable[[Tensor], T]
) -> dict[str, T]:
    """Return tensors of an old file under the names that they have today.

    The ``log_scale`` of a quantizer was called ``log_step``, and a factored layer had no mark.
    Layers ``reduce`` and ``expand`` are factors if the module has one layer in their place.

    Args:
        stored: Tensors or their specs by name; those of a file of today are returned as they are.
        expected: Layout of the module that the file is for.
        mark: Function that turns a tensor, the mark of a factored layer, into an entry of
            ``stored``.

    Example:
        >>> old = {"fc.reduce.weight": torch.ones(2, 9), "fc.expand.weight": torch.ones(5, 2)}
        >>> module = {"fc.weight": TensorSpec(torch.Size([5, 9]), torch.float32)}
        >>> list(with_marks(old, module, lambda tensor: tensor))
        ['fc.reduce.weight', 'fc.expand.weight', 'fc.factor_form']
    """
    found = {
        name.replace(f"{QUANTIZER}.log_step", f"{QUANTIZER}.log_scale"): value
        for name, value in stored.items()
    }
    for name in stored:
        layer, is_factor, rest = name.rpartition(".expand.weight")
        pair = is_factor and not rest and f"{layer}.reduce.weight" in stored
        if pair and f"{layer}.weight" in expected and f"{layer}.factor_form" not in stored:
            separable = any(size > 1 for size in stored[name].shape[2:])
            found[f"{layer}.factor_form"] = mark(torch.tensor(separable, dtype=torch.uint8))
    return found
