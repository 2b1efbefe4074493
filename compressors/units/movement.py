"""Rules of operations that move entries: they move labels, by the same operation on the labels."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.units.labels import FIXED, Fields, compact, varying
from fitsmall.compressors.units.operation import Operation, name_of, shape_of

__all__ = ["MOVES", "indexed", "joined", "moved", "shuffled"]

MOVES = (
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "expand_as", "flatten", "unflatten",
    "squeeze", "unsqueeze", "permute", "transpose", "t", "numpy_T", "mT", "swapaxes", "expand",
    "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split",
    "repeat", "repeat_interleave", "roll", "flip", "pad", "constant_pad_nd", "pixel_shuffle",
    "pixel_unshuffle", "movedim",
)  # fmt: skip


def moved(op: Operation) -> Any:
    outputs: list[Any] = []
    for labels in op.fields(op.node.args[0]):
        found = _move(op.node, labels)
        if not isinstance(found, Tensor):
            if op.name in ("chunk", "split"):  # a forward asks for parts of one size
                alike = [part for part in found if part.shape == found[0].shape]
                for part in alike[1:]:
                    op.labels.unite(alike[0], part)
            outputs.append([compact(part) for part in found])
            continue
        field = compact(found)
        if field and len(varying(field[0])) > len(varying(labels)):
            field = _divided(op, field)
        outputs.append(field)
    if any(outputs) and isinstance(next(filter(None, outputs))[0], list):
        return [_apart(op, parts) for parts in zip(*outputs, strict=True)]
    return _apart(op, outputs)


def _move(node: Any, labels: Tensor) -> Any:
    """Return a field after an operation that moves entries, or a list of them."""
    value, *others = node.args
    whole, name = labels.expand(shape_of(value)).contiguous(), name_of(node.target)
    if name in ("pad", "constant_pad_nd"):
        return _padded(labels, others[0])
    if name == "expand_as":
        return whole.expand(shape_of(node))
    if name in ("view_as", "reshape_as"):
        return whole.view(shape_of(node))
    return node.target(whole, *others, **node.kwargs)


def _divided(op: Operation, field: Fields) -> Fields:
    """Return the field of a dimension that has been divided into several."""
    first, *_, last = sorted(varying(field[0]))
    fate = _fate(op.node, field[0], first)
    if fate == "parts":  # as queries, keys and values are taken out one by one
        return field
    # Channels that are shuffled leave each of the groups; else whole rows stay together, as heads.
    return op.labels.fix_along(field, [first if fate == "joined" else last])


def _fate(node: Any, labels: Tensor, first: int) -> str:
    """Return what becomes of a divided dimension: taken into parts, joined again, or neither.

    Args:
        node: The operation that divides it.
        labels: The field after it.
        first: The first of the dimensions of the field.
    """
    while len(varying(labels)) == 2:
        users = [*node.users]
        names = [name_of(user.target) if user.op == "call_function" else "" for user in users]
        if {*names} <= {"select", "unbind"}:
            dims = {user.args[1] if len(user.args) > 1 else 0 for user in users}
            return "parts" if {dim % labels.dim() for dim in dims} == {first} else ""
        if len(users) > 1 or names[0] not in (*MOVES, "contiguous", "clone"):
            return ""
        if names[0] in MOVES:
            found = _move(users[0], labels)
            if not isinstance(found, Tensor):
                return ""
            if names[0] in _PERMUTING:
                marks = torch.zeros_like(labels).index_fill_(first, torch.tensor([0]), 1)
                (first,) = varying(compact(_move(users[0], marks))[0])
            elif [n for n in found.shape if n > 1] != [n for n in shape_of(node) if n > 1]:
                return "joined" if len(varying(compact(found)[0])) == 1 else ""
            labels = compact(found)[0]
        node = users[0]
    return ""


_PERMUTING = {"permute", "transpose", "swapaxes", "t", "mT", "unsqueeze", "squeeze", "movedim"}


def shuffled(op: Operation) -> Fields:
    """Channels that are shuffled leave each of the groups."""
    dims = len(shape_of(op["self"]))
    fields = op.labels.fix_along(op.fields(op["self"]), {*range(dims)} - {1})
    for labels in fields:
        by_group = labels.view(op["groups"], -1)
        op.labels.unite(by_group, by_group[:1])
    return [compact(_move(op.node, labels))[0] for labels in fields]


def indexed(op: Operation) -> Fields:
    """Entries are taken by their places along some dimensions, which stay."""
    value, shape = op.node.args[0], shape_of(op.node.args[0])
    if op.name == "index":
        places = [each for each in op["indices"] if each is not None]
        dims = [dim for dim, each in enumerate(op["indices"]) if each is not None]
        if any(each.meta["val"].dtype == torch.bool for each in places):
            return op.fix_all()
    else:
        places, dims = [op["index"]], [op["dim"] % len(shape)]
    fields = op.labels.fix_along(op.fields(value), dims)
    if op.name == "gather":
        sizes = shape_of(op.node)
        whole = [labels for labels in fields if all(sizes[d] == shape[d] for d in varying(labels))]
        op.labels.fix(*(labels for labels in fields if not any(labels is own for own in whole)))
        return whole
    first = [torch.zeros(shape_of(each), dtype=torch.long) for each in places]
    outputs = []
    for labels in fields:
        entries = labels.expand(shape)
        if op.name == "index":
            own = dict(zip(dims, first, strict=True))
            found = torch.ops.aten.index(entries, [own.get(dim) for dim in range(max(dims) + 1)])
        else:
            found = entries.index_select(dims[0], first[0])
        outputs.append(compact(found))
    return _apart(op, outputs)


def _padded(labels: Tensor, padding: Sequence[int]) -> Tensor:
    """Return a field with fixed entries around it; where it does not vary, it stays as it is."""
    sizes = [n if labels.shape[-1 - k // 2] > 1 else 0 for k, n in enumerate(padding)]
    return torch.constant_pad_nd(labels, sizes, FIXED)


def _apart(op: Operation, moved: Sequence[Fields]) -> Fields:
    """Return fields, but for those that have come to vary along the same dimension as another."""
    kept: Fields = []
    for field in chain.from_iterable(moved):
        if any(varying(field) & varying(other) for other in kept):
            op.labels.fix(field)
        else:
            kept.append(field)
    return kept


def joined(op: Operation) -> Fields:
    parts, dim = [part for part in op["tensors"] if 0 not in shape_of(part)], op["dim"]
    shapes, fields = [shape_of(part) for part in parts], [op.fields(part) for part in parts]
    dim %= len(shape_of(op.node))
    if op.name == "stack":
        fields = [[labels.unsqueeze(dim) for labels in own] for own in fields]
        shapes = [[*shape[:dim], 1, *shape[dim:]] for shape in shapes]
    # Along other dimensions parts stand next to each other as operands do.
    across = [[labels for labels in own if dim not in varying(labels)] for own in fields]
    sizes = [[1 if d == dim else n for d, n in enumerate(shape)] for shape in shapes]
    joined = op.labels.merge([*zip(across, sizes, strict=True)])
    along = [[labels for labels in own if dim in varying(labels)] for own in fields]
    if any(along):
        whole = []
        for own, shape in zip(along, shapes, strict=True):
            whole.append(own[0].expand(shape) if own else torch.full(shape, FIXED))
            op.labels.fix(*own[1:])
        joined += compact(torch.cat(whole, dim))
    return joined
