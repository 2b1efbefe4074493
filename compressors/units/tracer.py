"""Tracer: labels go through the graph of a network, and units come out.

A channel of a convolution stands in its weight and bias, in the norm after it, in the weights of
all layers that read it, and, through additions, in other convolutions. All of these slices are one
*unit*. To find units, the network is traced once; each entry of each dimension of a parameter has a
label, and each operation says which labels are the same
(:mod:`~fitsmall.compressors.units.rules`).
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, nn

from fitsmall.compressors.torch_internals import evaluating, map_tensors, tensors_in
from fitsmall.compressors.units.costs import positions_of
from fitsmall.compressors.units.labels import FIXED, Fields, Labels
from fitsmall.compressors.units.operation import Operation
from fitsmall.compressors.units.rules import only_moves, rule_of
from fitsmall.compressors.units.zeros import vanishes
from fitsmall.compressors.weights import matrices_of, owner, twin_of

__all__ = ["Unit", "Units", "seeded_outputs", "unique", "units_of"]


@dataclass(frozen=True)
class Unit:
    """Slices that can only be removed together.

    Args:
        slices: Indices in each dimension of a parameter or buffer, by its name and the dimension.
    """

    slices: Mapping[tuple[str, int], Tensor]


@dataclass(frozen=True)
class Units:
    """The units of a network.

    Args:
        groups: Units that stand in the same dimensions of the same tensors. A group is the width of
            a layer, or of several that go together.
        unknown: Operations without a rule, or whose shapes depend on values, and the number of
            their uses. What they read stays.
        names: A name for each group: the path of the first layer that has it as its outputs.
        refused: Names of groups that cannot be removed, and why; only
            :func:`~fitsmall.compressors.units.removable` tries.
        positions: Number of positions at which the network multiplies by a weight, by its name.
    """

    groups: Sequence[Sequence[Unit]]
    unknown: Mapping[str, int]
    names: Sequence[str]
    refused: Mapping[str, str]
    positions: Mapping[str, float]


def units_of(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Units:
    """Return the units of a network, all of which are in the paths from its inputs to its outputs.

    Args:
        module: The network, which stays as it is.
        args: Example inputs by position; few examples are faster.
        kwargs: Example inputs by name.

    Raises:
        ValueError: The network cannot be traced.
        TypeError: The network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> units = units_of(net, [torch.zeros(2, 3, 5, 5)])
        >>> units.names, len(units.groups[0]), [name for name, dim in units.groups[0][0].slices][:2]
        (['0'], 8, ['0.weight', '0.bias'])
    """
    traced = _Outputs(twin_of(module)).eval()
    try:
        with _seeded(traced), torch.no_grad(), catch_warnings():
            # Recurrent layers gather their weights in each forward pass; this is a copy.
            filterwarnings("ignore", "The tensor attribute.* assigned during export", UserWarning)
            exported = torch.export.export(traced, tuple(args), dict(kwargs or {}), strict=False)
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"the forward of {type(module).__name__} cannot be traced: {line}. Its control flow "
            "and its shapes must not depend on values of tensors; else declare which dimensions of "
            'tensors go together, such as groups={"hidden": {"fc1.weight": 0, "fc1.bias": 0, '
            '"fc2.weight": 1}}'
        ) from error
    return _Tracer(exported, traced).units()


class _Outputs(nn.Module):
    """A network that returns its tensors alone: caches and other objects cannot be traced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        outputs = self.module(*args, **kwargs)
        return tensors_in(dict(outputs) if hasattr(outputs, "keys") else outputs)


