"""Operations: nodes of a graph with their arguments by name, and what their inputs hold."""

import operator
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.units.labels import Fields, Labels, varying

__all__ = [
    "CONSTANTS",
    "Operation",
    "along",
    "extent_of",
    "name_of",
    "placed",
    "shape_of",
    "united",
]


class Operation:
    """An operation in a graph, and the fields of its inputs.

    Args:
        node: The node of the graph.
        labels: All labels.
        fields: Fields of the nodes before it.
        zeros: Nodes before it whose entries are zero where their unit is.
    """

    def __init__(
        self, node: Any, labels: Labels, fields: Mapping[Any, Any], zeros: AbstractSet[Any]
    ) -> None:
        self.node, self.labels, self._fields, self._zeros = node, labels, fields, zeros
        self.name = name_of(node.target)
        given = zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
        defaults = {
            argument.name: argument.default_value for argument in node.target._schema.arguments
        }
        self.arguments: dict[str, Any] = {**defaults, **dict(given), **node.kwargs}

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name, or the value that it has by default."""
        return self.arguments[name]

    def fields(self, value: Any) -> Fields:
        """Return the fields of an argument; numbers and the network's inputs have none."""
        found: Fields = self._fields[value] if isinstance(value, torch.fx.Node) else []
        return found

    def vanishes(self, value: Any) -> bool:
        """Return whether entries of an argument are zero where their unit is."""
        return isinstance(value, torch.fx.Node) and value in self._zeros

    def fix_all(self) -> Fields:
        """Fix all that the operation reads."""
        for each in self.node.all_input_nodes:
            self.labels.fix(*self.fields(each))
        return []


def name_of(target: Any) -> str:
    """Return the name of an operation; those in place count as the others."""
    if target is operator.getitem:
        return "getitem"
    name: str = target._schema.name
    return name.removeprefix("aten::").removesuffix("_")


def shape_of(node: Any) -> list[int]:
    return [*node.meta["val"].shape]


def extent_of(node: Any) -> list[int]:
    """Return the shape of a node's output, with 1 for dimensions along which it only repeats."""
    shape, name = shape_of(node), name_of(node.target) if node.op == "call_function" else ""
    if name in CONSTANTS:
        return [1] * len(shape)
    if name in ("expand", "expand_as"):
        source = extent_of(node.args[0])
        return [1] * (len(shape) - len(source)) + source
    return shape


# Operations that make tensors of one number.
CONSTANTS = {
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full",
}  # fmt: skip


def along(fields: Fields, dim: int) -> Fields:
    """Return fields that vary along one dimension alone, flat."""
    return [labels.flatten() for labels in fields if varying(labels) == {dim}]


def placed(labels: Tensor, dim: int, dims: int) -> Tensor:
    """Return labels as a field along one of so many dimensions."""
    shape = [1] * dims
    shape[dim] = -1
    return labels.view(shape)


def united(op: Operation, labels: Fields, others: Fields) -> Fields:
    """Unite flat labels with those of a bias or norm, and return them."""
    for other in others:
        if labels:
            op.labels.unite(labels[0], other.flatten())
        else:
            op.labels.fix(other)
    return labels
