"""Data for repair: batches of inputs, and the outputs of a network that are compared for them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fitsmall.compressors.torch_internals import map_tensors, tensors_in

__all__ = ["Batch", "batches_of", "compared"]

# Examples that are used; more take longer, and hardly help.
_EXAMPLES = 1024


class Batch(NamedTuple):
    """Arguments of a module.

    Args:
        args: By position.
        kwargs: By name.
        labels: What the loader gives next to the inputs, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any = None

    def copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the arguments, since a forward may change its inputs in place."""
        args, kwargs = map_tensors(Tensor.clone, (self.args, self.kwargs))
        return args, kwargs

    def call(self, module: nn.Module) -> Any:
        """Return what a module returns for it; the batch stays as it is."""
        args, kwargs = self.copied()
        return module(*args, **kwargs)


def batches_of(data: Iterable[Any], device: torch.device) -> list[Batch]:
    """Return the arguments of a module for each batch, until there are 1,024 examples.

    Args:
        data: Batches: tensors, tuples or lists whose first entry is the input, or dictionaries of
            arguments by name.
        device: Device of the module.

    Raises:
        TypeError: The data are no batches.
        ValueError: There are none.

    Example:
        >>> batches_of([(torch.ones(1, 2), "label")], torch.device("cpu"))
        [Batch(args=(tensor([[1., 1.]]),), kwargs={}, labels='label')]
    """
    forms = "a tensor, a tuple or list whose first entry is the input, or a dictionary of arguments"
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is an iterable of batches, such as a DataLoader or [batch], and got a "
            f"{type(data).__name__}; a batch is {forms}"
        )
    batches: list[Batch] = []
    examples = 0
    for given in data:
        first, *others = given if isinstance(given, tuple | list) and given else [given]
        labels = others[0] if others else None
        if isinstance(first, Mapping):
            batch = Batch((), dict(first), labels)
        elif isinstance(first, Tensor):
            batch = Batch((first,), {}, labels)
        else:
            raise TypeError(
                f"batch {len(batches)} of data is a {type(given).__name__}: it is {forms}"
            )
        batches.append(Batch(*map_tensors(lambda tensor: tensor.detach().to(device), tuple(batch))))
        tensors = tensors_in((batch.args, batch.kwargs))
        examples += len(tensors[0]) if tensors and tensors[0].dim() else 1
        if examples >= _EXAMPLES:
            break
    if not batches:
        raise ValueError("data has no batch: is it an iterator that was used before?")
    return batches


def compared(module: nn.Module, batch: Batch, outputs: Any) -> list[tuple[Tensor, int | None]]:
    """Return the outputs of a module that are compared, each with the dimension of its logits.

    An output holds logits where a batch has an integer for each vector of it: labels, or symbols of
    which the module's embedding has as many as the vector has entries. If there are any, they alone
    are compared; else all outputs of floating point.

    Args:
        module: The module.
        batch: A batch.
        outputs: What the module returned for it.

    Returns:
        Outputs, each with its dimension of logits, or None.

    Example:
        >>> batch = Batch((torch.randn(5, 2),), {}, labels=torch.tensor([0, 2, 1, 1, 0]))
        >>> [(_, dimension)] = compared(nn.Linear(2, 3), batch, torch.randn(5, 3))
        >>> dimension
        1
    """
    symbols = {
        layer.num_embeddings for layer in module.modules() if isinstance(layer, nn.Embedding)
    }
    found = [o for o in tensors_in(outputs) if o.is_floating_point() and o.dim() and o.numel()]
    inputs = [t for t in tensors_in((batch.args, batch.kwargs)) if _whole(t)]
    labels = [t for t in tensors_in(batch.labels) if _whole(t)]
    logits: list[tuple[Tensor, int | None]] = []
    for output in found:
        for dimension in dict.fromkeys((output.dim() - 1, min(1, output.dim() - 1))):
            shape, classes = [*output.shape], output.shape[dimension]
            del shape[dimension]
            fitting = [t for t in labels if [*t.shape] == shape and int(t.max()) < classes]
            if classes in symbols:
                fitting += [t for t in inputs if [*t.shape] == shape]
            if fitting and classes > 1:
                logits.append((output, dimension))
                break
    return logits or [(output, None) for output in found]


def _whole(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers."""
    return bool(tensor.numel()) and tensor.dtype in (torch.int64, torch.int32, torch.uint8)
