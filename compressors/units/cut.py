"""Cuts: slices of a network's tensors that stay, and the sizes that its modules keep."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.weights import is_conv1d

__all__ = ["OWN", "Attribute", "Cut", "tensor_of"]

# Path of a module, name of its attribute, and its value after the cut.
Attribute = tuple[str, str, int]


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
                    optimizer.state[tensor][key] = value.index_select(dim, index)
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
OWN = {
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features",
    "num_groups", "num_channels", "embedding_dim", "num_embeddings", "hidden_size", "input_size",
    "num_layers", "nf", "nx",
}  # fmt: skip


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    path, _, own = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), own)
    return tensor
