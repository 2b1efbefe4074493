"""Zeros: operations whose output is zero where a unit is.

Sums over units lose nothing with a unit of zeros, but they do with its sigmoid.
"""

from typing import Any

import torch

from fitsmall.compressors.units.labels import Fields, varying
from fitsmall.compressors.units.movement import MOVES
from fitsmall.compressors.units.operation import Operation, shape_of

__all__ = ["vanishes"]

# They hold nothing but zeros for a unit whose weights and states are zero.
_FROM_WEIGHTS = {
    "embedding", "embedding_bag", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell",
    "rnn_tanh_cell", "rnn_relu_cell",
}  # fmt: skip
# f(0) = 0, or entries are moved, averaged, or left out.
_KEEPING = {
    *MOVES, "index", "index_select", "gather", "channel_shuffle", "cat", "stack",
    "relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "hardtanh", "tanh", "sin", "tan", "asinh", "atan", "erf", "expm1", "log1p",
    "abs", "neg", "sign", "sqrt", "square", "glu", "dropout", "feature_dropout", "to", "type_as",
    "contiguous", "clone", "detach", "alias", "_weight_norm", "tril", "triu", "sum", "mean",
    "amax", "amin", "linalg_vector_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_linear1d", "upsample_bilinear2d",
}  # fmt: skip
_PRODUCTS = {"mul", "matmul", "mm", "bmm", "einsum"}
_NORMS = {"batch_norm", "instance_norm", "group_norm"}


def vanishes(op: Operation, fields: Fields) -> bool:
    """Return whether the entries of an operation's output are zero where their unit is.

    Args:
        op: The operation.
        fields: Fields of its output.
    """
    inputs = op.node.all_input_nodes
    if op.name in _FROM_WEIGHTS:
        return True
    if op.name in _KEEPING:
        return all(op.vanishes(each) for each in inputs if op.fields(each))
    if op.name in ("add", "sub"):
        return all(op.vanishes(op[name]) for name in ("self", "other"))
    if op.name == "div":
        return op.vanishes(op["self"]) and not _more(op, op["other"], op["self"])
    if op.name in _PRODUCTS:
        return any(
            op.vanishes(each) and not any(_more(op, other, each) for other in inputs)
            for each in inputs
        )
    if op.name == "scaled_dot_product_attention":
        return op.vanishes(op["value"])
    if op.name in _NORMS and op["weight"] is not None:
        return op.vanishes(op["weight"]) and op.vanishes(op["bias"])
    if op.name in _NORMS:
        return op.vanishes(op["input"])
    if op.name == "linear" or op.name.startswith("conv"):
        added = op["bias"] is None or op.vanishes(op["bias"])
        return op.vanishes(op["weight"]) and added and len(fields) == 1
    return False


def _more(op: Operation, node: Any, other: Any) -> bool:
    """Return whether a factor has fields along dimensions in which the other one has none."""
    return not _dims(op, node) <= _dims(op, other)


def _dims(op: Operation, node: Any) -> set[int]:
    """Return the dimensions along which fields vary, counted from the last one."""
    if not isinstance(node, torch.fx.Node):
        return set()
    return {dim - len(shape_of(node)) for labels in op.fields(node) for dim in varying(labels)}
