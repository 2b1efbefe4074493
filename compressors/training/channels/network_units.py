"""The units of all networks in a module: where each stands, what it costs, and how it leaves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.width_choice import Term, WidthCosts
from fitsmall.compressors.naming import abridged, dotted
from fitsmall.compressors.training.channels.network_calls import Call
from fitsmall.compressors.units import Cut, Unit, find_cut, removable

__all__ = ["NetworkUnits", "Place", "UnitGroup"]

Place = tuple[str, int]
"""Name of a tensor, and a dimension."""


@dataclass(frozen=True)
class UnitGroup:
    """Units that stand in the same dimensions of the same tensors.

    Args:
        network: Path of the network that has them.
        units: The units, with names of tensors in the network.
        places: Indices of all units at each place in the module, of shape (units, slices of each).
    """

    network: str
    units: Sequence[Unit]
    places: Mapping[Place, Tensor]

    @classmethod
    def of(cls, network: str, units: Sequence[Unit], names: Mapping[str, str]) -> "UnitGroup":
        """Return the group of units of a network.

        Args:
            network: Path of the network.
            units: The units, with names of tensors in the network.
            names: Names of these tensors in the module.
        """
        places = {
            (names[name], dim): torch.stack([unit.slices[name, dim] for unit in units])
            for name, dim in units[0].slices
        }
        return cls(network, units, places)

    @property
    def slices(self) -> int:
        """Number of slices that a unit has where it has the fewest."""
        return min(index.shape[1] for index in self.places.values())

    def sums(self, place: Place, tensor: Tensor) -> Tensor:
        """Return the sum of the entries of each unit at a place.

        Args:
            place: The place.
            tensor: Tensor of the shape of the one there.

        Example:
            >>> units = [Unit({("w", 0): torch.tensor([0, 2])})]
            >>> group = UnitGroup.of("net", units, {"w": "net.w"})
            >>> group.sums(("net.w", 0), torch.tensor([[1.0, 1.0], [5.0, 5.0], [2.0, 3.0]]))
            tensor([7.])
        """
        others = [dim for dim in range(tensor.dim()) if dim != place[1]]
        along = tensor.sum(others) if others else tensor
        return along[self.places[place].to(along.device)].sum(1)


class NetworkUnits:
    """The groups of units in a module, found by tracing its networks.

    Args:
        module: The module.
        calls: A call of each network, by its path.
        chosen: Names of the weights that may change. A group is taken if all of its weights may.
        declared: Groups that the user knows, as dimensions by the names of tensors.

    Raises:
        ValueError: A network cannot be traced, or a declared group is wrong.

    Attributes:
        groups: The groups by name, that of the first layer which writes them.
        reasons: Reasons why other groups are left out, by name.
        unknown: Operations that no rule is known for; what they read stays.
        positions: Number of positions at which the networks multiply by a weight, by its name.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Mapping[str, Call],
        chosen: Collection[str],
        declared: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.calls = dict(calls)
        self.groups: dict[str, UnitGroup] = {}
        self.reasons: dict[str, str] = {}
        self.unknown: dict[str, int] = {}
        self.positions: dict[str, float] = {}
        self._names = {path: _names_of(call.network, module) for path, call in calls.items()}
        parameters = dict(module.named_parameters())
        saved = module.state_dict(keep_vars=True).keys()
        for path, call in calls.items():
            own = _of_network(path, declared)
            with torch.compiler.set_stance("force_eager"):  # a compiled network cannot be traced
                found = removable(call.network, call.args, call.kwargs, own)
            self.unknown |= found.unknown
            self.reasons |= {dotted(path, name): why for name, why in found.refused.items()}
            for name, count in found.positions.items():
                full = self._names[path][name]
                self.positions[full] = self.positions.get(full, 0.0) + count
            for name, units in zip(found.names, found.groups, strict=True):
                group, full = UnitGroup.of(path, units, self._names[path]), dotted(path, name)
                names = list(dict.fromkeys(name for name, _ in group.places))
                fixed = [n for n in names if n in parameters and n not in chosen]
                if frozen := [n for n in fixed if not parameters[n].requires_grad]:
                    self.reasons[full] = f"{frozen[0]} is frozen: requires_grad is False"
                elif matrices := [n for n in fixed if parameters[n].dim() > 1]:
                    self.reasons[full] = f"{matrices[0]} is left out"
                elif lost := [n for n in names if n not in saved]:
                    self.reasons[full] = (
                        f"{lost[0]} is a buffer that no state dict holds: make it persistent"
                    )
                else:
                    self.groups[full] = group
        self._share(calls)
        paths = [path or "the module" for path in calls]
        unclaimed = declared.keys() - {
            group for path in calls for group in _of_network(path, declared)
        }
        if unclaimed:
            raise ValueError(
                f"groups[{min(unclaimed)!r}] names tensors that are in none of the networks which "
                f"were called in the first step: {', '.join(paths)}"
            )
        self.places: dict[str, list[tuple[str, Place]]] = {}
        for name, group in self.groups.items():
            for place in group.places:
                self.places.setdefault(place[0], []).append((name, place))

    def _share(self, calls: Mapping[str, Call]) -> None:
        """Leave out groups of tensors that a second network has as well."""
        holders: dict[int, set[str]] = {}
        for path, call in calls.items():
            for parameter in call.network.parameters():
                holders.setdefault(id(parameter), set()).add(path)
        for name, group in [*self.groups.items()]:
            held = dict(calls[group.network].network.named_parameters())
            for tensor, _ in group.units[0].slices:
                if tensor in held and len(holders[id(held[tensor])]) > 1:
                    self.reasons[name] = f"{tensor} belongs to two networks"
                    self.groups.pop(name, None)

    def remarks(self) -> list[str]:
        """Return lines on the units that can leave, and on what stays whole."""
        counts = [f"{name} {len(group.units)}" for name, group in self.groups.items()]
        return [f"units: {abridged(counts, most=12)}", *self.kept_whole()]

    def kept_whole(self) -> list[str]:
        """Return lines on what stays whole, one for each reason."""
        names: dict[str, list[str]] = {}
        for name, why in self.reasons.items():
            names.setdefault(why, []).append(name)
        lines = [f"stay whole ({why}): {abridged(same)}" for why, same in names.items()]
        if len(self.calls) > 1:
            lines.append(
                "stay whole (networks are called one after the other; call them in the forward of "
                f"one module): what {abridged([*self.calls])} take and return"
            )
        if self.unknown:
            lines.append(f"stays whole (no rule is known): what {', '.join(self.unknown)} read")
        return lines

    def cost(self, parameters: Mapping[str, nn.Parameter], kind: str) -> WidthCosts:
        """Return the cost of the module as a function of its widths.

        Args:
            parameters: The module's parameters by name.
            kind: ``"size"``, the number of parameters, or ``"flops"``, the multiply-adds of
                products with weights.
        """
        members: dict[str, dict[tuple[int, str], int]] = {}
        for group, own in self.groups.items():
            for (tensor, dim), index in own.places.items():
                members.setdefault(tensor, {})[dim, group] = index.shape[1]
        terms, rest = [], 0.0
        for name, parameter in parameters.items():
            cost = self.positions.get(name, 0.0) if kind == "flops" else 1.0
            if name in members:
                terms.append(Term(cost, tuple(parameter.shape), members[name]))
            else:
                rest += cost * parameter.numel()
        return WidthCosts(terms, rest)

    def cut(self, going: Mapping[str, Tensor]) -> Cut:
        """Return the cut of units from the module, tried on a copy of each network.

        Args:
            going: True for each unit that goes, by group.

        Raises:
            ValueError: A network without these units has other outputs.
        """
        kept: dict[Place, Tensor] = {}
        attributes = []
        for path in self.calls:
            if cut := self.cut_of(path, going):
                names = self._names[path]
                kept |= {(names[name], dim): own for (name, dim), own in cut.kept.items()}
                attributes += [(dotted(path, own), name, n) for own, name, n in cut.attributes]
        return Cut(kept, attributes)

    def own_names(self, path: str, names: Collection[str]) -> list[str]:
        """Return those of some parameters that a network has, by the network's own names."""
        return [own for own, name in self._names[path].items() if name in names]

    def cut_of(self, path: str, going: Mapping[str, Tensor]) -> Cut | None:
        """Return the cut of one network, with names of tensors in it; None if all of it stays."""
        call = self.calls[path]
        units = [
            unit
            for name, group in self.groups.items()
            if group.network == path and name in going
            for unit, goes in zip(group.units, going[name].tolist(), strict=True)
            if goes
        ]
        return find_cut(call.network, units, call.args, call.kwargs) if units else None


def _names_of(network: nn.Module, module: nn.Module) -> dict[str, str]:
    """Return the names that a module has for the tensors of one of its networks, by their own.

    Where the module reaches them by several paths, as in a backbone that is also a part of the
    network, it is the first name, which parameters are selected by.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _names_of(nn.Sequential(layer), nn.ModuleDict({"first": layer}))
        {'0.weight': 'first.weight'}
    """
    names = {id(tensor): name for name, tensor in _tensors_of(module)}
    return {name: names[id(tensor)] for name, tensor in _tensors_of(network)}


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _of_network(path: str, declared: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the declared groups of one network, with names of tensors in it."""
    prefix = f"{path}." if path else ""
    return {
        group: {name.removeprefix(prefix): dim for name, dim in dims.items()}
        for group, dims in declared.items()
        if all(name.startswith(prefix) for name in dims)
    }
