"""Rules: which labels an operation makes the same, and which it passes on.

There are four kinds of operations. Those on each entry unite the fields of their inputs. Products
unite fields along the dimension that they sum over, and pass on the others
(:mod:`~fitsmall.compressors.units.products`). Those that only move entries move labels, by the same
operation on the labels themselves (:mod:`~fitsmall.compressors.units.movement`). Those whose result
depends on entries that are zero, such as a softmax or a layer's norm, fix dimensions: along these
nothing can be removed.

Operations without a rule fix all that they read.
"""

from collections.abc import Callable
from typing import Any

import torch

from fitsmall.compressors.units import products
from fitsmall.compressors.units.labels import Fields, compact, varying
from fitsmall.compressors.units.movement import MOVES, indexed, joined, moved, shuffled
from fitsmall.compressors.units.operation import (
    CONSTANTS,
    Operation,
    along,
    extent_of,
    name_of,
    shape_of,
    united,
)

__all__ = ["only_moves", "rule_of"]


Rule = Callable[[Operation], Any]


def rule_of(target: Any) -> Rule | None:
    """Return the rule of an operation, or None if there is none.

    Example:
        >>> rule_of(torch.ops.aten.linear.default).__name__
        'linear'
        >>> rule_of(torch.ops.aten.gelu.default).__name__
        '_each_entry'
    """
    name = name_of(target)
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
    return rule_of(target) is moved


# Operations on each entry, and those that treat channels alike.


def _each_entry(op: Operation) -> Fields:
    operands = [(op.fields(each), extent_of(each)) for each in op.node.all_input_nodes]
    return op.labels.merge(operands)


def _each_channel(op: Operation) -> Fields:
    """Pooling and resizing: along positions entries mix."""
    value = op.node.args[0]
    return op.labels.fix_along(op.fields(value), range(2, len(shape_of(value))))


def _gated(op: Operation) -> Fields:
    shape = shape_of(op["self"])
    dim = op["dim"] % len(shape)
    halves: list[Fields] = [[], []]
    for labels in op.fields(op["self"]):
        for half, part in zip(halves, labels.expand(shape).chunk(2, dim), strict=True):
            half += compact(part)
    return op.labels.merge([(half, shape_of(op.node)) for half in halves])


def _by_channel(op: Operation, fields: Fields) -> Fields:
    """Make labels that vary along channels the same along all other dimensions."""
    left: Fields = []
    for labels in fields:
        others = varying(labels) - {1} if 1 in varying(labels) else set()
        left += op.labels.fix_along([labels], others) if others else [labels]
    return left


def _each_slope(op: Operation) -> Fields:
    """The slope below zero is one number, or one for each channel."""
    fields = op.fields(op["self"])
    if op.fields(op["weight"]):
        fields = _by_channel(op, fields)
        united(op, along(fields, 1), op.fields(op["weight"]))
    return fields


def _batch_norm(op: Operation) -> Fields:
    fields = _by_channel(op, op.fields(op["input"]))
    if op.arguments.get("training") or op.arguments.get("use_input_stats"):
        others = [dim for dim in range(len(shape_of(op["input"]))) if dim != 1]
        fields = op.labels.fix_along(fields, others)
    for name in ("weight", "bias", "running_mean", "running_var"):
        united(op, along(fields, 1), op.fields(op[name]))
    return fields


# Operations that entries of zero change.


def _group_norm(op: Operation) -> Fields:
    fields = op.labels.fix_along(op.fields(op["input"]), range(2, len(shape_of(op["input"]))))
    for labels in along(fields, 1):
        by_group = labels.view(op["num_groups"], -1)
        op.labels.unite(by_group, by_group[:, :1])
        if len(by_group) == 1:
            op.labels.fix(labels)
    for name in ("weight", "bias"):
        united(op, along(fields, 1), op.fields(op[name]))
    return fields


