"""Folding: batch-norms become part of the integer layers before them.

Folding is exact: a channel's integers stay or are negated, and its scale changes.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fitsmall.compressors.export.integer import float_copy
from fitsmall.compressors.export.tracing import PREFIX, Arguments, trace
from fitsmall.compressors.weights import TRANSPOSED

__all__ = ["fold_norms_"]


def fold_norms_(module: nn.Module, arguments: Arguments) -> None:
    """Fold each batch-norm into the integer layer before it, if only the norm reads its output.

    Args:
        module: Module with integer layers, which is changed in place.
        arguments: Arguments of its forward, to trace it with.

    Raises:
        ValueError: The forward cannot be traced.
    """
    for layer, norm in _followed_by_norms(module, arguments):
        before, after = module.get_submodule(layer), module.get_submodule(norm)
        _fold(before, after)
        parent, _, child = norm.rpartition(".")
        setattr(module.get_submodule(parent), child, _rest(after))


def _fold(layer: Any, norm: Any) -> None:
    """Make ``norm(layer(x))`` one layer: ``q s -> (q sign f) (s |f|)``, ``f = gamma / sigma``."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    shift = 0.0 if norm.bias is None else norm.bias
    along = [1] * layer.integers.dim()
    along[layer.output_axis] = -1
    layer.integers = layer.integers * factor.sign().to(torch.int8).view(along)
    layer.scales = torch.where(factor == 0, 1.0, layer.scales * factor.abs())
    layer.bias = nn.Parameter(bias * factor + shift)


def _rest(norm: nn.Module) -> nn.Module:
    """Return the layers that a norm of a class of its own calls, such as timm's with activation."""
    return nn.Sequential(*norm.children()) if [*norm.children()] else nn.Identity()


def _is_norm_and_rest(norm: Any, shape: torch.Size) -> bool:
    """Return whether a module is a batch-norm in evaluation, and then the layers that it calls."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    return torch.equal(_rest(norm)(y), norm(x))


def _followed_by_norms(module: nn.Module, arguments: Arguments) -> list[tuple[str, str]]:
    """Return pairs of names, of an integer layer and the batch-norm that alone reads its output."""
    layers = dict(module.named_modules())
    graph = trace(float_copy(module), arguments)
    of = {
        name: own.removeprefix(PREFIX)
        for names in (
            graph.graph_signature.inputs_to_parameters,
            graph.graph_signature.inputs_to_buffers,
        )
        for name, own in names.items()
    }
    norms = [n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    calls = Counter(of.get(getattr(norm.args[3], "name", ""), "") for norm in norms)
    readers = Counter(source.name for node in graph.graph.nodes for source in node.all_input_nodes)
    pairs = []
    for norm in norms:
        read, mean = norm.args[0], of.get(getattr(norm.args[3], "name", ""), "")
        source = _unflattened(read)
        weight = source.args[1] if source.op == "call_function" and len(source.args) > 1 else None
        name = of.get(getattr(weight, "name", ""), "").removesuffix(".weight")
        before, after = layers.get(name), mean.removesuffix(".running_mean")
        # Batch-norm acts on the second dimension, and the outputs of a Linear are the last.
        second = not isinstance(before, nn.Linear) or read.meta["val"].dim() == 2
        grouped = isinstance(before, TRANSPOSED) and before.groups > 1
        own = [node.name for node in source.args[1:3] if hasattr(node, "name")]  # weight, bias
        once = all(readers[name] == 1 for name in own) and calls[mean] == 1
        once = once and len(_readers(source)) == len(read.users) == 1
        fits = hasattr(before, "integers") and mean and once and second and not grouped
        if fits and _is_norm_and_rest(layers[after], read.meta["val"].shape):
            pairs.append((name, after))
    return pairs


def _unflattened(node: Any) -> Any:
    """Return the node whose leading dimensions alone a node flattens, or the node itself."""
    if node.target not in _RESHAPES or node.meta["val"].dim() != 2:
        return node
    source = node.args[0]
    return source if source.meta["val"].shape[-1] == node.meta["val"].shape[-1] else node


def _readers(node: Any) -> list[Any]:
    """Return the nodes that read the values of a node, and not its shape alone."""
    shape = torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default
    return [u for u in node.users if u.target not in shape or u.args[0] is node]


_RESHAPES = (
    torch.ops.aten.flatten.using_ints,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
)
