"""Removal: units leave a network, which computes what it would with zeros in their place."""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from re import sub
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.torch_internals import map_tensors
from fitsmall.compressors.units.attributes import Source, attempts, values
from fitsmall.compressors.units.cut import Cut, tensor_of
from fitsmall.compressors.units.declared import Groups, declared, with_declared
from fitsmall.compressors.units.tracer import Unit, Units, seeded_outputs, units_of
from fitsmall.compressors.weights import matrices_of, owner, twin_of

__all__ = ["awake", "find_cut", "largest_difference", "masked", "removable", "remove"]

# Differences of outputs that rounding makes, as fractions of the largest: in most networks, and at
# most, where of several attempts the nearest is taken.
_ROUNDING, _TOLERANCE = 1e-6, 1e-4


def removable(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
) -> Units:
    """Return the units of a network that can really be removed, all groups at once.

    Half of the units of every group are removed from a copy, then different shares of them. If that
    fails, because modules keep sizes that do not follow their tensors, groups are halved until the
    culprits are found.

    Args:
        module: The network, which stays as it is.
        args: Example inputs by position; few examples are faster.
        kwargs: Example inputs by name.
        groups: Groups that are known, as dimensions by the names of tensors. Those of a network
            that cannot be traced are the only ones; else what they touch is in no other group.

    Raises:
        ValueError: The network cannot be traced, and no groups are given; or they name tensors or
            dimensions that do not exist, or have different widths.
        TypeError: The network cannot be copied.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).view(-1, 6) * 2
        >>> net = nn.Sequential(nn.Linear(4, 8), Scaled(8, 6), nn.Linear(6, 2))
        >>> units = removable(net, [torch.ones(1, 4)])
        >>> units.names, [*units.refused]
        (['0'], ['1'])
    """
    known = declared(module, groups or {})
    try:
        units = units_of(module, args, kwargs)
    except ValueError:
        if not known:
            raise
        units = Units([], {}, [], {}, {})
    units = with_declared(units, known)
    left = dict(zip(units.names, units.groups, strict=True))
    refused = {name: _stays(module, group) for name, group in left.items()}
    refused = {name: reason for name, reason in refused.items() if reason}
    left = {name: group for name, group in left.items() if name not in refused}
    for shares in ((2,), (2, 3, 4)):
        search = _Search(module, args, kwargs or {})
        some = {
            name: group[1 :: shares[k % len(shares)]]
            for k, (name, group) in enumerate(left.items())
        }
        refused |= _refused(search, some)
        left = {name: group for name, group in left.items() if name not in refused}
    return Units([*left.values()], units.unknown, [*left], refused, units.positions)


def _stays(module: nn.Module, group: Sequence[Unit]) -> str:
    """Return why a group cannot lose any units, whatever its modules are told, or nothing."""
    if len(group) == 1:
        return "it is a single unit, and a layer would vanish"
    layers = [owner(module, name)[1] for name, _ in group[0].slices if "proj_weight" in name]
    if any(isinstance(layer, nn.MultiheadAttention) for layer in layers):
        return (
            "torch's MultiheadAttention needs an embed_dim of num_heads * head_dim, so that heads "
            "stay as long as embed_dim does"
        )
    return ""


