"""Folding: batch-norms become part of the integer layers before them.

Folding is exact: a channel's integers stay or are negated, and its scale changes.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.export.integer import float_copy
from fitsmall.compressors.weights import TRANSPOSED

__all__ = ["fold_norms_"]


def fold_norms_(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Fold each batch-norm into the integer layer before it, if only the norm reads its output.

    Args:
        module: Module with integer layers, which is changed in place.
        inputs: A tensor for each argument of the forward, to trace the module with.
    """
    for layer, norm in _followed_by_norms(module, inputs):
        before, after = module.get_submodule(layer), module.get_submodule(norm)
        _fold(before, after)
        parent, _, child = norm.rpartition(".")
        setattr(module.get_submodule(parent), child, nn.Identity())


def _fold(layer: Any, norm: Any) -> None:
    """Make ``norm(layer(x))`` one layer: ``q s -> (q sign f) (s |f|)``, ``f = gamma / sigma``."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = 0.0 if norm.bias is None else norm.bias
    axis = int(isinstance(layer, TRANSPOSED))
    along = [1] * layer.integers.dim()
    along[axis] = -1
    layer.integers = layer.integers * factor.sign().to(torch.int8).view(along)
    layer.scales = torch.where(factor == 0, 1.0, layer.scales * factor.abs())
    layer.bias = nn.Parameter(bias * factor + shift)


def _followed_by_norms(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[str, str]]:
    """Return pairs of names, of an integer layer and the batch-norm that alone reads its output."""
    layers = dict(module.named_modules())
    graph = torch.export.export(float_copy(module), inputs, strict=False)
    of = {**graph.graph_signature.inputs_to_parameters, **graph.graph_signature.inputs_to_buffers}
    norms = [n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    calls = Counter(of.get(getattr(norm.args[3], "name", ""), "") for norm in norms)
    readers = Counter(source.name for node in graph.graph.nodes for source in node.all_input_nodes)
    pairs = []
    for norm in norms:
        source, mean = norm.args[0], of.get(getattr(norm.args[3], "name", ""), "")
        weight = source.args[1] if source.op == "call_function" and len(source.args) > 1 else None
        name = of.get(getattr(weight, "name", ""), "").removesuffix(".weight")
        before = layers.get(name)
        # Batch-norm acts on the second dimension, and the outputs of a Linear are the last.
        second = not isinstance(before, nn.Linear) or source.meta["val"].dim() == 2
        grouped = isinstance(before, TRANSPOSED) and before.groups > 1
        once = readers[getattr(weight, "name", "")] == 1 == len(source.users) and calls[mean] == 1
        if hasattr(before, "integers") and mean and once and second and not grouped:
            pairs.append((name, mean.removesuffix(".running_mean")))
    return pairs
