"""Costs: the number of positions at which a network multiplies by each of its weights."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fitsmall.compressors.units.rules import only_moves

__all__ = ["positions_of"]

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def positions_of(graph: Any, names: Mapping[Any, str]) -> dict[str, float]:
    """Return the positions by name of weight: its multiply-adds are positions times entries.

    Args:
        graph: Graph of :func:`torch.export.export`.
        names: Names of parameters by their placeholders.
    """
    found: dict[str, float] = {}

    def add(weight: Any, positions: float) -> None:
        if name := _source(weight, names):
            found[name] = found.get(name, 0.0) + positions

    for node in graph.nodes:
        if node.op != "call_function" or not all(map(_is_sized, [node, *node.all_input_nodes])):
            continue
        kind = str(node.target).split(".")[1] if "." in str(node.target) else ""
        if kind == "linear":
            add(node.args[1], _numel(node) / _shape(node)[-1])
        elif kind in _CONVOLUTIONS:
            channels = len(_shape(node)) - _shape_dims(node.args[1]) + 1
            add(node.args[1], _numel(node) / _shape(node)[channels])
        elif kind in _TRANSPOSED:
            channels = len(_shape(node)) - _shape_dims(node.args[1]) + 1
            add(node.args[1], _numel(node.args[0]) / _shape(node.args[0])[channels])
        elif kind in _PRODUCTS:
            a, b = node.args[-2:]
            # Of a product (m x k) (k x n), the first is used n times, and the second m times.
            add(a, _numel(node) * _shape(a)[-1] / _numel(a))
            add(b, _numel(node) * _shape(a)[-1] / _numel(b))
        elif kind in _RECURRENT:
            for weight in node.all_input_nodes:
                if weight in names and _shape_dims(weight) == 2:
                    add(weight, _numel(node.args[0]) / _shape(node.args[0])[-1])
    return found


def _source(node: Any, names: Mapping[Any, str]) -> str | None:
    """Return the name of the parameter that a tensor is, moved or normed; None if it is none."""
    while node.op == "call_function":
        kind = str(node.target)
        if not only_moves(node.target) and "_weight_norm" not in kind:
            return None
        sized = filter(_is_sized, node.all_input_nodes)
        inputs = [each for each in sized if _numel(each) == _numel(node)]
        if not inputs:
            return None
        node = inputs[0]
    return names.get(node)


def _is_sized(node: Any) -> bool:
    """Return whether a node has a shape that does not depend on values of tensors."""
    return all(type(size) is int for size in _shape(node))


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _shape_dims(node: Any) -> int:
    return len(_shape(node))


def _numel(node: Any) -> int:
    return math.prod(_shape(node))
