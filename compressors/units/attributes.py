"""Attributes: numbers that modules keep of their own sizes, and what they are after a cut."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fitsmall.compressors.units.cut import Attribute, Size, sizes_of, tensor_of
from fitsmall.compressors.units.tracer import Unit

__all__ = ["Source", "attempts", "values"]

# Path of a module, and the name of its attribute.
Key = tuple[str, str]


class Source(NamedTuple):
    """The dimension whose size an attribute follows.

    Args:
        name: Name of a tensor.
        dim: Its dimension.
        size: Its size before the cut.
        exact: The attribute is this size, or the number of units in it; else a multiple of that.
    """

    name: str
    dim: int
    size: int
    exact: bool


def attempts(
    module: nn.Module, units: Iterable[Unit], thorough: bool
) -> Iterator[Mapping[Key, Source]]:
    """Return sets of attributes that may follow the sizes of units, the likely ones first.

    An attribute may hold a size of a tensor, or the number of units in it, such as heads; or a
    multiple of it, where several heads are a unit; or, as a tuple, the sizes of a tensor's parts.

    Args:
        module: The network.
        units: Units that are to be removed.
        thorough: Also try names of attributes one by one, and all but one of them.
    """
    possible = _possible(module, units)
    names = dict.fromkeys(name for _, name in possible) if thorough else {}
    chosen: list[set[Key]] = [
        set(),
        {key for key, source in possible.items() if source.exact},
        {*possible},
        *({key for key in possible if key[1] == name} for name in names),
        *({key for key in possible if key[1] != name} for name in names),
    ]
    for k, keys in enumerate(chosen):
        if keys not in chosen[:k]:
            yield {key: possible[key] for key in possible if key in keys}


def _possible(module: nn.Module, units: Iterable[Unit]) -> dict[Key, Source]:
    possible: dict[Key, Source] = {}
    places = {place: len(index) for unit in units for place, index in unit.slices.items()}
    for (name, dim), slices in places.items():
        size = tensor_of(module, name).shape[dim]
        count, path = size // slices, name
        while path:
            path = path.rpartition(".")[0]
            layer = module.get_submodule(path)
            own = sizes_of(layer)
            for key, value in vars(layer).items():
                if key in own or key.startswith("_"):
                    continue
                exact = value in (size, count) if type(value) is int else _parts(value, size)
                multiple = type(value) is int and value > 0 and not (value % count or size % value)
                if exact or (multiple and (path, key) not in possible):
                    known = possible.get((path, key))
                    if known is None or not known.exact:
                        possible[path, key] = Source(name, dim, size, exact)
    return possible


def _parts(value: object, size: int) -> bool:
    """Return whether a value holds the sizes of the parts of a dimension."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 1
        and all(type(part) is int and part > 0 for part in value)
        and sum(value) == size
    )


def values(
    module: nn.Module, sources: Mapping[Key, Source], kept: Mapping[tuple[str, int], Tensor]
) -> list[Attribute]:
    """Return attributes with their values after a cut.

    Args:
        module: The network before the cut.
        sources: The dimensions that they follow.
        kept: Indices that stay, by the name of a tensor and the dimension.
    """
    found: list[Attribute] = []
    for (path, name), source in sources.items():
        before = getattr(module.get_submodule(path), name)
        index = kept[source.name, source.dim]
        after: Size
        if isinstance(before, int):
            after = before * len(index) // source.size
        else:
            stays = torch.zeros(source.size, dtype=torch.long)
            stays[index] = 1
            after = type(before)(int(part.sum()) for part in stays.split([*before]))
        found.append((path, name, after))
    return found
