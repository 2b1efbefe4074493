"""Rules: which labels an operation makes the same, and which it passes on.

There are four kinds of operations. Those on each entry unite the fields of their inputs. Products
unite fields along the dimension that they sum over, and pass on the others. Those that only move
entries move labels, by the same operation on the labels themselves. Those whose result depends on
entries that are zero, such as a softmax or a layer's norm, fix dimensions: along these nothing can
be removed.

Operations without a rule fix all that they read.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fitsmall.compressors.units.labels import FIXED, Fields, Labels, compact, varying

__all__ = ["Operation", "only_moves", "rule_of"]


class Operation:
    """An operation in a graph, and the fields of its inputs.

    Args:
        node: The node of the graph.
        labels: All labels.
        fields: Fields of the nodes before it.
    """

    def __init__(self, node: Any, labels: Labels, fields: Mapping[Any, Any]) -> None:
        self.node, self.labels, self._fields = node, labels, fields
        self.name = _name(node.target)
        given = zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
        defaults = {
            argument.name: argument.default_value for argument in node.target._schema.arguments
        }
        self.arguments: dict[str, Any] = {**defaults, **dict(given), **node.kwargs}

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name, or the value that it has by default."""
        return self.arguments[name]

    def fields(self, value: Any) -> Fields:
        """Return the fields of an argument; numbers and the network's inputs have none."""
        found: Fields = self._fields[value] if isinstance(value, torch.fx.Node) else []
        return found

    def fix_all(self) -> Fields:
        """Fix all that the operation reads."""
        for each in self.node.all_input_nodes:
            self.labels.fix(*self.fields(each))
        return []


Rule = Callable[[Operation], Any]


def rule_of(target: Any) -> Rule | None:
    """Return the rule of an operation, or None if there is none.

    Example:
        >>> rule_of(torch.ops.aten.linear.default).__name__
        '_linear'
        >>> rule_of(torch.ops.aten.gelu.default).__name__
        '_each_entry'
    """
    name = _name(target)
    if name in _RULES:
        return _RULES[name]
    forms = getattr(torch.ops.aten, name, None)  # not all forms of an operation have its tags
    tags = [getattr(forms, form).tags for form in forms.overloads()] if forms else [target.tags]
    return _each_entry if any(torch.Tag.pointwise in own for own in tags) else None


def only_moves(target: Any) -> bool:
    """Return whether an operation moves entries, or leaves some out.

    Example:
        >>> only_moves(torch.ops.aten.slice.Tensor)
        True
    """
    return rule_of(target) is _moved


def _name(target: Any) -> str:
    """Return the name of an operation; those in place count as the others."""
    name: str = target._schema.name
    return name.removeprefix("aten::").removesuffix("_")


def _shape(node: Any) -> list[int]:
    return [*node.meta["val"].shape]


def _along(fields: Fields, dim: int) -> Fields:
    """Return fields that vary along one dimension alone, flat."""
    return [labels.flatten() for labels in fields if varying(labels) == {dim}]


def _placed(labels: Tensor, dim: int, dims: int) -> Tensor:
    """Return labels as a field along one of so many dimensions."""
    shape = [1] * dims
    shape[dim] = -1
    return labels.view(shape)


def _united(op: Operation, labels: Fields, others: Fields) -> Fields:
    """Unite flat labels with those of a bias or norm, and return them."""
    for other in others:
        if labels:
            op.labels.unite(labels[0], other.flatten())
        else:
            op.labels.fix(other)
    return labels


# Products.


def _linear(op: Operation) -> Fields:
    dims = len(_shape(op["input"]))
    left, rows = op.labels.contract(op.fields(op["input"]), dims - 1, op.fields(op["weight"]), 1)
    outputs = _united(op, _along(rows, 0), op.fields(op["bias"]))
    return left + [_placed(labels, dims - 1, dims) for labels in outputs]


def _convolution(op: Operation) -> Fields:
    dims, kernel = len(_shape(op["input"])), len(_shape(op["weight"])) - 2
    channels = dims - kernel - 1
    inputs = op.labels.fix_along(op.fields(op["input"]), range(channels + 1, dims))
    weight = op.labels.fix_along(op.fields(op["weight"]), range(2, kernel + 2))
    bias, groups, transposed = op.fields(op["bias"]), op["groups"], "transpose" in op.name
    if groups > 1:
        read, rows, columns = _along(inputs, channels), _along(weight, 0), _along(weight, 1)
        if transposed or not read or not rows:
            return op.fix_all()
        by_group, outputs = read[0].view(groups, -1), rows[0].view(groups, -1)
        if columns:  # the same channels of every group
            op.labels.unite(by_group, columns[0])
            op.labels.unite(outputs, outputs[:1])
        else:  # every channel is a group
            op.labels.unite(by_group, outputs)
        left = [labels for labels in inputs if varying(labels) != {channels}]
    else:
        dim = 0 if transposed else 1
        left, rows = op.labels.contract(inputs, channels, weight, dim)
        rows = _along(rows, 1 - dim)
    return left + [_placed(labels, channels, dims) for labels in _united(op, rows, bias)]


