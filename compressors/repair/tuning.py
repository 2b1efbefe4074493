"""Tuning: numbers that cost next to no bytes, fitted together to the outputs of the whole network.

Codebooks, biases and norms are few, and act on everything. After all layers are compressed, steps
of Adam move them so that the network's outputs come closest to its own before (as Egiazarian et
al., 2024, "AQLM", and van Baalen et al., 2024, "GPTVQ", do for codebooks). Which weights are zero,
and which share a value, stays as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fitsmall.compressors.repair.batches import Batch, compared

__all__ = ["divergence", "tune"]

# Steps, and the change of a number in a step as a fraction of the root mean square of its tensor.
_STEPS, _RATE = 128, 0.01

_TINY = 1e-30


def divergence(outputs: Sequence[Tensor], others: Sequence[tuple[Tensor, int | None]]) -> Tensor:
    """Return how far outputs are from others.

    For logits it is the mean Kullback-Leibler divergence in nats; for others the squared error as a
    fraction of the squares. Where others are infinite, as masked logits, nothing counts.

    Args:
        outputs: Outputs.
        others: The others, each with its dimension of logits, or None.

    Example:
        >>> divergence([torch.tensor([1.0, 1.0])], [(torch.tensor([1.0, 2.0]), None)])
        tensor(0.2000)
        >>> divergence([torch.zeros(1, 2)], [(torch.tensor([[0.0, 50.0]]), 1)])  # log 2
        tensor(0.6931)
    """
    terms = []
    for output, (other, logits) in zip(outputs, others, strict=True):
        output, other = _exact(output), _exact(other)
        infinite = other.isinf()
        if logits is None:
            squares = (output - other).square().masked_fill(infinite, 0).sum()
            norm = other.masked_fill(infinite, 0).square().sum().clamp_min(_TINY)
            terms.append(squares / norm)
        else:
            p, q = other.log_softmax(logits), output.log_softmax(logits)
            terms.append((p.exp() * (p - q)).masked_fill(infinite, 0).sum(logits).mean())
    return torch.stack(terms).sum()


def tune(
    module: nn.Module,
    original: nn.Module,
    free: Mapping[str, nn.Parameter],
    shared: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
) -> None:
    """Tune parameters of a compressed module in place, if that brings it closer to the original.

    Args:
        module: The module, in evaluation mode.
        original: The module before compression, in evaluation mode.
        free: Parameters by name whose numbers are free.
        shared: Parameters by name whose equal numbers stay equal, and zeros zero.
        batches: Data.
    """
    numbers = {name: _exact(parameter.detach().clone()) for name, parameter in free.items()}
    places: dict[str, Tensor] = {}
    for name, parameter in shared.items():
        numbers[name], places[name] = _exact(parameter.detach()).unique(return_inverse=True)
    if not numbers:
        return
    fixed = {name: numbers[name] == 0 for name in shared}
    # Each place of a parameter once: a layer with two names would not get its parameters back.
    names: dict[Tensor, str] = {p: name for name, p in {**free, **shared}.items()}
    dtypes = {name: parameter.dtype for parameter, name in names.items()}
    held = {
        place: names[parameter]
        for path, layer in module.named_modules()
        for place, parameter in layer.named_parameters(path, recurse=False, remove_duplicate=False)
        if parameter in names
    }

    def parameters() -> dict[str, Tensor]:
        return {
            name: values.masked_fill(fixed[name], 0)[places[name]] if name in shared else values
            for name, values in numbers.items()
        }

    def error(batch: Batch, values: dict[str, Tensor]) -> Tensor | None:
        with torch.no_grad():
            expected = compared(original, batch, batch.call(original))
        found = torch.func.functional_call(
            module,
            {place: values[name].to(dtypes[name]) for place, name in held.items()},
            *batch.copied(),
            tie_weights=False,
        )
        outputs = [output for output, _ in compared(module, batch, found)]
        shapes = [output.shape for output in outputs]
        if not shapes or shapes != [output.shape for output, _ in expected]:
            return None  # nothing to compare, or the data take another path
        return divergence(outputs, expected)

    before = _total(error, batches, parameters())
    groups = [
        {"params": [values.requires_grad_()], "lr": _RATE * max(float(_rms(values)), 1e-3)}
        for values in numbers.values()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(0)
    left: list[int] = []
    cudnn = torch.backends.cudnn.flags(enabled=False)
    with torch.enable_grad(), cudnn, _dense_gradients(module):
        for _ in range(_STEPS):
            left = left or torch.randperm(len(batches), generator=generator).tolist()
            loss = error(batches[left.pop()], parameters())
            if loss is not None and loss.requires_grad:
                # Gradients of these numbers alone: those of the module's parameters are the user's.
                values = [*numbers.values()]
                gradients = torch.autograd.grad(loss, values, allow_unused=True)
                for value, gradient in zip(values, gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        found = parameters()
        if _total(error, batches, found) < before:
            for name, parameter in {**free, **shared}.items():
                parameter.copy_(found[name])


@contextmanager
def _dense_gradients(module: nn.Module) -> Iterator[None]:
    """Let embeddings have dense gradients for a while."""
    layers = [m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    sparse = [layer for layer in layers if layer.sparse]
    for layer in sparse:
        layer.sparse = False
    try:
        yield
    finally:
        for layer in sparse:
            layer.sparse = True


@torch.no_grad()
def _total(
    error: Callable[[Batch, dict[str, Tensor]], Tensor | None],
    batches: Sequence[Batch],
    values: dict[str, Tensor],
) -> float:
    return sum(float(e) for batch in batches if (e := error(batch, values)) is not None)


def _exact(tensor: Tensor) -> Tensor:
    """Return numbers of half precision in single precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _rms(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square().mean().sqrt()