def _refused(search: "_Search", groups: Mapping[str, Sequence[Unit]]) -> dict[str, str]:
    """Remove groups of units as far as it goes, and return why others cannot be."""
    if not groups:
        return {}
    units = [unit for group in groups.values() for unit in group]
    kind = sub(r"\d+", "*", str([*units[0].slices]))  # the same in all blocks
    problem = search.remove(units, thorough=len(groups) == 1 and kind not in search.hopeless)
    if problem is None:
        return {}
    if len(groups) == 1:
        search.hopeless.add(kind)
        return dict.fromkeys(groups, problem.reason)
    names = [*groups]
    suspects = {name for name in names if _touches(groups[name][0], problem.path)}
    if len(suspects) in (0, len(names)):
        suspects = {*names[len(names) // 2 :]}
    others = {name: group for name, group in groups.items() if name not in suspects}
    return _refused(search, others) | _refused(search, {name: groups[name] for name in suspects})


def _touches(unit: Unit, path: str) -> bool:
    """Return whether a module holds a slice of a unit itself or below it."""
    return any(name.startswith(f"{path}.") for name, _ in unit.slices)


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
        units: Units of :func:`removable`, or :func:`~fitsmall.compressors.units.units_of`.
        args: Example inputs by position.
        kwargs: Example inputs by name.

    Raises:
        ValueError: The network without the units cannot run, or has other outputs.
        TypeError: The network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> [group] = removable(net, [torch.ones(1, 3)]).groups
        >>> find_cut(net, group[:2], [torch.ones(1, 3)]).kept["1.weight", 1]
        tensor([2, 3])
    """
    units = list(units)
    _kept(module, units)
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(", ".join(dict.fromkeys(name for name, _ in unit.slices)), []).append(
            unit
        )
    search = _Search(module, args, kwargs or {})
    for places, problem in _refused(search, groups).items():
        raise ValueError(
            f"{type(module).__name__} keeps sizes that do not follow its tensors: without units of "
            f"{places}, {problem}. Leave these units, or read the sizes from the tensors' shapes"
        )
    return search.cut


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
        units: Units of :func:`removable`, or :func:`~fitsmall.compressors.units.units_of`. After
            their removal those that are left have other indices: find them again.
        args: Example inputs by position.
        kwargs: Example inputs by name.
        optimizers: Optimizers of its parameters.

    Returns:
        The cut, which makes another copy of the network the same.

    Raises:
        ValueError: The network without the units cannot run, or has other outputs. It is as it was.
        TypeError: The network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> images = torch.ones(1, 3, 5, 5)
        >>> [group] = removable(net, [images]).groups
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


class _Problem(NamedTuple):
    """The reason for which units cannot be removed.

    Args:
        reason: What happens without them.
        path: Path of the module in which it happens, if there is one.
    """

    reason: str
    path: str


class _Search:
    """A search for a cut, which grows as more units are removed.

    Args:
        module: The network.
        args: Example inputs by position.
        kwargs: Example inputs by name.
    """

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        # Rows of zeros and factors of nearly zero, as layers begin with, would hide mistakes.
        self._module = awake(module)
        # Rounding errors of single precision may grow as large as mistakes.
        self._module.double()
        self._args, self._kwargs = map_tensors(_double, (tuple(args), dict(kwargs)))
        if not self._runs():
            self._module, self._args, self._kwargs = awake(module), args, kwargs
        if not self._runs():
            self._module = twin_of(module)
        self._module.train()  # some drop here what they cache in evaluation mode
        # Kinds of groups of which one has been refused after all attempts.
        self.hopeless: set[str] = set()
        self._units: list[Unit] = []
        self._sources: dict[tuple[str, str], Source] = {}
        self.cut = Cut({}, ())

    def _runs(self) -> bool:
        """Return whether the network runs, with finite outputs."""
        try:
            return all(output.isfinite().all() for output in self._outputs(twin_of(self._module)))
        except Exception:  # noqa: BLE001  whatever a forward raises
            return False

    def remove(self, units: Sequence[Unit], thorough: bool) -> _Problem | None:
        """Remove more units, or return why it fails.

        Args:
            units: The units.
            thorough: Try more sets of attributes.
        """
        together = [*self._units, *units]
        kept = _kept(self._module, together)
        expected = self._outputs(masked(self._module, kept))
        problem, least = None, _TOLERANCE
        for found in attempts(self._module, units, thorough):
            sources = {**found, **self._sources}
            cut, small = Cut(kept, values(self._module, sources, kept)), twin_of(self._module)
            cut.apply(small)
            try:
                outputs = self._outputs(small)
            except Exception as error:  # noqa: BLE001  whatever a forward raises
                line = str(error).strip().split("\n")[0]
                problem = problem or _Problem(f"it fails: {line}", _failing(small, error))
                continue
            difference = largest_difference(expected, outputs)
            if difference <= least:
                least, best = difference, (sources, cut)
            if least <= _ROUNDING:
                break
            problem = problem or _Problem("it has other outputs", "")
        if least == _TOLERANCE:
            return problem
        self._units, (self._sources, self.cut) = together, best
        return None

    def _outputs(self, module: nn.Module) -> list[Tensor]:
        return seeded_outputs(module, self._args, self._kwargs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _failing(module: nn.Module, error: Exception) -> str:
    """Return the path of the innermost module that an error comes from."""
    paths = {id(layer): path for path, layer in module.named_modules()}
    owners = [id(frame.f_locals.get("self")) for frame, _ in walk_tb(error.__traceback__)]
    return next((paths[owner] for owner in reversed(owners) if owner in paths), "")


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


def awake(module: nn.Module) -> nn.Module:
    """Return a copy in which each parameter changes the outputs.

    Constant tensors, such as new biases and norms, become random, and small weights so large that
    their outputs are like their inputs: from scores of nearly zero all heads attend alike.
    """
    twin, generator = twin_of(module), torch.Generator().manual_seed(0)
    for tensor in (*twin.parameters(), *twin.buffers()):
        flat = tensor.data.flatten()
        if tensor.is_floating_point() and len(flat) > 1 and bool((flat == flat[0]).all()):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator).add(0.5))
        elif isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dim() > 1:
            rows = tensor.data.flatten(1).norm(dim=1).mean()
            tensor.data.div_(rows.clamp(torch.finfo(rows.dtype).tiny, 1))
    return twin


def masked(module: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> nn.Module:
    """Return a copy with zeros in place of what does not stay."""
    masked = twin_of(module)
    parameters = dict(masked.named_parameters())
    for (name, dim), index in kept.items():
        # A row of zeros has no norm to divide by; the factor of a norm is zero, too.
        if name in parameters and matrices_of(masked, name).normed == dim:
            continue
        data = tensor_of(masked, name).data
        gone = torch.ones(data.shape[dim], dtype=torch.bool, device=data.device)
        gone[index.to(data.device)] = False
        data.index_fill_(dim, gone.nonzero().flatten(), 0)
    return masked


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference of outputs, as a fraction of the largest of each."""
    if [a.shape for a in expected] != [b.shape for b in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    differences = [
        float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny))
        for a, b in pairs
    ]
    return max((float("inf") if isnan(each) else each for each in differences), default=0.0)