def _embedding(op: Operation) -> Fields:
    dims = len(_shape(op.node))
    left = op.labels.fix_along(op.fields(op["weight"]), [0])
    return [_placed(labels.flatten(), dims - 1, dims) for labels in left]


def _product(op: Operation) -> Fields:
    *added, a, b = op.node.args[:3] if op.name in ("addmm", "baddbmm") else op.node.args[:2]
    shapes = [_shape(a), _shape(b)]
    if min(map(len, shapes)) < 2:
        return op.fix_all()
    left = op.labels.contract(op.fields(a), len(shapes[0]) - 1, op.fields(b), len(shapes[1]) - 2)
    shapes[0][-1] = shapes[1][-2] = 1
    product = op.labels.merge([*zip(left, shapes, strict=True)])
    others = [(op.fields(each), _shape(each)) for each in added]
    return op.labels.merge([(product, _shape(op.node)), *others])


def _attention(op: Operation) -> Fields:
    nodes = [op["query"], op["key"], op["value"]]
    shapes, fields = [_shape(each) for each in nodes], [op.fields(each) for each in nodes]
    # A softmax runs over positions, and scores are divided by the root of the size of a head.
    for k, dims in enumerate(([-2, -1], [-2, -1], [-2])):
        fields[k] = op.labels.fix_along(fields[k], [len(shapes[k]) + dim for dim in dims])
        for dim in dims:
            shapes[k][dim] = 1
    if op["enable_gqa"]:  # several queries share keys and values
        times = shapes[0][-3] // shapes[1][-3]
        for k in (1, 2):
            shapes[k][-3] *= times
            fields[k] = [
                labels.repeat_interleave(times, -3) if labels.shape[-3] > 1 else labels
                for labels in fields[k]
            ]
    return op.labels.merge([*zip(fields, shapes, strict=True)])


def _recurrent(op: Operation) -> list[Fields]:
    size = 4 if op["has_biases"] else 2  # weights of a layer and direction
    weights = op["params"]
    layers = [weights[k : k + size] for k in range(0, len(weights), size)]
    directions = 2 if op["bidirectional"] else 1
    if len(layers) != op["num_layers"] * directions or 1 in _shape(weights[1]):
        return [op.fix_all()] * 3  # projections, or a single unit
    inputs = op.fields(op["input"])
    first = _along(op.fields(weights[1]), 1)[0]
    for state in op["hx"] if isinstance(op["hx"], list | tuple) else [op["hx"]]:
        for labels in op.labels.fix_along(op.fields(state), range(len(_shape(state)) - 1)):
            op.labels.unite(labels.flatten(), first)
    for k in range(0, len(layers), directions):
        for own in layers[k : k + directions]:
            hidden = _along(op.fields(own[1]), 1)[0]
            op.labels.unite(hidden, first)  # one size for all layers and directions
            for weight in own:
                (rows,) = _along(op.fields(weight), 0)
                op.labels.unite(rows.view(-1, len(hidden)), hidden)
            op.labels.contract(inputs, 2, op.fields(own[0])[1:], 1)
        inputs = [_placed(first.repeat(directions), 2, 3)]
    states = [_placed(first, 2, 3)]
    return [inputs, states, states]


# Operations on each entry, and those that treat channels alike.


def _each_entry(op: Operation) -> Fields:
    operands = [(op.fields(each), _shape(each)) for each in op.node.all_input_nodes]
    return op.labels.merge(operands)


def _each_channel(op: Operation) -> Fields:
    """Pooling and resizing: along positions entries mix."""
    value = op.node.args[0]
    return op.labels.fix_along(op.fields(value), range(2, len(_shape(value))))


def _gated(op: Operation) -> Fields:
    shape = _shape(op["self"])
    dim = op["dim"] % len(shape)
    halves: list[Fields] = [[], []]
    for labels in op.fields(op["self"]):
        for half, part in zip(halves, labels.expand(shape).chunk(2, dim), strict=True):
            half += compact(part)
    return op.labels.merge([(half, _shape(op.node)) for half in halves])


def _batch_norm(op: Operation) -> Fields:
    fields = op.fields(op["input"])
    if op.arguments.get("training") or op.arguments.get("use_input_stats"):
        others = [dim for dim in range(len(_shape(op["input"]))) if dim != 1]
        fields = op.labels.fix_along(fields, others)
    for name in ("weight", "bias", "running_mean", "running_var"):
        _united(op, _along(fields, 1), op.fields(op[name]))
    return fields


