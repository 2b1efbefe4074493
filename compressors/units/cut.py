"""Cuts: slices of a network's tensors that stay, and the sizes that its modules keep."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from fitsmall.compressors.weights import is_conv1d, matrices_of

__all__ = ["Attribute", "Cut", "Size", "sizes_of", "tensor_of"]

# A size, or those of the parts of a dimension.
Size = int | Sequence[int]

# Path of a module, name of its attribute, and its value after the cut.
Attribute = tuple[str, str, Size]


@dataclass(frozen=True)
class Cut:
    """All that the removal of units does to a network, in a form that can be stored.

    Args:
        kept: Indices that stay, by the name of a parameter or buffer and the dimension. Dimensions
            that are not named stay whole.
        attributes: Attributes of modules that hold a size, as (path, name, value). Those of torch's
            own layers follow their tensors, and are not listed.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> index = torch.tensor([0, 3])
        >>> cut = Cut({("0.weight", 0): index, ("0.bias", 0): index, ("1.weight", 1): index}, ())
        >>> cut.apply(net)
        >>> net
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Linear(in_features=2, out_features=2, bias=True)
        )
    """

    kept: Mapping[tuple[str, int], Tensor]
    attributes: Sequence[Attribute]

    def apply(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
        """Slice a network in place.

        Tensors lose their other slices, and with them gradients and the state of optimizers;
        parameters stay the same objects.

        Args:
            module: The network, as it was when the cut was found.
            optimizers: Optimizers of its parameters.

        Raises:
            ValueError: The network has other sizes. It is as it was.
        """
        for (name, dim), index in self.kept.items():
            shape = tuple(tensor_of(module, name).shape)
            if dim >= len(shape) or index.max() >= shape[dim]:
                raise ValueError(
                    f"{name} has shape {shape}, and no slice {int(index.max())} along dimension "
                    f"{dim}: the cut is of another network, or has been applied"
                )
        _slice(module, self.kept, optimizers)
        for path, name, value in self.attributes:
            setattr(module.get_submodule(path), name, value)


def _slice(
    module: nn.Module, kept: Mapping[tuple[str, int], Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Slice tensors, their gradients, and the state of optimizers."""
    optimizers = list(optimizers)
    sliced = {id(tensor_of(module, name)) for name, _ in kept}
    for (name, dim), index in kept.items():
        tensor = tensor_of(module, name)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(tensor, {}).items():
                if not isinstance(value, Tensor) or value.dim() != tensor.dim():
                    continue
                if value.shape[dim] == tensor.shape[dim]:  # others are means along it
                    own = index.to(value.device)
                    optimizer.state[tensor][key] = value.index_select(dim, own)
        gradient, tensor.grad = tensor.grad, None
        index = index.to(tensor.device)
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
            for name, size in sizes_of(layer).items():
                setattr(layer, name, size)


def sizes_of(layer: nn.Module) -> dict[str, int]:
    """Return the attributes of a layer of torch that hold its sizes, as its tensors have them.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> layer.weight = nn.Parameter(torch.zeros(2, 3))
        >>> sizes_of(layer)
        {'out_features': 2, 'in_features': 3}
    """
    weight = getattr(layer, "weight_v", None)  # the old weight norm computes the weight later
    if is_parametrized(layer, "weight"):
        # A weight is not computed here: spectral norm learns each time it is in training.
        weight = [*layer.get_submodule("parametrizations.weight").parameters(recurse=False)][-1]
    elif weight is None:
        weight = getattr(layer, "weight", None)
    shape = [*weight.shape] if isinstance(weight, Tensor) else []
    if isinstance(layer, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if is_conv1d(layer):
        return {"nx": shape[0], "nf": shape[1]}
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return _channels(shape[0], shape[1] * layer.groups, layer.groups)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        groups = layer.groups
        if groups == layer.in_channels > 1:  # a group for each channel
            groups = shape[0] * groups // layer.out_channels
        return _channels(shape[1] * groups, shape[0], groups)
    if isinstance(layer, nn.GroupNorm):
        groups = layer.num_groups * shape[0] // layer.num_channels if shape else layer.num_groups
        return {"num_groups": groups, "num_channels": shape[0] if shape else layer.num_channels}
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        end = "_l0" if isinstance(layer, nn.RNNBase) else ""
        weight, inputs = (getattr(layer, f"weight_{kind}{end}") for kind in ("hh", "ih"))
        gates = matrices_of(layer, f"weight_hh{end}").parts
        return {"input_size": inputs.shape[1], "hidden_size": len(weight) // (gates or 1)}
    if isinstance(layer, _NORMS):
        found = [t for t in (*layer.parameters(False), *layer.buffers(False)) if t.dim() == 1]
        return {"num_features": len(found[0]) if found else layer.num_features}
    return {}


def _channels(inputs: int, outputs: int, groups: int) -> dict[str, int]:
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), own)
    return tensor
