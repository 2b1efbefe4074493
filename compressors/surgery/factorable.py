"""Layers that can be factored: in which forms, and at which cost of a rank."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fitsmall.compressors.lowrank import FORMS, matrix
from fitsmall.compressors.select import Selection

__all__ = ["factorable", "forms", "kind_of", "layer_of", "places", "unit_costs"]


def kind_of(layer: Any) -> Any:
    """Return the class of a layer among those that can be factored, or None."""
    if isinstance(
        layer, NonDynamicallyQuantizableLinear
    ):  # attention uses its weight without calling it
        return None
    # FSDP gives layers a subclass of their own, with the same forward.
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return kind
    return None


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
    after: float = outputs.numel() / layer.weight.shape[0]
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
        ValueError: Nothing remains, or the module refers to a layer or its weight in a second
            place, so that it cannot be replaced.
    """
    reasons = {}
    for name in selection.chosen:
        layer, weight = layer_of(module, name)
        if weight != "weight" or not forms(layer):
            reasons[name] = "only Linear layers and convolutions without groups can be factored"
        elif min(matrix(layer.weight, FORMS[0]).shape) < 2:
            reasons[name] = "its rank is 1 already"
        elif next(layer.children(), None) is not None:
            reasons[name] = "its inputs are quantized, or its weight is computed from another"
    found = selection.without(reasons)
    for name in found.chosen:
        _check_references(module, name)
    return found


def layer_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """Return the layer of a parameter, and the name of the parameter within the layer."""
    path, _, own = name.rpartition(".")
    return module.get_submodule(path), own


def _check_references(module: nn.Module, name: str) -> None:
    """Refuse a layer that the module refers to in more than one place."""
    layer, _ = layer_of(module, name)
    path, weight = name.rpartition(".")[0], layer.weight
    if not path:
        raise ValueError(
            f"{type(module).__name__} is itself the layer to be factored and cannot be replaced: "
            "put it into a module"
        )
    remedy = f"it cannot be replaced; leave it out with exclude={path!r}"
    for other, child in module.named_modules(remove_duplicate=False):
        if child is layer and other != path:
            raise ValueError(f"layer {path} is also {other}: {remedy}")
        for key, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is weight and child is not layer:
                raise ValueError(f"weight {name} is tied to {other}.{key}: {remedy}")
        for key, value in vars(child).items():
            if not key.startswith("_") and _holds(value, layer):
                where = f"{other}.{key}" if other else key
                raise ValueError(f"layer {path} is also held by attribute {where}: {remedy}")


def _holds(value: Any, layer: nn.Module) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | set):
        return any(item is layer or item is getattr(layer, "weight", None) for item in value)
    return value is layer or value is layer.weight
