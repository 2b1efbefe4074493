"""Declared groups: units of networks that cannot be traced, as their users know them."""

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from fitsmall.compressors.units.tracer import Unit, Units, unique

__all__ = ["declared", "with_declared"]

# Dimensions by the names of tensors, for each group.
Groups = Mapping[str, Mapping[str, int]]


def declared(module: nn.Module, groups: Groups) -> dict[str, list[Unit]]:
    """Return the units of declared groups.

    The smallest width of a group is the number of its units. Where a dimension is wider, a unit has
    several slices in it, which are neighbours.

    Args:
        module: The network.
        groups: Dimensions by the names of parameters and buffers, for each group.

    Raises:
        ValueError: A name, a dimension or a width is wrong.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> group = {"0.weight": 0, "0.bias": 0, "2.weight": 1}
        >>> declared(net, {"hidden": group})["hidden"][1].slices["2.weight", 1]
        tensor([2, 3])
    """
    tensors: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    first: dict[int, str] = {}  # tied tensors have one name
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    found, owners = {}, dict[tuple[str, int], str]()
    for group, dims in groups.items():
        widths: dict[tuple[str, int], int] = {}
        for name, dim in dims.items():
            if name not in tensors:
                near = get_close_matches(name, tensors, n=3, cutoff=0)
                raise ValueError(
                    f"groups[{group!r}]: {type(module).__name__} has no parameter or buffer "
                    f"{name!r}; the nearest names are {', '.join(near)}"
                )
            shape = tuple(tensors[name].shape)
            if not isinstance(dim, int) or not -len(shape) <= dim < len(shape):
                raise ValueError(
                    f"groups[{group!r}]: {name} has shape {shape}, and no dimension {dim!r}"
                )
            place = first[id(tensors[name])], dim % len(shape)
            if place in owners:
                raise ValueError(
                    f"groups[{group!r}]: dimension {place[1]} of {name} is in groups"
                    f"[{owners[place]!r}] already; declare what goes together as one group"
                )
            owners[place] = group
            widths[place] = shape[place[1]]
        if not widths:
            raise ValueError(f"groups[{group!r}] names no tensors: give dimensions by their names")
        count = min(widths.values())
        for (name, dim), width in widths.items():
            if not count or width % count:
                raise ValueError(
                    f"groups[{group!r}]: dimension {dim} of {name} has {width} slices, no multiple "
                    f"of {count}, the smallest of the group: name dimensions of the same units"
                )
        slices = {
            place: torch.arange(width).view(count, -1).unbind() for place, width in widths.items()
        }
        found[group] = [
            Unit({place: indices[k] for place, indices in slices.items()}) for k in range(count)
        ]
    return found


def with_declared(units: Units, groups: Mapping[str, list[Unit]]) -> Units:
    """Return found units without what declared ones touch, and the declared ones."""
    taken: dict[tuple[str, int], set[int]] = {}
    for unit in (unit for group in groups.values() for unit in group):
        for place, index in unit.slices.items():
            taken.setdefault(place, set()).update(index.tolist())
    together = dict(groups)
    for name, group in zip(units.names, units.groups, strict=True):
        left = [
            unit
            for unit in group
            if all(
                taken.get(place, set()).isdisjoint(index.tolist())
                for place, index in unit.slices.items()
            )
        ]
        if left:
            together[unique(name, [*together])] = left
    return Units([*together.values()], units.unknown, [*together], units.refused, units.positions)
