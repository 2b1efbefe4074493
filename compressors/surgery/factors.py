"""Factorization: a layer of low rank becomes two smaller layers, really smaller and faster."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fitsmall.compressors.lowrank import FORMS, Rank, Spectrum, matrix, tensor
from fitsmall.compressors.select import Selection

__all__ = [
    "Factored",
    "attach_factors",
    "factorable",
    "factorize",
    "forms",
    "is_factor",
    "places",
    "replace_layer",
    "split",
    "unit_costs",
    "weights_saved",
]

# What watches the inputs and outputs of a layer, which are the same for the two.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Factored(nn.Sequential):
    """Two layers in the place of one: ``reduce`` has its inputs, ``expand`` its outputs and bias.

    Args:
        reduce: Layer of ``r`` outputs, without a bias.
        expand: Layer of ``r`` inputs.
    """

    reduce: Any
    expand: Any

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = reduce, expand

    @property
    def left(self) -> Tensor:
        """The ``m x r`` factor."""
        return matrix(self.expand.weight, _side(self.expand))

    @property
    def right(self) -> Tensor:
        """The ``r x n`` factor."""
        return matrix(self.reduce.weight)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same, for code that asks for it."""
        outputs, _, *below = self.expand.weight.shape
        inputs, *across = self.reduce.weight.shape[1:]
        form = FORMS[any(size > 1 for size in below)]
        kernel = [a * b for a, b in zip(across, below, strict=True)]
        return tensor(self.left @ self.right, torch.Size([outputs, inputs, *kernel]), form)

    @property
    def bias(self) -> Tensor | None:
        """The bias of that layer."""
        bias: Tensor | None = self.expand.bias
        return bias

    def like_left(self, factor: Tensor) -> Tensor:
        """An ``m x r`` matrix in the shape of the weight that holds the left factor."""
        return tensor(factor, self.expand.weight.shape, _side(self.expand))

    def like_right(self, factor: Tensor) -> Tensor:
        """An ``r x n`` matrix in the shape of the weight that holds the right factor."""
        return tensor(factor, self.reduce.weight.shape)


def _side(expand: nn.Module) -> str:
    """The form in which the second layer's weight is the left factor."""
    return "separable" if isinstance(expand, nn.Conv2d) else "channels"


def forms(layer: Any) -> tuple[str, ...]:
    """Forms in which a layer can be factored; none if it cannot.

    Example:
        >>> forms(nn.Conv2d(3, 8, 3)), forms(nn.Conv2d(3, 8, 1)), forms(nn.Embedding(9, 4))
        (('channels', 'separable'), ('channels',), ())
    """
    kind = _kind(layer)
    if kind is None or getattr(layer, "groups", 1) > 1:
        return ()
    flat = kind is nn.Conv2d and 1 not in layer.kernel_size
    return FORMS if flat else FORMS[:1]


def places(layer: Any, inputs: Tensor, outputs: Tensor) -> tuple[float, float]:
    """At how many places a layer computes outputs, and the first of a separable pair would.

    Example:
        >>> layer, images = nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.ones(1, 3, 32, 32)
        >>> places(layer, images, layer(images))
        (256.0, 512.0)
    """
    after: float = outputs.numel() / layer.weight.shape[0]
    if isinstance(layer, nn.Conv2d):
        return after, after / outputs.shape[-2] * inputs.shape[-2]
    return after, after


def unit_costs(layer: Any, after: float = 1.0, between: float = 1.0) -> dict[str, float]:
    """What one rank of a layer costs in each form: multiply-adds, given its :func:`places`, or by
    default weights.

    Example:
        >>> unit_costs(nn.Conv2d(16, 32, 3))
        {'channels': 176.0, 'separable': 144.0}
    """
    costs = {}
    for form in forms(layer):
        rows, columns = matrix(layer.weight, form).shape
        costs[form] = rows * after + columns * (after if form == FORMS[0] else between)
    return costs


def _kind(layer: Any) -> Any:
    """The class whose computation a layer has, of those that can be factored."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):  # attention takes its weight alone
        return None
    # Sharded layers are of a class of their own that computes the same.
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, kind) and type(layer).forward is kind.forward:
            return kind
    return None


def is_factor(module: nn.Module, name: str) -> bool:
    """Whether a parameter is one of two factors."""
    return isinstance(module.get_submodule(_path(_path(name))), Factored)


def factorable(module: nn.Module, selection: Selection) -> Selection:
    """Those of the selected weights whose layers can be factored, with a reason for each other.

    Raises:
        ValueError: None can, or a layer stands in the module more than once, or something outside
            of the modules holds it.
    """
    reasons = {}
    for name in selection.chosen:
        layer, weight = _layer(module, name)
        if weight != "weight" or not forms(layer):
            reasons[name] = "no Linear layer or convolution without groups, which can be factored"
        elif min(matrix(layer.weight, FORMS[0]).shape) < 2:
            reasons[name] = "its rank is 1 already"
        elif next(layer.children(), None) is not None:
            reasons[name] = "its inputs are quantized, or its weight is computed from another"
    found = selection.without(reasons)
    for name in found.chosen:
        _check_references(module, name)
    return found


def factorize(module: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Replace layers by two that compute the nearest weights of the given ranks, in place.

    Args:
        module: A module, or one that was trained to have low rank.
        ranks: Form and rank for each weight, by its name; dense ones stay as they are.

    Raises:
        ValueError: See :func:`factorable`.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU())
        >>> factorize(net, {"0.weight": Rank("channels", 3)})
        >>> net[0]
        Factored(
          (reduce): Linear(in_features=20, out_features=3, bias=False)
          (expand): Linear(in_features=3, out_features=10, bias=True)
        )
    """
    parameters = dict(module.named_parameters())
    chosen = Selection({name: parameters[name] for name, r in ranks.items() if r.rank}, {})
    for name in factorable(module, chosen).chosen if chosen.chosen else ():
        replace_layer(module, name, ranks[name])


