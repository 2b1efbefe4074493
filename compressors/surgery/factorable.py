"""Layers that can be factored: in which forms, and at which cost of a rank."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from fitsmall.compressors.naming import dotted
from fitsmall.compressors.projections.lowrank import FORMS, matrix
from fitsmall.compressors.select import Selection
from fitsmall.compressors.surgery.quantizers import QUANTIZER
from fitsmall.compressors.weights import conv1d_class, is_conv1d, is_product

__all__ = [
    "factorable",
    "forms",
    "kind_of",
    "layer_of",
    "outputs_first",
    "places",
    "refusals",
    "unit_costs",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def kind_of(layer: Any) -> Any:
    """Return the class of a layer among those that can be factored, or None."""
    if isinstance(
        layer, NonDynamicallyQuantizableLinear
    ):  # attention uses its weight without calling it
        return None
    # FSDP gives layers a subclass of their own, with the same forward.
    for kind in (nn.Linear, *_CONVOLUTIONS, conv1d_class(layer)):
        if kind and isinstance(layer, kind) and type(layer).forward is kind.forward:
            return kind
    return None


def outputs_first(layer: Any, weight: Tensor) -> Tensor:
    """Return a tensor of the shape of a layer's weight with the outputs as first dimension."""
    return weight.T if is_conv1d(layer) else weight


def forms(layer: Any) -> tuple[str, ...]:
    """Return the forms in which a layer can be factored; none if it cannot.

    Example:
        >>> forms(nn.Conv2d(3, 8, 3)), forms(nn.Conv2d(3, 8, 1)), forms(nn.Embedding(9, 4))
        (('channels', 'separable'), ('channels',), ())
    """
    kind = kind_of(layer)
    if kind is None or getattr(layer, "groups", 1) > 1:
        return ()
    flat = kind is nn.Conv2d and 1 not in layer.kernel_size
    return FORMS if flat else FORMS[:1]


def places(layer: Any, inputs: Tensor, outputs: Tensor) -> tuple[float, float]:
    """Return the number of positions at which a layer computes outputs in a forward pass.

    Args:
        layer: Linear layer or convolution.
        inputs: Its input.
        outputs: Its output.

    Returns:
        Positions of the layer, or of the last layer of a factored pair, and positions of the first
        layer of a separable pair; examples of a batch count each.

    Example:
        >>> import torch
        >>> layer, images = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.ones(1, 3, 32, 32)
        >>> places(layer, images, layer(images))
        (256.0, 512.0)
    """
    # Reading a weight with spectral norm would change the norm's own state.
    channels = outputs.shape[-1 - len(getattr(layer, "kernel_size", ()))]
    after: float = outputs.numel() / channels
    if isinstance(layer, nn.Conv2d):
        return after, after / outputs.shape[-2] * inputs.shape[-2]
    return after, after


def unit_costs(layer: Any, after: float = 1.0, between: float = 1.0) -> dict[str, float]:
    """Return the cost of one rank of a layer in each form.

    Args:
        layer: Linear layer or convolution.
        after: Positions at which it computes outputs, see :func:`places`, for a cost in
            multiply-adds; by default 1, for a cost in weights.
        between: The same of the first layer of a separable pair.

    Example:
        >>> unit_costs(nn.Conv2d(16, 32, 3))
        {'channels': 176.0, 'separable': 144.0}
    """
    costs = {}
    for form in forms(layer):
        rows, columns = matrix(layer.weight, form).shape
        costs[form] = rows * after + columns * (after if form == FORMS[0] else between)
    return costs


def factorable(module: nn.Module, selection: Selection) -> Selection:
    """Return the selection without weights whose layers cannot be factored, with reasons.

    Raises:
        ValueError: Nothing remains, or the module is itself the layer.
    """
    return selection.without(refusals(module, list(selection.chosen)))


def refusals(module: nn.Module, names: list[str]) -> dict[str, str]:
    """Return the reason for each weight, by name, whose layer cannot be factored.

    Raises:
        ValueError: The module is itself the layer.
    """
    references = _References(module)
    reasons = {}
    for name in names:
        reason = _unsuitable(module, name) or references.other(name, *layer_of(module, name))
        if reason:
            reasons[name] = reason
        elif "." not in name:
            raise ValueError(
                f"{type(module).__name__} is itself the layer to be factored and cannot be "
                "replaced: put it into a module"
            )
    return reasons


def _unsuitable(module: nn.Module, name: str) -> str | None:
    """Return the reason why the layer of a weight cannot be factored, or None if it can."""
    layer, weight = layer_of(module, name)
    parent, _ = layer_of(module, name.rpartition(".")[0])
    if nn.MultiheadAttention in (type(layer), type(parent)):
        return "nn.MultiheadAttention multiplies by it without calling a layer"
    if isinstance(layer, ParametrizationList) or weight in ("weight_v", "weight_orig"):
        return "its weight is computed from another, as under weight norm"
    if weight != "weight" or not is_product(layer):
        return "no Linear, Conv1D or convolution layer that can be factored"
    if getattr(layer, "groups", 1) > 1:
        return "no convolution with groups can be factored"
    if not forms(layer):
        return f"{type(layer).__name__} computes with it in a forward of its own"
    if min(matrix(layer.weight, FORMS[0]).shape) < 2:
        return "its rank is 1 already"
    quantizer = getattr(layer, QUANTIZER, None)
    if quantizer is not None and quantizer.active:
        return "its inputs are quantized"
    if any(child is not quantizer for child in layer.children()):
        return "its weight is computed from another"
    return None


class _References:
    """All places in which a module refers to layers and weights, found in one pass."""

    def __init__(self, module: nn.Module) -> None:
        # By identity of a layer or weight.
        self.paths: dict[int, list[str]] = {}
        self.owners: dict[int, list[str]] = {}
        self.holders: dict[int, str] = {}
        for path, child in module.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(child), []).append(path)
            for key, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
                self.owners.setdefault(id(parameter), []).append(dotted(path, key))
            for key, value in vars(child).items():
                if not key.startswith("_"):
                    self.holders.update((id(item), dotted(path, key)) for item in _items(value))

    def other(self, name: str, layer: Any, weight: str) -> str | None:
        """Return where else the module refers to the layer of a weight, or None."""
        path, own = name.rpartition(".")[0], getattr(layer, weight)
        for other in self.paths[id(layer)]:
            if other != path:
                return f"layer {path} is also {other}"
        for other in self.owners[id(own)]:
            if other != name and other.rpartition(".")[0] not in self.paths[id(layer)]:
                return f"weight {name} is tied to {other}"
        for held in (layer, own):
            if where := self.holders.get(id(held)):
                return f"layer {path} is also held by attribute {where}"
        return None


def _items(value: Any) -> list[Any]:
    """Return the modules and tensors among an attribute's value and its items."""
    if isinstance(value, dict):
        value = list(value.values())
    items = value if isinstance(value, list | tuple | set) else [value]
    return [item for item in items if isinstance(item, nn.Module | Tensor)]


def layer_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """Return the layer of a parameter, and the name of the parameter within the layer."""
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own
