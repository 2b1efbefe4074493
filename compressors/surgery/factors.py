"""Factorization: a layer of low rank is replaced by two smaller layers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.choices.rank_choice import Rank
from fitsmall.compressors.projections.lowrank import FORMS, Spectrum, matrix, tensor
from fitsmall.compressors.surgery.factorable import (
    forms,
    kind_of,
    layer_of,
    outputs_first,
    refusals,
)
from fitsmall.compressors.surgery.moments import Successor, transplant_
from fitsmall.compressors.surgery.narrowing import carry_marks
from fitsmall.compressors.surgery.protocol import Changed, Layout, Surgery, TensorSpec
from fitsmall.compressors.surgery.quantizers import detach_quantizer
from fitsmall.compressors.surgery.saving import warn_of_save_pretrained
from fitsmall.compressors.torch_internals import move_hooks, require
from fitsmall.compressors.weights import is_conv1d

__all__ = ["Factored", "Factorization", "factorize", "is_factor"]


class Factored(nn.Sequential):
    """Two layers in place of one: ``reduce`` takes its inputs, ``expand`` gives its outputs.

    It has the attributes of the layer that it replaces, such as ``in_features`` and ``stride``. The
    buffer ``factor_form``, the number of the form, marks a factored layer in a state dict.

    Args:
        reduce: Layer of ``r`` outputs, without a bias.
        expand: Layer of ``r`` inputs, with the bias.
        form: Form in which the product of the two is a weight.
        inputs_first: Whether the replaced layer's weight has inputs as its first dimension.
    """

    reduce: Any
    expand: Any
    factor_form: Tensor

    def __init__(
        self, reduce: nn.Module, expand: nn.Module, form: str, inputs_first: bool = False
    ) -> None:
        super().__init__()
        self.reduce, self.expand, self.form = reduce, expand, form
        self.inputs_first = inputs_first
        number = torch.tensor(FORMS.index(form), dtype=torch.uint8)
        self.register_buffer("factor_form", number.to(self.expand.weight.device))
        self.register_state_dict_post_hook(warn_of_save_pretrained)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*inputs, *named.values())  # the layer may have been called by keyword
        outputs: Tensor = self.expand(self.reduce(x))
        return outputs

    @property
    def left(self) -> Tensor:
        """The ``m x r`` factor."""
        return matrix(self.expand.weight, _side(self.expand.weight))

    @property
    def right(self) -> Tensor:
        """The ``r x n`` factor."""
        return matrix(self.reduce.weight)

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same, ``U V``."""
        weight = _product(self.reduce.weight, self.expand.weight, self.form)
        return weight.T if self.inputs_first else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of that layer."""
        bias: Tensor | None = self.expand.bias
        return bias

    def like_left(self, factor: Tensor) -> Tensor:
        """Return an ``m x r`` matrix in the shape of the weight of ``expand``."""
        return tensor(factor, self.expand.weight.shape, _side(self.expand.weight))

    def like_right(self, factor: Tensor) -> Tensor:
        """Return an ``r x n`` matrix in the shape of the weight of ``reduce``."""
        return tensor(factor, self.reduce.weight.shape)


@dataclass(frozen=True)
class Factorization(Surgery):
    """The replacement of layers by two of low rank.

    Args:
        ranks: Rank and form of each layer's weight, by the weight's name; dense ones stay.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU())
        >>> Factorization({"0.weight": Rank("channels", 3)}).apply(net)
        {'0.weight': True}
        >>> net[0].reduce, net[0].in_features
        (Linear(in_features=20, out_features=3, bias=False), 20)
    """

    ranks: Mapping[str, Rank]

    kind: ClassVar[str] = "low rank"

    @classmethod
    def found(cls, layout: Layout) -> Self | None:
        ranks = {}
        for mark in layout:
            layer, found, rest = mark.rpartition(f".{_MARK}")
            factors = [layout.get(f"{layer}.{part}.weight") for part in _PARTS]
            shapes = [factor.shape for factor in factors if factor and len(factor.shape) > 1]
            if not found or rest or len(shapes) != 2:  # tensors of those names, of another layer
                continue
            reduce, expand = shapes
            ranks[f"{layer}.weight"] = Rank(FORMS[any(n > 1 for n in expand[2:])], reduce[0])
        return cls(ranks) if ranks else None

    @classmethod
    def own_tensors(cls, names: Iterable[str]) -> list[str]:
        return [name for name in names if name.endswith(f".{_MARK}")]

    def expect(self, module: nn.Module, layout: Layout) -> dict[str, TensorSpec]:
        expected = dict(layout)
        for name, form, rank in self._low:
            path = name.removesuffix(".weight")
            if f"{path}.{_MARK}" in layout:  # the module has the two layers already
                continue
            try:
                layer, _ = layer_of(module, name)
            except AttributeError:
                layer = None
            if form not in forms(layer):
                raise ValueError(
                    f"{type(module).__name__} has no layer {path!r} that can be factored in the "
                    f"form {form!r}"
                )
            # Its shape after the surgeries before this one.
            narrowed = torch.empty(expected[name].shape, device="meta")
            weight = outputs_first(layer, narrowed)
            full = min(matrix(weight, form).shape)
            if not 1 <= rank <= full:
                raise ValueError(f"{path} can have a rank from 1 to {full}, and not {rank}")
            dtype = expected.pop(name).dtype
            for part, shape in zip(_PARTS, _shapes(weight.shape, form, rank), strict=True):
                expected[f"{path}.{part}.weight"] = TensorSpec(shape, dtype)
            expected[f"{path}.{_MARK}"] = TensorSpec(torch.Size(), torch.uint8)
            if f"{path}.bias" in expected:
                expected[f"{path}.expand.bias"] = expected.pop(f"{path}.bias")
        return expected

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        for name, form, _ in self._low:
            mark = f"{name.removesuffix('.weight')}.{_MARK}"
            if int(tensors[mark]) != FORMS.index(form):
                raise ValueError(f"{mark} does not fit the shapes of the two layers")

    def apply(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, bool]:
        complete = {}
        optimizers = list(optimizers)
        for name, form, rank in self._low:
            layer, _ = layer_of(module, name)
            try:
                pair = _split(layer, layer.weight, form, rank)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            detach_quantizer(layer)
            weight = layer.weight
            _swap(module, name, layer, pair)
            successors = _successors(name, pair)
            carried = [transplant_(own, weight, successors) for own in optimizers]
            complete[name] = all(carried)
        return complete

    def replay(self, module: nn.Module) -> None:
        for name, form, rank in self._low:
            layer, _ = layer_of(module, name)
            if not isinstance(layer, Factored):
                _swap(module, name, layer, _empty_pair(layer, form, rank))

    def stored(self, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        low = {name.removesuffix(".weight"): (form, rank) for name, form, rank in self._low}
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            path, _, own = name.rpartition(".")
            if path not in low:
                found[name] = value
            elif own == "weight":
                form, rank = low[path]
                pair = _split(module.get_submodule(path), value, form, rank)
                found[f"{path}.{_MARK}"] = pair.factor_form
                for part in _PARTS:
                    weight = pair.get_submodule(part).weight
                    assert isinstance(weight, Tensor)
                    found[f"{path}.{part}.weight"] = weight.detach()
            else:
                found[f"{path}.expand.{own}"] = value
        return found

    @torch.no_grad()
    def undo(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        low = {name.removesuffix(".weight") for name, _, _ in self._low}
        plain = {}
        for name, value in tensors.items():
            path, _, own = name.rpartition(".")
            layer, _, part = path.rpartition(".")
            if layer not in low or part not in _PARTS:
                if path not in low or own != _MARK:
                    plain[name] = value
            elif own == "bias":
                plain[f"{layer}.bias"] = value
            elif part == "reduce":
                pair: Any = module.get_submodule(layer)
                plain[f"{layer}.weight"] = pair.weight
        return plain

    def table(self, layout: Layout) -> list[Changed]:
        rows = []
        for name, form, rank in self._low:
            path = name.removesuffix(".weight")
            reduce, expand = (layout[f"{path}.{part}.weight"] for part in _PARTS)
            if len(reduce.shape) != len(expand.shape):  # tensors of those names, of another layer
                continue
            width = reduce.dtype.itemsize
            before = _product_shape(reduce.shape, expand.shape).numel()
            now = width * (reduce.shape.numel() + expand.shape.numel()) + 1  # the mark is a byte
            rows.append(Changed(path, f"rank {rank} ({form})", now, width * before))
        return rows

    @property
    def _low(self) -> list[tuple[str, str, int]]:
        """Name, form and rank of each weight that is not dense."""
        return [(name, form, rank) for name, (form, rank) in self.ranks.items() if rank is not None]


_PARTS = ("reduce", "expand")

# Name of the buffer that marks a factored layer in a state dict.
_MARK = "factor_form"


def factorize(module: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Replace layers by two that compute the nearest weights of the given ranks, in place.

    Args:
        module: Module to change.
        ranks: Rank and form of each weight by name; dense ones stay as they are.

    Raises:
        ValueError: A layer cannot be factored, or the module refers to it or its weight in a second
            place, so that it cannot be replaced.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU())
        >>> factorize(net, {"0.weight": Rank("channels", 3)})
        >>> net[0]
        Factored(
          (reduce): Linear(in_features=20, out_features=3, bias=False)
          (expand): Linear(in_features=3, out_features=10, bias=True)
        )
    """
    require("factorize")
    low = {name: rank for name, rank in ranks.items() if rank.rank is not None}
    for name, reason in refusals(module, list(low)).items():
        raise ValueError(f"{name} cannot be factored, leave it out: {reason}")
    Factorization(low).apply(module)


