r"""The metric of errors: how much a module's outputs change with the product of a weight.

An error ``e`` of a layer's output ``y`` changes the outputs ``f`` of the module by ``J e``, with
``J`` their derivative by ``y``. What this costs, to second order, is ``e^T G e`` with the mean of
``G = J^T F J`` over examples and positions. ``F`` is the curvature of how outputs are compared: the
identity for squared errors; for logits the Fisher information ``diag(p) - p p^T``, with
probabilities ``p = softmax(f)``. For random ``z`` with ``mean z z^T = F``, gradients ``g`` of
``z^T f`` have the second moment ``G``, so that one backward pass for each batch gives it for all
layers: random signs for squared errors (Hutchinson, 1989), and ``p`` less a one-hot vector drawn
from ``p`` for logits. With the second moment of a layer's inputs this is the Kronecker-factored
curvature of the outputs (Martens and Grosse, 2015). No labels are needed.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.repair.batches import Batch, compared
from fitsmall.compressors.repair.inputs import EMBEDDINGS, MATRIX_PRODUCTS, Watch

__all__ = ["output_metrics", "squared_gradients"]

# Outputs of a layer up to which the whole matrix is kept; of more, its diagonal.
_LARGEST = 1024

_TINY = 1e-30


def output_metrics(
    module: nn.Module, weights: Collection[Tensor], batches: Sequence[Batch]
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """Return the metrics ``G`` of the products of weights, and of the rows read of embeddings.

    Args:
        module: Module in evaluation mode. Afterwards its parameters ask for gradients, and have
            none.
        weights: Parameters of it.
        batches: Data.

    Returns:
        For each weight that is multiplied, a tensor of shape ``(groups, k, k)``, where each group
        has ``k`` outputs; or the diagonals, of shape ``(groups, k)``, where ``k`` is above 1,024.
        For each embedding one of shape ``(1, n, n)``, with the length ``n`` of its rows. Weights on
        which no output depends by a derivative are missing.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> net[1].weight.data = torch.tensor([[1.0, 2.0]])
        >>> products, _ = output_metrics(net, [net[0].weight], [Batch((torch.ones(5, 3),), {})])
        >>> metric = products[net[0].weight]
        >>> metric / metric[0, 0, 0]
        tensor([[[1., 2.],
                 [2., 4.]]], dtype=torch.float64)
    """
    products: dict[Tensor, Tensor] = {}
    reads: dict[Tensor, Tensor] = {}
    functions: dict[Tensor, tuple[Any, int]] = {}

    def before(function: Any, weight: Tensor, named: Any) -> None:
        if weight in chosen:
            functions[weight] = function, int(named.get("groups", 1))

    def after(weight: Tensor, output: Tensor) -> None:
        if weight not in chosen or not output.requires_grad:
            return
        function, groups = functions[weight]
        found = reads if function in EMBEDDINGS else products
        channels = -1 if function in EMBEDDINGS + MATRIX_PRODUCTS else 1 - weight.dim()

        def add(gradient: Tensor) -> None:
            rows = gradient.double().movedim(channels, -1).reshape(-1, gradient.shape[channels])
            rows = rows.unflatten(-1, (groups, -1)).movedim(1, 0)
            small = rows.shape[-1] <= _LARGEST
            moment = rows.mT @ rows if small else rows.square().sum(1)
            found[weight] = found[weight] + moment if weight in found else moment

        output.register_hook(add)

    chosen = set(weights)
    for _ in _backward_passes(module, batches, Watch(before, after)):
        pass
    return products, reads


def squared_gradients(module: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the diagonal of the curvature of the outputs by each parameter, a sum over examples.

    It is found in gradients of whole batches: with random ``z`` for each example, products of two
    examples vanish on average.

    Args:
        module: Module in evaluation mode. Afterwards its parameters ask for gradients, and have
            none.
        batches: Data.

    Returns:
        Tensors by name; parameters on which no output depends by a derivative are missing.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> found = squared_gradients(net, [Batch((torch.tensor([[1.0, 3.0]]),), {})])["weight"]
        >>> (found / found[0, 0]).round()
        tensor([[1., 9.]])
    """
    found: dict[str, Tensor] = {}
    for _ in _backward_passes(module, batches, nullcontext()):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                squares = parameter.grad.to_dense().float().square()
                found[name] = found[name] + squares if name in found else squares
    return found


def _backward_passes(
    module: nn.Module, batches: Sequence[Batch], watch: AbstractContextManager[Any]
) -> Iterator[None]:
    """Yield after the backward pass of each batch, from random ``z`` at the outputs."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    # The kernels of cuDNN for recurrent layers have no backward pass in evaluation mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        for batch in batches:
            with watch:
                outputs = batch.call(module)
            found = [pair for pair in compared(module, batch, outputs) if pair[0].requires_grad]
            if found:
                drawn = [_drawn(output.detach(), logits, generator) for output, logits in found]
                torch.autograd.backward([output for output, _ in found], drawn)
            yield
            module.zero_grad(set_to_none=True)


def _drawn(output: Tensor, logits: int | None, generator: torch.Generator) -> Tensor:
    """Return random ``z`` whose second moment is the curvature of how an output is compared."""
    noise = torch.rand(output.shape, generator=generator).to(output.device)
    if logits is None:
        signs = (noise < 0.5).to(output.dtype) * 2 - 1
        output = output.masked_fill(output.isinf(), 0)
        norm: Tensor = torch.linalg.vector_norm(output).clamp_min(_TINY)
        return signs / norm
    gumbel = -(-noise.clamp_min(_TINY).log()).clamp_min(_TINY).log()
    drawn = (output + gumbel).argmax(logits, keepdim=True)  # from the probabilities
    score: Tensor = output.softmax(logits)
    score.scatter_add_(logits, drawn, score.new_full(drawn.shape, -1.0))
    return score
