"""Costs: the number of positions at which a network multiplies by each of its weights."""

import math
import operator
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

    def add(weight: Any, multiply_adds: float) -> None:
        if source := _source(weight, names):
            entries = _numel(source)
            found[names[source]] = found.get(names[source], 0.0) + multiply_adds / entries

    for node in graph.nodes:
        if node.op != "call_function" or not all(map(_is_sized, [node, *node.all_input_nodes])):
            continue
        kind = str(node.target).split(".")[1] if "." in str(node.target) else ""
        if kind == "linear":
            add(node.args[1], _numel(node) * _shape(node.args[1])[-1])
        elif kind in _CONVOLUTIONS:  # each output has a kernel's worth of them
            add(node.args[1], _numel(node) * math.prod(_shape(node.args[1])[1:]))
        elif kind in _TRANSPOSED:  # so has each input
            add(node.args[1], _numel(node.args[0]) * math.prod(_shape(node.args[1])[1:]))
        elif kind in _PRODUCTS:
            a, b = node.args[-2:]
            for factor in (a, b):
                add(factor, _numel(node) * _shape(a)[-1])
        elif kind in _RECURRENT:
            positions = _numel(node.args[0]) / _shape(node.args[0])[-1]
            for weight in node.all_input_nodes:
                if weight in names and len(_shape(weight)) == 2:
                    add(weight, positions * _numel(weight))
    return found


def _source(node: Any, names: Mapping[Any, str]) -> Any:
    """Return the parameter of which a tensor has moved entries; None if there is none."""
    while node.op == "call_function":
        moves = node.target is operator.getitem or only_moves(node.target)
        if not moves and "_weight_norm" not in str(node.target):
            return None
        sized = [each for each in node.all_input_nodes if _is_sized(each)]
        if not sized:
            return None
        node = max(sized, key=_numel)
    return node if node in names else None


def _is_sized(node: Any) -> bool:
    """Return whether a node has a shape that does not depend on values of tensors."""
    return all(type(size) is int for size in _shape(node))


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _numel(node: Any) -> int:
    return math.prod(_shape(node))
