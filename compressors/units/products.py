"""Rules of products: fields along a dimension that is summed over are united, others pass on."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fitsmall.compressors.units.labels import Fields, varying
from fitsmall.compressors.units.operation import (
    Operation,
    along,
    extent_of,
    placed,
    shape_of,
    united,
)

__all__ = [
    "attention",
    "bilinear",
    "convolution",
    "einsum",
    "embedding",
    "grouped",
    "linear",
    "product",
    "recurrent",
    "recurrent_cell",
]


def linear(op: Operation) -> Fields:
    dims = len(shape_of(op["input"]))
    zero = op.vanishes(op["input"]) or op.vanishes(op["weight"])
    inputs, weight = op.fields(op["input"]), op.fields(op["weight"])
    left, rows = op.labels.contract(inputs, dims - 1, weight, 1, zero)
    outputs = united(op, along(rows, 0), op.fields(op["bias"]))
    return left + [placed(labels, dims - 1, dims) for labels in outputs]


def convolution(op: Operation) -> Fields:
    dims, kernel = len(shape_of(op["input"])), len(shape_of(op["weight"])) - 2
    channels = dims - kernel - 1
    inputs = op.labels.fix_along(op.fields(op["input"]), range(channels + 1, dims))
    weight = op.labels.fix_along(op.fields(op["weight"]), range(2, kernel + 2))
    bias, groups, transposed = op.fields(op["bias"]), op["groups"], "transpose" in op.name
    if groups > 1:
        read, rows, columns = along(inputs, channels), along(weight, 0), along(weight, 1)
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
        zero = op.vanishes(op["input"]) or op.vanishes(op["weight"])
        left, rows = op.labels.contract(inputs, channels, weight, dim, zero)
        rows = along(rows, 1 - dim)
    return left + [placed(labels, channels, dims) for labels in united(op, rows, bias)]


def embedding(op: Operation) -> Any:
    dims = 2 if op.name == "embedding_bag" else len(shape_of(op["indices"])) + 1
    left = op.labels.fix_along(op.fields(op["weight"]), [0])
    fields = [placed(labels.flatten(), dims - 1, dims) for labels in left]
    return [fields, [], [], []] if op.name == "embedding_bag" else fields


def product(op: Operation) -> Fields:
    """Products of matrices and vectors, some of which are added to another tensor."""
    *added, a, b = op.node.args[: 3 if op.name.startswith(("add", "badd")) else 2]
    sizes = [len(shape_of(each)) for each in (a, b)]
    batch = "abcdef"[: max(0, *(size - 2 for size in sizes))]
    letters = [
        "k" if size == 1 else batch[len(batch) + 2 - size :] + own
        for size, own in zip(sizes, ("nk", "km"), strict=True)
    ]
    output = batch + "n" * (sizes[0] > 1) + "m" * (sizes[1] > 1)
    fields = _sum_of_products(op, [a, b], letters, output)
    others = [(op.fields(each), shape_of(each)) for each in added]
    return op.labels.merge([(fields, shape_of(op.node)), *others])


def bilinear(op: Operation) -> Fields:
    batch = "abcdef"[: len(shape_of(op.node)) - 1]
    nodes = [op["input1"], op["input2"], op["weight"]]
    fields = _sum_of_products(op, nodes, [batch + "i", batch + "j", "oij"], batch + "o")
    bias = (op.fields(op["bias"]), shape_of(op["bias"]) if op["bias"] else [])
    return op.labels.merge([(fields, shape_of(op.node)), bias])


def einsum(op: Operation) -> Fields:
    equation, nodes = op["equation"].replace(" ", ""), op["tensors"]
    inputs, arrow, output = equation.partition("->")
    letters = inputs.split(",")
    if any(len({*own}) < len(own.replace("...", "")) for own in letters):  # a diagonal
        return op.fix_all()
    longest = 0
    for k, own in enumerate(letters):
        if "..." in own:
            more = len(shape_of(nodes[k])) - len(own) + 3
            letters[k] = own.replace("...", "012345"[6 - more :])
            longest = max(longest, more)
    if not arrow:
        found = inputs.replace(",", "").replace(".", "")
        output = "..." + "".join(sorted(each for each in {*found} if found.count(each) == 1))
    return _sum_of_products(op, nodes, letters, output.replace("...", "012345"[6 - longest :]))


def _sum_of_products(
    op: Operation, nodes: Sequence[Any], letters: Sequence[str], output: str
) -> Fields:
    """Return the fields of a sum of products, in the notation of ``einsum``.

    Args:
        op: The operation.
        nodes: Its factors.
        letters: A letter for each dimension of each of them.
        output: Letters of the output; the sum goes over the others.
    """
    space = "".join(sorted({*"".join(letters)}))
    operands = []
    for node, own in zip(nodes, letters, strict=True):
        sizes = dict(zip(own, shape_of(node), strict=True))
        shape = [sizes.get(letter, 1) for letter in space]
        order = sorted(range(len(own)), key=own.__getitem__)
        fields = [
            labels.permute(order).reshape(
                [labels.shape[own.index(letter)] if letter in own else 1 for letter in space]
            )
            for labels in op.fields(node)
        ]
        operands.append((fields, shape))
    over = {dim for dim, letter in enumerate(space) if letter not in output}
    zero = any(
        op.vanishes(node) and over <= {space.index(letter) for letter in own}
        for node, own in zip(nodes, letters, strict=True)
    )
    left = op.labels.fix_along(op.labels.sum(op.labels.merge(operands), over, zero), over)
    kept = [space.index(letter) for letter in output]
    return [labels.permute([*kept, *over]).flatten(len(kept)).squeeze(-1) for labels in left]


def attention(op: Operation) -> Fields:
    nodes = [op["query"], op["key"], op["value"]]
    masks = [op["attn_mask"]] if op["attn_mask"] is not None else []
    shapes = [extent_of(each) for each in nodes + masks]
    fields = [op.fields(each) for each in nodes + masks]
    # A softmax runs over positions, and scores are divided by the root of the size of a head.
    for k, dims in zip(range(len(fields)), ([-2, -1], [-2, -1], [-2], [-2, -1]), strict=False):
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


def recurrent(op: Operation) -> list[Fields]:
    size = 4 if op["has_biases"] else 2  # weights of a layer and direction
    weights = op["params"]
    layers = [weights[k : k + size] for k in range(0, len(weights), size)]
    directions = 2 if op["bidirectional"] else 1
    if len(layers) != op["num_layers"] * directions or 1 in shape_of(weights[1]):
        return [op.fix_all()] * 3  # projections, or a single unit
    inputs = op.fields(op["input"])
    (first,) = along(op.fields(weights[1]), 1)
    _states(op, first)
    for k in range(0, len(layers), directions):
        for own in layers[k : k + directions]:
            op.labels.unite(_gates(op, inputs, own), first)  # one size for all
        inputs = [placed(first.repeat(directions), 2, 3)]
    states = [placed(first, 2, 3)]
    return [inputs, states, states]


def recurrent_cell(op: Operation) -> Any:
    weights = [op[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if op[name] is not None]
    if 1 in shape_of(weights[1]):
        return [op.fix_all()] * 2 if op.name == "lstm_cell" else op.fix_all()
    hidden = _gates(op, op.fields(op["input"]), weights)
    _states(op, hidden)
    dims = len(shape_of(op["input"]))
    fields = [placed(hidden, dims - 1, dims)]
    return [fields] * 2 if op.name == "lstm_cell" else fields


def _gates(op: Operation, inputs: Fields, weights: Sequence[Any]) -> Tensor:
    """Unite what a hidden unit has in the weights of one layer, and return the units' labels."""
    (hidden,) = along(op.fields(weights[1]), 1)
    for weight in weights:
        (rows,) = along(op.fields(weight), 0)
        op.labels.unite(rows.view(-1, len(hidden)), hidden)
    dim = len(shape_of(op["input"])) - 1
    left, _ = op.labels.contract(inputs, dim, op.fields(weights[0])[1:], 1)
    op.labels.fix(*left)
    return hidden


def _states(op: Operation, hidden: Tensor) -> None:
    """Unite hidden units with those of the states to begin with."""
    for state in op["hx"] if isinstance(op["hx"], list | tuple) else [op["hx"]]:
        for labels in op.labels.fix_along(op.fields(state), range(len(shape_of(state)) - 1)):
            op.labels.unite(labels.flatten(), hidden)


def grouped(op: Operation) -> Fields:
    """Each row is multiplied by the matrix of its own group, such as an expert."""
    rows, weight = op.fields(op.node.args[0]), op.fields(op.node.args[1])
    weight = op.labels.fix_along(weight, [0])
    left, columns = op.labels.contract(rows, 1, weight, 1)
    return left + [placed(labels, 1, 2) for labels in along(columns, 2)]
