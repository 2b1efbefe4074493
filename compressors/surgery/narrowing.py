"""Narrowing: layers lose channels, heads or hidden units, and their tensors become smaller."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Size, Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.naming import dotted
from fitsmall.compressors.surgery.protocol import Changed, Layout, Surgery, TensorSpec
from fitsmall.compressors.torch_internals import saves_buffers
from fitsmall.compressors.units.cut import Attribute, Cut, tensor_of
from fitsmall.compressors.units.cut import Size as AttributeSize

__all__ = ["Narrowing", "carry_marks"]

# Buffers without entries, whose shapes mark a narrowed layer in a state dict: (0, shape now, shape
# before) of a tensor, and (0, *values) of an attribute. They take no memory.
_TENSOR, _ATTRIBUTE = "narrowed_", "resized_"

# Between names of modules in that of a buffer, where a layer does not save buffers itself.
_BELOW = "/"


@dataclass(frozen=True)
class Narrowing(Surgery):
    """The removal of slices from tensors, and the new sizes that modules keep.

    Args:
        shapes: Shape of each narrowed tensor now, by name.
        before: Shape before of those tensors that have a mark, one in each narrowed module.
        attributes: Attributes of modules that hold a size.
        cut: Indices that stay; known in training alone.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> index = torch.tensor([0, 3])
        >>> cut = Cut({("0.weight", 0): index, ("0.bias", 0): index, ("1.weight", 1): index}, ())
        >>> Narrowing.of(cut, net).apply(net)
        {'0.weight': True, '0.bias': True, '1.weight': True}
        >>> net[0], net[1]
        (Linear(in_features=3, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True))
    """  # noqa: E501

    shapes: Mapping[str, Size]
    before: Mapping[str, Size]
    attributes: Sequence[Attribute] = ()
    cut: Cut | None = None

    kind: ClassVar[str] = "narrow"

    @classmethod
    def of(cls, cut: Cut, module: nn.Module) -> Self:
        """Return the surgery of a cut, for a module to which it has not been applied."""
        shapes: dict[str, list[int]] = {}
        for (name, dim), index in cut.kept.items():
            shapes.setdefault(name, [*tensor_of(module, name).shape])[dim] = len(index)
        # The largest tensor of each module has the mark: a vector may move when two factors come.
        largest: dict[str, str] = {}
        for name in sorted(shapes, key=lambda name: tensor_of(module, name).numel()):
            largest[name.rpartition(".")[0]] = name
        before = {name: tensor_of(module, name).shape for name in largest.values()}
        sizes = {name: Size(shape) for name, shape in shapes.items()}
        return cls(sizes, before, cut.attributes, cut)

    @classmethod
    def found(cls, layout: Layout) -> Self | None:
        shapes, before, attributes = {}, {}, []
        for name, spec in layout.items():
            path, _, own = name.rpartition(".")
            if spec.shape[:1] != (0,):
                continue
            marked = dotted(path, own.partition("_")[2].replace(_BELOW, "."))
            if own.startswith(_ATTRIBUTE) and len(spec.shape) > 1:
                where, _, attribute = marked.rpartition(".")
                attributes.append((where, attribute, tuple(spec.shape[1:])))
            elif own.startswith(_TENSOR) and len(spec.shape) % 2:
                tensor, dims = marked, len(spec.shape) // 2
                shapes[tensor] = Size(spec.shape[1 : dims + 1])
                before[tensor] = Size(spec.shape[dims + 1 :])
        if not before:
            return None
        paths = {name.rpartition(".")[0] for name in before}
        for name, spec in layout.items():
            path, _, own = name.rpartition(".")
            # The bias of a layer that became two factors belongs to the second.
            path = path.removesuffix(".expand") if path not in paths and own == "bias" else path
            if path in paths and not own.startswith((_TENSOR, _ATTRIBUTE)):
                shapes.setdefault(dotted(path, own), spec.shape)
        return cls(shapes, before, attributes)

    @classmethod
    def own_tensors(cls, names: Iterable[str]) -> list[str]:
        return [name for name in names if _is_mark(name)]

    def expect(self, module: nn.Module, layout: Layout) -> dict[str, TensorSpec]:
        for name, shape in self.before.items():
            own, now = layout[name].shape if name in layout else None, self.shapes[name]
            if own not in (shape, now) or not (0 not in now and _is_narrower(now, shape)):
                raise ValueError(
                    f"the file has {name} narrowed from {tuple(shape)}, and "
                    f"{type(module).__name__} has {tuple(own) if own else 'none'}"
                )
        for path, name, value in self.attributes:
            if _as_attribute(getattr(_submodule(module, path), name, None), value) is None:
                raise ValueError(f"{type(module).__name__} has no size {dotted(path, name)!r}")
        expected = {
            name: TensorSpec(self.shapes[name], spec.dtype)
            if name in self.shapes and _is_narrower(self.shapes[name], spec.shape)
            else spec
            for name, spec in layout.items()
        }
        return expected | {
            name: TensorSpec(mark.shape, mark.dtype) for name, mark in self._marks(module).items()
        }

    def apply(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, bool]:
        assert self.cut is not None
        self.cut.apply(module, optimizers)
        self._mark(module)
        return dict.fromkeys(self.shapes, True)

    def replay(self, module: nn.Module) -> None:
        tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
        kept = {
            (name, dim): torch.arange(size)
            for name, shape in self.shapes.items()
            if name in tensors and _is_narrower(shape, tensors[name].shape)
            for dim, size in enumerate(shape)
            if size < tensors[name].shape[dim]
        }
        attributes = []
        for path, name, value in self.attributes:
            size = _as_attribute(getattr(module.get_submodule(path), name), value)
            assert size is not None
            attributes.append((path, name, size))
        Cut(kept, attributes).apply(module)
        self._mark(module)

    def undo(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if not _is_mark(name)}

    def table(self, layout: Layout) -> list[Changed]:
        rows = []
        for name, before in self.before.items():
            path, shape = name.rpartition(".")[0], self.shapes[name]
            pairs = zip(before, shape, strict=True)
            widths = ", ".join(f"{a} to {b}" for a, b in pairs if a != b)
            dtype = layout[name].dtype if name in layout else torch.float32
            now, total = shape.numel(), before.numel()
            # Vectors next to it, such as its bias, have the same number of outputs.
            for other, size in self.shapes.items():
                if other != name and other.rpartition(".")[0] == path and len(size) == 1:
                    now, total = (
                        now + size[0],
                        total + (before[0] if size == shape[:1] else size[0]),
                    )
            rows.append(
                Changed(path, f"{widths} wide", now * dtype.itemsize, total * dtype.itemsize)
            )
        return rows

    def _marks(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the marks by name."""
        shapes = {
            _mark_of(module, _TENSOR, name): (0, *self.shapes[name], *before)
            for name, before in self.before.items()
        }
        values = {
            _mark_of(module, _ATTRIBUTE, dotted(path, own)): (0, *_sizes(size))
            for path, own, size in self.attributes
        }
        return {
            name: torch.empty(shape, dtype=torch.uint8)
            for name, shape in {**shapes, **values}.items()
        }

    def _mark(self, module: nn.Module) -> None:
        for name, mark in self._marks(module).items():
            path, _, own = name.rpartition(".")
            layer = module.get_submodule(path)
            earlier = getattr(layer, own, None)
            if isinstance(earlier, Tensor) and own.startswith(_TENSOR):  # narrowed a second time
                dims = mark.dim() // 2
                mark = mark.new_empty(0, *mark.shape[1 : dims + 1], *earlier.shape[dims + 1 :])
            device = next((tensor.device for tensor in layer.parameters()), mark.device)
            layer.register_buffer(own, mark.to(device))