def is_factor(module: nn.Module, name: str) -> bool:
    """Return whether a parameter is one of two factors."""
    layer = name.rpartition(".")[0]
    return isinstance(module.get_submodule(layer.rpartition(".")[0]), Factored)


@torch.no_grad()
def _split(layer: nn.Module, weight: Tensor, form: str, rank: int) -> Factored:
    """Return two layers whose product is the nearest weight of a rank; the bias is the layer's."""
    left, right = Spectrum(matrix(outputs_first(layer, weight), form), rank).factors(rank)
    pair = _empty_pair(layer, form, left.shape[1])
    pair.expand.weight.copy_(pair.like_left(left))
    pair.reduce.weight.copy_(pair.like_right(right))
    return pair


def _empty_pair(layer: Any, form: str, rank: int) -> Factored:
    """Return two layers with undefined weights, on the device of the layer."""
    options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if layer.weight.dim() == 2:
        outputs, inputs = outputs_first(layer, layer.weight).shape
        reduce: Any = nn.Linear(inputs, rank, bias=False, **options)
        expand: Any = nn.Linear(rank, outputs, bias=bias, **options)
    else:
        shapes = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
        }
        dimensions = len(layer.kernel_size)
        if form == "separable":
            # Kernels of 1 x w, then of h x 1.
            first, second = _along(shapes, 1), _along(shapes, 0)
        else:
            first, second = shapes, {"kernel_size": (1,) * dimensions}
        mode = {"padding_mode": layer.padding_mode}
        kind = kind_of(layer)
        reduce = kind(layer.in_channels, rank, bias=False, **first, **mode, **options)
        expand = kind(rank, layer.out_channels, bias=bias, **second, **mode, **options)
    if bias:
        expand.bias = layer.bias
    reduce.weight.requires_grad_(layer.weight.requires_grad)
    expand.weight.requires_grad_(layer.weight.requires_grad)
    pair = Factored(reduce, expand, form, is_conv1d(layer)).train(layer.training)
    for name, value in vars(layer).items():
        if not name.startswith("_"):  # in_features, stride and whatever else others may read
            vars(pair).setdefault(name, value)
    return pair


