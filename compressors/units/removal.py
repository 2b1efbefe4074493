"""Removal: units leave a network, which computes what it would with zeros in their place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.units.cut import OWN, Attribute, Cut, tensor_of
from fitsmall.compressors.units.tracer import Unit, outputs_of
from fitsmall.compressors.weights import twin_of

__all__ = ["find_cut", "remove"]

# Largest difference of outputs that rounding makes, as a fraction of the largest output.
_TOLERANCE = 1e-4


def find_cut(
    module: nn.Module,
    units: Iterable[Unit],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Cut:
    """Return the cut that removes units from a network, which stays as it is.

    Layers learn their new sizes, and so do modules that keep the number of heads, or a width, as an
    attribute. All of this is tried on copies: their outputs have to be those of the network with
    zeros in place of the units.

    Args:
        module: The network.
        units: Units of :func:`~fitsmall.compressors.units.units_of`.
        args: Example inputs by position.
        kwargs: Example inputs by name.

    Raises:
        ValueError: The network without the units cannot run, or has other outputs.
        TypeError: The network cannot be copied.

    Example:
        >>> from fitsmall.compressors.units import units_of
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> [group] = units_of(net, [torch.ones(1, 3)]).groups
        >>> find_cut(net, group[:2], [torch.ones(1, 3)]).kept["1.weight", 1]
        tensor([2, 3])
    """
    units = list(units)
    kept = _kept(module, units)
    expected = outputs_of(_masked(module, units, []), args, kwargs or {})
    if not all(output.isfinite().all() for output in expected):
        # Rows of zeros have no norm to divide by. It is enough that nothing reads them.
        expected = outputs_of(_masked(module, units, [0]), args, kwargs or {})
    problem = ""
    for attributes in _attempts(module, kept, units):
        cut, small = Cut(kept, attributes), twin_of(module)
        cut.apply(small)
        try:
            found = outputs_of(small, args, kwargs or {})
        except Exception as error:  # noqa: BLE001  whatever a forward raises
            problem = problem or f"it fails: {error}"
            continue
        if _agree(expected, found):
            return cut
        problem = problem or "it has other outputs"
    places = ", ".join(dict.fromkeys(name for name, _ in kept))
    raise ValueError(
        f"{type(module).__name__} keeps sizes that do not follow its tensors: without units of "
        f"{places}, {problem}. Leave these units, or read the sizes from the tensors' shapes"
    )


def remove(
    module: nn.Module,
    units: Iterable[Unit],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> Cut:
    """Remove units from a network in place: find their cut, and apply it.

    Args:
        module: The network.
        units: Units of :func:`~fitsmall.compressors.units.units_of`. After their removal those that
            are left have other indices: find them again.
        args: Example inputs by position.
        kwargs: Example inputs by name.
        optimizers: Optimizers of its parameters.

    Returns:
        The cut, which makes another copy of the network the same.

    Raises:
        ValueError: The network without the units cannot run, or has other outputs. It is as it was.
        TypeError: The network cannot be copied.

    Example:
        >>> from fitsmall.compressors.units import units_of
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> images = torch.ones(1, 3, 5, 5)
        >>> [group] = units_of(net, [images]).groups
        >>> cut = remove(net, group[:6], [images])
        >>> net
        Sequential(
          (0): Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
          (1): Conv2d(2, 4, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    cut = find_cut(module, units, args, kwargs)
    cut.apply(module, optimizers)
    return cut


def _kept(module: nn.Module, units: Iterable[Unit]) -> dict[tuple[str, int], Tensor]:
    """Return the indices that stay, in each dimension that loses some."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for unit in units:
        for place, index in unit.slices.items():
            gone.setdefault(place, []).append(index)
    kept = {}
    for (name, dim), indices in gone.items():
        tensor = tensor_of(module, name)
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        index = torch.cat(indices)
        if index.max() >= len(stays):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, and no slice {int(index.max())} along "
                f"dimension {dim}: the units are of another network, find them again with units_of"
            )
        stays[index] = False
        if not stays.any():
            raise ValueError(f"nothing of {name} would be left: keep a unit of it")
        kept[name, dim] = stays.nonzero().flatten()
    return kept


def _masked(module: nn.Module, units: Iterable[Unit], without: Sequence[int]) -> nn.Module:
    """Return a copy with zeros in place of units, but for slices along some dimensions."""
    masked = twin_of(module)
    for unit in units:
        for (name, dim), index in unit.slices.items():
            if dim not in without:
                tensor = tensor_of(masked, name).data
                tensor.index_fill_(dim, index.to(tensor.device), 0)
    return masked


def _attempts(
    module: nn.Module, kept: Mapping[tuple[str, int], Tensor], units: Sequence[Unit]
) -> Iterator[list[Attribute]]:
    """Return sets of attributes of modules to change, as (path, name, new value): first none.

    An attribute may hold a size of a tensor, or the number of units in it, such as heads; or a
    multiple of it, where several heads are a unit.
    """
    yield []
    likely: dict[tuple[str, str], int] = {}
    possible: dict[tuple[str, str], int] = {}
    for unit in units:
        for (name, dim), index in unit.slices.items():
            before, after = tensor_of(module, name).shape[dim], len(kept[name, dim])
            count = before // len(index)
            path = name
            while path:
                path = path.rpartition(".")[0]
                for key, value in vars(module.get_submodule(path)).items():
                    if type(value) is not int or value < count or key in OWN:
                        continue
                    if not value % count and not before % value:
                        possible.setdefault((path, key), value * after // before)
                        if value in (count, before):
                            likely.setdefault((path, key), value * after // before)
    every = [(path, key, value) for (path, key), value in possible.items()]
    names = dict.fromkeys(key for _, key, _ in every)
    yield [(path, key, value) for (path, key), value in likely.items()]
    yield every
    yield from ([each for each in every if each[1] == name] for name in names)
    yield from ([each for each in every if each[1] != name] for name in names)


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Return whether outputs are the same but for rounding."""
    if [a.shape for a in expected] != [b.shape for b in found]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return all(bool(((a - b).abs().max() <= _TOLERANCE * a.abs().max()).item()) for a, b in pairs)