def carry_marks(layer: nn.Module, successor: nn.Module) -> None:
    """Give the successor of a layer the marks of its narrowing."""
    for name, buffer in layer.named_buffers(recurse=False):
        if _is_mark(name):
            successor.register_buffer(name, buffer)


def _mark_of(module: nn.Module, kind: str, name: str) -> str:
    """Return the name of a mark: in the module of a tensor, or the next one that saves it."""
    path, _, own = name.rpartition(".")
    while path and not ((layer := _submodule(module, path)) and saves_buffers(layer)):
        path, _, child = path.rpartition(".")
        own = f"{child}{_BELOW}{own}"
    return dotted(path, f"{kind}{own}")


def _sizes(value: AttributeSize) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _is_mark(name: str) -> bool:
    return name.rpartition(".")[2].startswith((_TENSOR, _ATTRIBUTE))


def _is_narrower(shape: Size, than: Size) -> bool:
    """Return whether a shape has the same dimensions, none larger and one smaller.

    Example:
        >>> _is_narrower(Size([2, 3]), Size([4, 3])), _is_narrower(Size([2, 5]), Size([4, 3]))
        (True, False)
    """
    fits = len(shape) == len(than) and all(a <= b for a, b in zip(shape, than, strict=True))
    return fits and shape != than


def _as_attribute(now: Any, value: AttributeSize) -> AttributeSize | None:
    """Return a size in the form in which a module has it now; None if it has none, or less.

    Example:
        >>> _as_attribute(8, (4,)), _as_attribute([8, 8], (4, 6)), _as_attribute(8, (9,))
        (4, [4, 6], None)
    """
    sizes = _sizes(value)
    several = isinstance(now, list | tuple)
    present = now if several else (now,)
    fits = len(present) == len(sizes) and all(
        type(b) is int and 1 <= a <= b for a, b in zip(sizes, present, strict=True)
    )
    if not fits:
        return None
    return type(now)(sizes) if several else sizes[0]


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