def _along(shapes: Mapping[str, Any], axis: int) -> dict[str, Any]:
    """Return the settings of a convolution in two dimensions along one of them alone."""
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    parts: dict[str, Any] = {}
    for key, value in shapes.items():
        if isinstance(value, str):  # "same" or "valid", of a kernel of any size
            parts[key] = value
            continue
        parts[key] = tuple(v if a == axis else neutral[key] for a, v in enumerate(value))
    return parts


def _swap(module: nn.Module, name: str, layer: nn.Module, pair: nn.Module) -> None:
    move_hooks(layer, pair)
    carry_marks(layer, pair)
    parent, _, child = name.removesuffix(".weight").rpartition(".")
    setattr(module.get_submodule(parent), child, pair)


def _successors(name: str, pair: Factored) -> tuple[Successor, Successor]:
    r"""Return the factors as successors of their product ``W = U V``.

    With ``G`` the gradient of the weight, those of the factors are ``G V^T`` and ``U^T G``, and so
    are their averages. Of averages of squares ``S`` they are ``S (V^2)^T`` and ``(U^2)^T S``, as if
    the entries of ``G`` were independent.
    """
    path = name.removesuffix(".weight")
    left, right = pair.left.detach(), pair.right.detach()

    def of_product(moment: Tensor) -> Tensor:
        return matrix(moment.T if pair.inputs_first else moment, pair.form)

    def of_right(left: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda moment: pair.like_right(left.T @ of_product(moment))

    def of_left(right: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda moment: pair.like_left(of_product(moment) @ right.T)

    reduce, expand = (f"{path}.{part}.weight" for part in _PARTS)
    return (
        Successor(reduce, pair.reduce.weight, of_right(left), of_right(left.square())),
        Successor(expand, pair.expand.weight, of_left(right), of_left(right.square())),
    )


def _side(expand: Tensor) -> str:
    """Return the form in which the second layer's weight is the left factor."""
    return "separable" if expand.dim() == 4 else "channels"


def _product(reduce: Tensor, expand: Tensor, form: str) -> Tensor:
    """Return the weight of the one layer that computes what two layers with these weights do."""
    left, right = matrix(expand, _side(expand)), matrix(reduce)
    return tensor(left @ right, _product_shape(reduce.shape, expand.shape), form)


def _shapes(shape: Sequence[int], form: str, rank: int) -> tuple[torch.Size, torch.Size]:
    """Return the shapes of the two weights of a rank, for a weight of this shape."""
    outputs, inputs, *kernel = shape
    if form == "separable":
        height, width = kernel
        return torch.Size([rank, inputs, 1, width]), torch.Size([outputs, rank, height, 1])
    return torch.Size([rank, inputs, *kernel]), torch.Size([outputs, rank, *[1] * len(kernel)])


def _product_shape(reduce: Sequence[int], expand: Sequence[int]) -> torch.Size:
    """Return the shape of the product of two weights of these shapes."""
    outputs, _, *below = expand
    _, inputs, *across = reduce
    return torch.Size([outputs, inputs, *map(math.prod, zip(across, below, strict=True))])