# Operations that entries of zero change.


def _group_norm(op: Operation) -> Fields:
    fields = op.labels.fix_along(op.fields(op["input"]), range(2, len(_shape(op["input"]))))
    for labels in _along(fields, 1):
        by_group = labels.view(op["num_groups"], -1)
        op.labels.unite(by_group, by_group[:, :1])
        if len(by_group) == 1:
            op.labels.fix(labels)
    for name in ("weight", "bias"):
        _united(op, _along(fields, 1), op.fields(op[name]))
    return fields


def _layer_norm(op: Operation) -> Fields:
    for name in ("weight", "bias"):
        if name in op.arguments:
            op.labels.fix(*op.fields(op[name]))
    dims = len(_shape(op["input"]))
    over = range(dims - len(op["normalized_shape"]), dims)
    return op.labels.fix_along(op.fields(op["input"]), over)


def _over_dimension(op: Operation) -> Fields:
    """Softmax and sums along a dimension that stays."""
    return op.labels.fix_along(op.fields(op["self"]), [op["dim"] % len(_shape(op["self"]))])


def _extreme(op: Operation) -> Any:
    """The greater of two tensors; the greatest entry of one; or it and its index in a dimension."""
    if "other" in op.arguments:
        return _each_entry(op)
    return [_reduction(op)] * 2 if "dim" in op.arguments else _reduction(op)


def _reduction(op: Operation) -> Fields:
    dims, given = len(_shape(op["self"])), op.arguments.get("dim")
    over = [given] if isinstance(given, int) else given or range(dims)
    over = [dim % dims for dim in over]
    fields = op.fields(op["self"])
    if op.name == "sum":  # units of zeros add nothing
        fields = [labels for labels in fields if not varying(labels) <= {*over}]
    left = op.labels.fix_along(fields, over)
    if op.arguments.get("keepdim"):
        return left
    kept = [dim for dim in range(dims) if dim not in over]
    return [labels.reshape([labels.shape[dim] for dim in kept]) for labels in left]


# Operations that move entries.


def _moved(op: Operation) -> Any:
    value, *others = op.node.args
    moved = []
    for labels in op.fields(value):
        whole = labels.expand(_shape(value)).contiguous()
        if op.name in ("pad", "constant_pad_nd"):
            found = _padded(labels, others[0])
        elif op.name in ("view_as", "reshape_as", "expand_as"):
            found = (
                whole.expand(_shape(op.node))
                if "expand" in op.name
                else whole.view(_shape(op.node))
            )
        else:
            found = op.node.target(whole, *others, **op.node.kwargs)
        if not isinstance(found, Tensor):
            if op.name in ("chunk", "split"):  # a forward asks for parts of one size
                alike = [part for part in found if part.shape == found[0].shape]
                for part in alike[1:]:
                    op.labels.unite(alike[0], part)
            moved.append([compact(part) for part in found])
            continue
        field = compact(found)
        if field and len(varying(field[0])) > len(varying(labels)):
            # A dimension is split. Whole rows of its last part stay together, as those of a head.
            op.labels.fix_along(field, [max(varying(field[0]))])
        moved.append(field)
    if any(moved) and isinstance(next(filter(None, moved))[0], list):
        return [_apart(op, parts) for parts in zip(*moved, strict=True)]
    return _apart(op, moved)


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


def _joined(op: Operation) -> Fields:
    parts, dim = op["tensors"], op["dim"]
    shapes, fields = [_shape(part) for part in parts], [op.fields(part) for part in parts]
    dim %= len(_shape(op.node))
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


_RULES: dict[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "embedding": _embedding,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm"), _product),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(
        ("dropout", "feature_dropout", "to", "type_as", "contiguous", "clone", "detach", "alias",
         "where", "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "silu",
         "mish", "_weight_norm", "_assert_tensor_metadata"),
        _each_entry,
    ),
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
         "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
         "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
         "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
        _each_channel,
    ),
    "glu": _gated,
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), _over_dimension),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), _reduction),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "expand_as", "flatten",
         "unflatten", "squeeze", "unsqueeze",
         "permute", "transpose", "t", "numpy_T", "expand", "slice", "select", "narrow", "split",
         "split_with_sizes", "chunk", "unbind", "tensor_split", "repeat", "repeat_interleave",
         "roll", "flip", "pad", "constant_pad_nd", "pixel_shuffle", "pixel_unshuffle", "movedim"),
        _moved,
    ),
    **dict.fromkeys(("cat", "stack"), _joined),
}  # fmt: skip
