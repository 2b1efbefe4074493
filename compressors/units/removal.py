"""Removal: units leave a network, which computes what it would with zeros in their place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.units.tracer import Unit, outputs_of
from fitsmall.compressors.weights import is_conv1d, twin_of

__all__ = ["remove"]

# Largest difference of outputs that rounding makes, as a fraction of the largest output.
_TOLERANCE = 1e-4

Sizes = dict[int, int]


def remove(
    module: nn.Module,
    units: Iterable[Unit],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Remove units from a network in place.

    Tensors lose their slices, and with them gradients and the state of optimizers; parameters stay
    the same objects. Layers learn their new sizes, and so do modules that keep the number of heads,
    or a width, as an attribute. All of this is tried on a copy first: its outputs have to be those
    of the network with zeros in place of the units.

    Args:
        module: The network.
        units: Units of :func:`~fitsmall.compressors.units.units_of`. After their removal those that
            are left have other indices: find them again.
        args: Example inputs by position.
        kwargs: Example inputs by name.
        optimizers: Optimizers of its parameters.

    Raises:
        ValueError: The network without the units cannot run, or has other outputs. It is as it was.
        TypeError: The network cannot be copied.

    Example:
        >>> from fitsmall.compressors.units import units_of
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
        >>> images = torch.ones(1, 3, 5, 5)
        >>> [group] = units_of(net, [images]).groups
        >>> remove(net, group[:6], [images])
        >>> net
        Sequential(
          (0): Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
          (1): Conv2d(2, 4, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    units = list(units)
    kept = _kept(module, units)
    expected = outputs_of(_masked(module, units, []), args, kwargs or {})
    if not all(output.isfinite().all() for output in expected):
        # Rows of zeros have no norm to divide by. It is enough that nothing reads them.
        expected = outputs_of(_masked(module, units, [0]), args, kwargs or {})
    problem = ""
    for attributes in _attempts(module, kept, units):
        small = twin_of(module)
        _slice(small, kept, [])
        _set(small, attributes)
        try:
            found = outputs_of(small, args, kwargs or {})
        except Exception as error:  # noqa: BLE001  whatever a forward raises
            problem = problem or f"it fails: {error}"
            continue
        if _agree(expected, found):
            _slice(module, kept, optimizers)
            _set(module, attributes)
            return
        problem = problem or "it has other outputs"
    places = ", ".join(dict.fromkeys(name for name, _ in kept))
    raise ValueError(
        f"{type(module).__name__} keeps sizes that do not follow its tensors: without units of "
        f"{places}, {problem}. Leave these units, or read the sizes from the tensors' shapes"
    )


def _kept(module: nn.Module, units: Iterable[Unit]) -> dict[tuple[str, int], Tensor]:
    """Return the indices that stay, in each dimension that loses some."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for unit in units:
        for place, index in unit.slices.items():
            gone.setdefault(place, []).append(index)
    kept = {}
    for (name, dim), indices in gone.items():
        tensor = _tensor(module, name)
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
        kept[name, dim] = stays.nonzero().flatten().to(tensor.device)
    return kept


def _masked(module: nn.Module, units: Iterable[Unit], without: Sequence[int]) -> nn.Module:
    """Return a copy with zeros in place of units, but for slices along some dimensions."""
    masked = twin_of(module)
    for unit in units:
        for (name, dim), index in unit.slices.items():
            if dim not in without:
                tensor = _tensor(masked, name).data
                tensor.index_fill_(dim, index.to(tensor.device), 0)
    return masked


def _slice(
    module: nn.Module, kept: Mapping[tuple[str, int], Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Slice tensors, their gradients, and the state of optimizers."""
    optimizers = list(optimizers)
    sliced = {id(_tensor(module, name)) for name, _ in kept}
    for (name, dim), index in kept.items():
        tensor = _tensor(module, name)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensor, {}).items():
                if not isinstance(value, Tensor) or value.dim() != tensor.dim():
                    continue
                if value.shape[dim] == tensor.shape[dim]:  # others are means along it
                    optimizer.state[tensor][key] = value.index_select(dim, index)
        gradient, tensor.grad = tensor.grad, None
        data = tensor.data.index_select(dim, index)
        # The type changes for a moment, so that autograd forgets the shape: it remembers it while a
        # graph of an earlier step is alive, as that of the loss in a plain loop.
        other = torch.float32 if data.dtype == torch.float16 else torch.float16
        tensor.data = data.new_empty(0, dtype=other)
        tensor.data = data
        if gradient is not None:
            tensor.grad = gradient.index_select(dim, index)
    for layer in module.modules():
        # Also layers with a tensor of another's, or in a parametrization.
        if any(id(tensor) in sliced for tensor in (*layer.parameters(), *layer.buffers())):
            _resize(layer)


def _resize(layer: nn.Module) -> None:
    """Set the attributes of a layer of torch that hold its sizes."""
    sizes: Any = layer
    # The old weight norm computes the weight in the next forward pass.
    weight = getattr(layer, "weight_v", getattr(layer, "weight", None))
    shape = [*weight.shape] if isinstance(weight, Tensor) else []
    if isinstance(layer, nn.Linear):
        sizes.out_features, sizes.in_features = shape
    elif is_conv1d(layer):
        sizes.nx, sizes.nf = shape
    elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        sizes.in_channels, sizes.out_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.groups == layer.in_channels > 1:  # a group for each channel
            sizes.groups = shape[0] * layer.groups // layer.out_channels
        sizes.out_channels, sizes.in_channels = shape[0], shape[1] * layer.groups
    elif isinstance(layer, nn.GroupNorm):
        sizes.num_groups = layer.num_groups * shape[0] // layer.num_channels
        sizes.num_channels = shape[0]
    elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        sizes.embedding_dim = shape[1]
    elif isinstance(layer, nn.RNNBase):
        sizes.hidden_size = sizes.weight_hh_l0.shape[1]
        sizes.input_size = sizes.weight_ih_l0.shape[1]
    elif isinstance(layer, _NORMS):
        found = [t for t in (*layer.parameters(False), *layer.buffers(False)) if t.dim() == 1]
        sizes.num_features = len(found[0])


_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip

# Attributes of torch's layers, which are set from their tensors.
_OWN = {
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features",
    "num_groups", "num_channels", "embedding_dim", "num_embeddings", "hidden_size", "input_size",
    "num_layers", "nf", "nx",
}  # fmt: skip

Attribute = tuple[str, str, int]


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
            before, after = _tensor(module, name).shape[dim], len(kept[name, dim])
            count = before // len(index)
            path = name
            while path:
                path = path.rpartition(".")[0]
                for key, value in vars(module.get_submodule(path)).items():
                    if type(value) is not int or value < count or key in _OWN:
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


def _set(module: nn.Module, attributes: Iterable[Attribute]) -> None:
    for path, name, value in attributes:
        setattr(module.get_submodule(path), name, value)


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Return whether outputs are the same but for rounding."""
    if [a.shape for a in expected] != [b.shape for b in found]:
        return False
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return all(bool(((a - b).abs().max() <= _TOLERANCE * a.abs().max()).item()) for a, b in pairs)


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), own)
    return tensor
