"""A trained network whose file has a given size, fitted to data without training.

At one price of a bit every matrix is fitted to its layer's outputs
(:mod:`~fitsmall.compressors.repair.priced`), and biases, norms and what sees no data are clustered
by the curvature of the network's outputs. The price is corrected until the file, really coded, is
just below its size.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.clusterings import CODEBOOK_DTYPE, clustered, decoded
from fitsmall.compressors.choices.entropy_constrained import price_within
from fitsmall.compressors.codes.code import Code
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.repair.batches import Batch
from fitsmall.compressors.repair.layers import metrics_of, repair, tune_shared
from fitsmall.compressors.repair.metric import squared_gradients
from fitsmall.compressors.repair.priced import Priced
from fitsmall.compressors.torch_internals import evaluating
from fitsmall.compressors.weights import Matrices, is_statistic, twin_of

__all__ = ["compress_to", "curvatures"]

LOGGER = logging.getLogger("fitsmall")

# Part of the size that the file may leave, and the number of prices that are tried for it.
_TOLERANCE, _TRIES = 0.01, 8
# Where tuning made it too large, the price of biases and norms rises by this factor.
_DEARER = 1.5


def curvatures(
    module: nn.Module, names: Collection[str], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Return how much the outputs' loss bends along each weight, a sum over examples.

    Half of it is the mean of the weight's tensor. A tensor that no output depends on in these data
    has the mean of all others.

    Args:
        module: The module.
        names: Names of parameters.
        batches: Data.

    Raises:
        ValueError: No output depends on any of them.
    """
    original = twin_of(module).eval()
    found = squared_gradients(original, batches)
    seen = {name: found[name] for name in names if name in found and bool(found[name].any())}
    if not seen:
        raise ValueError(
            f"no output of {type(module).__name__} depends on its weights in these data"
        )
    total = sum(float(each.sum(dtype=torch.float64)) for each in seen.values())
    mean = total / sum(each.numel() for each in seen.values())
    return {
        name: seen[name] + seen[name].mean()
        if name in seen
        else torch.full(original.get_parameter(name).shape, mean)
        for name in names
    }


@torch.no_grad()
def compress_to(
    module: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    forms: Mapping[str, Matrices],
    batches: list[Batch],
    size: int,
    coder: str,
) -> dict[str, Code]:
    """Compress a module in place until its file has a size.

    Args:
        module: The module.
        chosen: Parameters by name.
        forms: Dimensions of each of them.
        batches: Data.
        size: Most bytes of the file.
        coder: Coder of the file.

    Returns:
        Codes by name.

    Raises:
        ValueError: The size cannot be reached, or the module cannot take the data.
    """
    work = _Sized(module, chosen, forms, batches)
    others = work.least(coder)
    if others >= size:
        raise ValueError(
            f"compress: a file of {size:,} bytes cannot be reached: with every selected weight at "
            f"zero it takes {others:,}; ask for more, or act on more parameters"
        )

    def bits(price: float) -> float:
        weights = {name: module.get_parameter(name) for name in chosen}
        return sum(clustered(w, work.curvatures[n], price).bits for n, w in weights.items())

    best: _Attempt | None = None

    def reached(price: float) -> int:
        nonlocal best
        found = work.at(price, coder)
        LOGGER.info(f"compress: {found.size:,} bytes at a price of {price:.3g} a bit, of {size:,}")
        if found.size <= size and (best is None or found.size > best.size):
            best = found
        return found.size

    near = price_within(bits, 8 * (size - others))
    price = price_within(reached, size, near, _TOLERANCE, _TRIES)
    assert best is not None
    untuned = {name: tensor.clone() for name, tensor in best.module.state_dict().items()}
    work.tune_(best)
    for _ in range(_TRIES):
        work.cluster_(best, price)
        if coded_size(best.module.state_dict(), coder) <= size:
            break
        price *= _DEARER
    else:
        best.module.load_state_dict(untuned)
    module.load_state_dict(best.module.state_dict())
    return {name: exact(module.get_parameter(name).detach()) for name in chosen}


@dataclass
class _Attempt:
    """A compressed copy of a module.

    Args:
        module: The copy.
        floats: What was not fitted to data, before it was clustered.
        fitted: Names of the parameters that were.
        size: Bytes of the file.
    """

    module: nn.Module
    floats: dict[str, Tensor]
    fitted: Collection[str]
    size: int


class _Sized:
    """A module, its curvature, and what it becomes at a price."""

    def __init__(
        self,
        module: nn.Module,
        chosen: Mapping[str, nn.Parameter],
        forms: Mapping[str, Matrices],
        batches: list[Batch],
    ) -> None:
        self.module, self.names, self.forms, self.batches = module, [*chosen], forms, batches
        self.curvatures = curvatures(module, self.names, batches)
        matrices = [name for name in self.names if module.get_parameter(name).dim() > 1]
        self.metrics = metrics_of(module, matrices, batches)

    def least(self, coder: str) -> int:
        """Return the bytes of the file with every chosen parameter at zero."""
        twin = twin_of(self.module)
        for name in self.names:
            twin.get_parameter(name).zero_()
        _round_statistics_(twin)
        return coded_size(twin.state_dict(), coder)

    def at(self, price: float, coder: str) -> _Attempt:
        """Return a copy that is compressed at a price."""
        twin = twin_of(self.module)
        matrices = {n: p for n in self.names if (p := twin.get_parameter(n)).dim() > 1}
        projections: dict[str, Any] = {
            name: Priced(price, float(self.curvatures[name].sum())) for name in matrices
        }
        codes, reasons = repair(
            twin,
            matrices,
            projections,
            self.forms,
            self.batches,
            activation_bits=None,
            tuned=False,
            metrics=self.metrics,
        )
        _round_statistics_(twin)
        for name in reasons:
            twin.get_parameter(name).copy_(self.module.get_parameter(name))
        fitted = codes.keys() - reasons.keys()
        others = {n: twin.get_parameter(n).clone() for n in self.names if n not in fitted}
        found = _Attempt(twin, others, fitted, 0)
        self.cluster_(found, price)
        found.size = coded_size(twin.state_dict(), coder)
        return found

    def tune_(self, found: _Attempt) -> None:
        """Tune codebooks, biases and norms together."""
        for name, floats in found.floats.items():
            found.module.get_parameter(name).copy_(floats)
        shared = {name: found.module.get_parameter(name) for name in found.fitted}
        original = twin_of(self.module).eval()
        fixed = {name for name, _ in found.module.named_parameters()} - found.floats.keys()
        with evaluating(found.module):
            tune_shared(found.module, original, fixed, shared, self.batches)
        for parameter in shared.values():
            parameter.copy_(parameter.to(CODEBOOK_DTYPE))
        for name in found.floats:
            found.floats[name] = found.module.get_parameter(name).clone()

    def cluster_(self, found: _Attempt, price: float) -> None:
        """Cluster what was not fitted to data."""
        for name, floats in found.floats.items():
            clustering = clustered(floats, self.curvatures[name], price)
            found.module.get_parameter(name).copy_(decoded(clustering).view(floats.shape))


def _round_statistics_(module: nn.Module) -> None:
    """Round running statistics, which are numbers of few digits, to half their bytes."""
    for name, buffer in module.named_buffers():
        if is_statistic(name):
            buffer.copy_(buffer.to(CODEBOOK_DTYPE))