def seeded_outputs(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Return the outputs of a network in evaluation mode; random numbers are the same each time."""
    with evaluating(module), _seeded(module), torch.no_grad():
        # A forward may change its inputs in place.
        args, kwargs = map_tensors(Tensor.clone, (tuple(args), dict(kwargs)))
        outputs: list[Tensor] = _Outputs(module)(*args, **kwargs)
    return outputs


@contextmanager
def _seeded(module: nn.Module) -> Iterator[None]:
    """A context in which random numbers are the same each time, and after which they go on."""
    devices = sorted({each.device.index for each in module.parameters() if each.is_cuda})
    with torch.random.fork_rng(devices):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[device] for device in devices),
        ):
            generator.manual_seed(0)
        yield


class _Tracer:
    """Labels on their way through a graph.

    Args:
        exported: The graph.
        module: Its module.
    """

    def __init__(self, exported: Any, module: _Outputs) -> None:
        self.labels = Labels()
        self.unknown: dict[str, int] = {}
        # Labels of the tensors of the network by name and dimension; tied ones have one name.
        self.tensors: dict[tuple[str, int], Tensor] = {}
        # Labels that an operation does more with than move them.
        self.read: Fields = []
        # Nodes whose entries are zero where their unit is.
        self.zeros: set[Any] = set()
        held: dict[str, Tensor] = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        names: dict[int, str] = {}
        for name, tensor in held.items():
            names.setdefault(id(tensor), name.removeprefix("module."))
        self._module, self._parameters = module.module, dict(module.module.named_parameters())
        signature = exported.graph_signature
        targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        fields: dict[Any, Any] = {}
        weights: dict[Any, str] = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                found = held.get(targets.get(node.name, ""))
                if found is not None:
                    weights[node] = names[id(found)]
                fields[node] = []
                if found is not None and found.is_floating_point() and node.users:
                    fields[node] = self._label(names[id(found)], found)
                    self.zeros.add(node)
            elif node.op == "call_function":
                fields[node] = self._call(node, fields)
            elif node.op == "output":
                for each in node.all_input_nodes:
                    self.labels.fix(*fields[each])
        self.positions = positions_of(exported.graph, weights)

    def _label(self, name: str, tensor: Tensor) -> Fields:
        """Return the fields of a parameter or buffer: each dimension has labels of its own."""
        made = []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                if (name, dim) not in self.tensors:
                    self.tensors[name, dim] = self.labels.new(size, 0, 1)
                shape = [1] * tensor.dim()
                shape[dim] = size
                made.append(self.tensors[name, dim].view(shape))
        return made

    def _call(self, node: Any, fields: Mapping[Any, Any]) -> Any:
        """Return the fields of an operation's output, or a list of them for each output."""
        if node.target is operator.getitem:
            found = fields[node.args[0]]
            self.zeros |= {node} if node.args[0] in self.zeros else set()
            return found[node.args[1]] if found else []
        inputs = [fields[each] for each in node.all_input_nodes]
        if not any(inputs):
            return []
        rule = rule_of(node.target) if _is_concrete(node) else None
        if not only_moves(node.target):
            self.read += [labels for each in inputs for labels in each]
        if rule is not None:
            operation = Operation(node, self.labels, fields, self.zeros)
            found = rule(operation)
            if vanishes(operation, found):
                self.zeros.add(node)
            return found
        name = str(node.target)
        self.unknown[name] = self.unknown.get(name, 0) + 1
        for each in inputs:
            self.labels.fix(*each)
        return []

    def units(self) -> Units:
        """Return the sets of labels that are not fixed, as indices of tensors."""
        roots = self.labels.roots()
        # Longer inputs may read what these do not, as later positions of a table.
        read = torch.zeros(len(roots) + 1, dtype=torch.bool)
        for labels in self.read:
            read[roots[labels[labels >= 0]]] = True
        slices: dict[int, dict[tuple[str, int], Tensor]] = {}
        for place, labels in self.tensors.items():
            own, order = roots[labels].sort(stable=True)
            found, counts = own.unique_consecutive(return_counts=True)
            for root, index in zip(found.tolist(), order.split(counts.tolist()), strict=True):
                if root != FIXED and read[root]:
                    slices.setdefault(root, {})[place] = index
        groups: dict[Any, list[Unit]] = {}
        for unit in slices.values():
            kind = tuple((place, len(index)) for place, index in unit.items())
            groups.setdefault(kind, []).append(Unit(unit))
        names: list[str] = []
        for group in groups.values():
            names.append(unique(self._writer(group[0]), names))
        return Units([*groups.values()], self.unknown, names, {}, self.positions)

    def _writer(self, unit: Unit) -> str:
        """Return the path of the first layer that has a unit among its outputs."""
        written = [
            name
            for name, dim in unit.slices
            if name in self._parameters and dim == self._outputs(name)
        ]
        written.sort(key=lambda name: self._parameters[name].dim() < 2)  # first those of layers
        path, _, own = owner(self._module, written[0] if written else next(iter(unit.slices))[0])
        return path if path and own in ("weight", "bias") else f"{path}.{own}".removeprefix(".")

    def _outputs(self, name: str) -> int:
        """Return the dimension of a parameter that counts outputs."""
        embeds = isinstance(owner(self._module, name)[1], nn.Embedding | nn.EmbeddingBag)
        return 1 if embeds else matrices_of(self._module, name).outputs


def _is_concrete(node: Any) -> bool:
    """Return whether the shapes of an operation do not depend on values, as those of a choice."""
    tensors = tensors_in([each.meta.get("val") for each in (node, *node.all_input_nodes)])
    return all(type(size) is int for tensor in tensors for size in tensor.shape)


def unique(name: str, names: Sequence[str]) -> str:
    """Return a name that is not among others, with a number after it where it is."""
    found = (f"{name} ({k})" if k > 1 else name for k in count(1))
    return next(each for each in found if each not in names)