def _layer_norm(op: Operation) -> Fields:
    for name in ("weight", "bias"):
        if name in op.arguments:
            op.labels.fix(*op.fields(op[name]))
    dims = len(shape_of(op["input"]))
    over = range(dims - len(op["normalized_shape"]), dims)
    return op.labels.fix_along(op.fields(op["input"]), over)


def _over_dimension(op: Operation) -> Fields:
    """Softmax and sums along a dimension that stays."""
    return op.labels.fix_along(op.fields(op["self"]), [op["dim"] % len(shape_of(op["self"]))])


def _over_last(op: Operation) -> Fields:
    """Parts of matrices that lie on one side of the diagonal."""
    dims = len(shape_of(op["self"]))
    return op.labels.fix_along(op.fields(op["self"]), [dims - 2, dims - 1])


def _extreme(op: Operation) -> Any:
    """The greater of two tensors; the greatest entry of one; or it and its index in a dimension."""
    if "other" in op.arguments:
        return _each_entry(op)
    return [_reduction(op)] * 2 if "dim" in op.arguments else _reduction(op)


def _reduction(op: Operation) -> Fields:
    dims, given = len(shape_of(op["self"])), op.arguments.get("dim")
    over = [given] if isinstance(given, int) else given or range(dims)
    over = [dim % dims for dim in over]
    fields = op.fields(op["self"])
    if op.name in ("sum", "linalg_vector_norm"):  # units of zeros add nothing
        fields = op.labels.sum(fields, {*over}, op.vanishes(op["self"]))
    left = op.labels.fix_along(fields, over)
    if op.arguments.get("keepdim"):
        return left
    kept = [dim for dim in range(dims) if dim not in over]
    return [labels.reshape([labels.shape[dim] for dim in kept]) for labels in left]


def _constant(op: Operation) -> Fields:
    """Tensors that only have the shape of another one hold no units."""
    return []


def _scattered(op: Operation) -> Fields:
    """Entries of one tensor are added to those of another, at places along a dimension."""
    source = op["src"] if "src" in op.arguments else op["source"]
    dim, operands = op["dim"] % len(shape_of(op.node)), []
    for node in (op["self"], source):
        shape = extent_of(node)
        shape[dim] = 1
        operands.append((op.labels.fix_along(op.fields(node), [dim]), shape))
    return op.labels.merge(operands)


_RULES: dict[str, Rule] = {
    "linear": products.linear,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        products.convolution,
    ),
    **dict.fromkeys(("embedding", "embedding_bag"), products.embedding),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "baddbmm"), products.product
    ),
    "einsum": products.einsum,
    "bilinear": products.bilinear,
    "transformers::grouped_mm_fallback": products.grouped,
    "scaled_dot_product_attention": products.attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), products.recurrent),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), products.recurrent_cell
    ),
    **dict.fromkeys(
        ("dropout", "feature_dropout", "to", "type_as", "contiguous", "clone", "detach", "alias",
         "where", "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu", "elu", "silu",
         "mish", "_weight_norm", "_assert_tensor_metadata"),
        _each_entry,
    ),
    "prelu": _each_slope,
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
         "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
         "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
         "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
         "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_trilinear3d",
         "grid_sampler"),
        _each_channel,
    ),
    **dict.fromkeys(
        ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
         "max_pool2d_with_indices"),
        lambda op: [_each_channel(op)] * 2,
    ),
    "glu": _gated,
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), _over_dimension),
    **dict.fromkeys(("tril", "triu"), _over_last),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm"),
        _reduction,
    ),
    **dict.fromkeys(("var_mean", "std_mean"), lambda op: [_reduction(op)] * 2),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("scatter_add", "index_add"), _scattered),
    **dict.fromkeys(
        (*CONSTANTS, "empty_like", "rand_like", "randn_like", "new_empty"),
        _constant,
    ),
    **dict.fromkeys(MOVES, moved),
    "channel_shuffle": shuffled,
    **dict.fromkeys(("index", "index_select", "gather"), indexed),
    **dict.fromkeys(("cat", "stack"), joined),
}  # fmt: skip