def replace_layer(module: nn.Module, name: str, rank: Rank) -> Factored:
    """Replace the layer of one weight by two, and return them."""
    layer, _ = _layer(module, name)
    try:
        pair = split(layer, layer.weight, rank)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    _swap(module, name, layer, pair)
    return pair


@torch.no_grad()
def split(layer: nn.Module, weight: Tensor, rank: Rank) -> Factored:
    """Two layers that compute the nearest weight of a rank, and share the bias of a layer."""
    assert rank.rank is not None, "a dense layer stays"
    left, right = Spectrum(matrix(weight, rank.form), rank.rank).factors(rank.rank)
    pair = _pair(layer, rank.form, left.shape[1])
    pair.expand.weight.copy_(pair.like_left(left))
    pair.reduce.weight.copy_(pair.like_right(right))
    return pair


def attach_factors(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give a module of the plain class the pairs of layers that a state dict has, and return the
    names of the weights that they replace. Their values are undefined until they are loaded."""
    replaced = []
    for key, reduce in tensors.items():
        name, found, rest = key.rpartition(".reduce.weight")
        expand = tensors.get(f"{name}.expand.weight")
        if not found or rest or expand is None:
            continue
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            continue
        for form in forms(layer):
            pair = _pair(layer, form, reduce.shape[0])
            wanted = pair.reduce.weight.shape, pair.expand.weight.shape
            if wanted == (reduce.shape, expand.shape):
                _swap(module, f"{name}.weight", layer, pair)
                replaced.append(f"{name}.weight")
                break
    return replaced


def weights_saved(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many weights more than its two factors each layer had that became two, by its name.

    Args:
        shapes: Shapes of the tensors of a state dict.

    Example:
        >>> weights_saved({"fc.reduce.weight": (3, 20), "fc.expand.weight": (10, 3)})
        {'fc': 110}
    """
    saved = {}
    for key, shape in shapes.items():
        name, found, rest = key.rpartition(".reduce.weight")
        if found and not rest and f"{name}.expand.weight" in shapes:
            rank, inputs, *kernel = shape
            outputs, _, *other = shapes[f"{name}.expand.weight"]
            places, others = math.prod(kernel), math.prod(other)
            dense = outputs * inputs * places * others
            saved[name] = dense - rank * (inputs * places + outputs * others)
    return saved


def _pair(layer: Any, form: str, rank: int) -> Factored:
    """Two layers of undefined weights, on the layer's device."""
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        reduce: nn.Module = nn.Linear(layer.in_features, rank, bias=False, **options)
        expand: nn.Module = nn.Linear(rank, layer.out_features, bias=bias, **options)
    else:
        shapes = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        dimensions = len(layer.kernel_size)
        if form == "separable":
            # Along the height nothing, then along the width nothing.
            across, down = _parts(shapes, 1), _parts(shapes, 0)
        else:
            across, down = shapes, {"kernel_size": (1,) * dimensions}
        mode = {"padding_mode": layer.padding_mode}
        kind = _kind(layer)
        reduce = kind(layer.in_channels, rank, bias=False, **across, **mode, **options)
        expand = kind(rank, layer.out_channels, bias=bias, **down, **mode, **options)
    if bias:
        expand.bias = layer.bias
    reduce.weight.requires_grad_(layer.weight.requires_grad)
    expand.weight.requires_grad_(layer.weight.requires_grad)
    return Factored(reduce, expand).train(layer.training)


def _parts(shapes: Mapping[str, Any], axis: int) -> dict[str, Any]:
    """The part of a convolution in two dimensions that moves along one of them."""
    nothing = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    parts: dict[str, Any] = {}
    for key, value in shapes.items():
        if isinstance(value, str):  # "same" or "valid", of a kernel of any size
            parts[key] = value
            continue
        parts[key] = tuple(v if a == axis else nothing[key] for a, v in enumerate(value))
    return parts


def _swap(module: nn.Module, name: str, layer: nn.Module, pair: nn.Module) -> None:
    for hooks in _HOOKS:  # the same objects, so that whoever placed a hook can remove it
        setattr(pair, hooks, getattr(layer, hooks))
    parent, _, child = _path(name).rpartition(".")
    setattr(module.get_submodule(parent), child, pair)


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _layer(module: nn.Module, name: str) -> tuple[Any, str]:
    return module.get_submodule(_path(name)), name.rpartition(".")[2]


def _check_references(module: nn.Module, name: str) -> None:
    """Refuse a layer that something else than its own place in the module would still hold."""
    layer, _ = _layer(module, name)
    path, weight = _path(name), layer.weight
    if not path:
        raise ValueError(
            f"{type(module).__name__} is itself the layer to be factored, and cannot replace "
            "itself: put it into a module"
        )
    remedy = f"it cannot be replaced; leave it out with exclude={path!r}"
    for other, child in module.named_modules(remove_duplicate=False):
        if child is layer and other != path:
            raise ValueError(f"layer {path} is also {other}: {remedy}")
        for key, parameter in child._parameters.items():
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
