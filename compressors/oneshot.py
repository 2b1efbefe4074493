"""Compression without a Trainer: project a trained module in place, and put a file back."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fitsmall.compressors.codes import Code
from fitsmall.compressors.file.reader import MIN_LIMIT, load
from fitsmall.compressors.projections import Projection
from fitsmall.compressors.quantize import QUANTIZER, attach_quantizer
from fitsmall.compressors.select import Selection, match, select
from fitsmall.compressors.surgery.factors import attach_factors

__all__ = ["attach_saved", "compress", "restore"]

Module = TypeVar("Module", bound=nn.Module)


def compress(
    module: nn.Module,
    plan: Projection | Mapping[str, Projection],
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, Code]:
    """Project the weights of a trained module in place, and return their codes by name.

    ::

        compress(net, TopK(0.9) | KMeans(16))
        save("net.fitsmall", net.state_dict())

    Args:
        module: Module whose weights are replaced by their projection.
        plan: One projection for all selected parameters, or projections by pattern; of several
            patterns that match, the last counts, and parameters without one stay as they are.
        include: See :func:`~fitsmall.compressors.select`.
        exclude: See :func:`~fitsmall.compressors.select`.

    Raises:
        ValueError: A pattern matches nothing, or a weight holds NaN.

    Example:
        >>> from fitsmall.compressors import TopK
        >>> net = nn.Linear(4, 5)
        >>> codes = compress(net, TopK(sparsity=0.75))
        >>> int(net.weight.count_nonzero()), list(codes)
        (5, ['weight'])
    """
    selection = select(module, include, exclude)
    # Nothing is waited for: what is frozen now is left out.
    chosen = Selection(selection.chosen, selection.skipped).checked().chosen
    by_pattern = {"*": plan} if isinstance(plan, Projection) else plan
    codes = {}
    for name, projection in match(by_pattern, list(chosen)).items():
        try:
            codes[name] = projection.encode(chosen[name].detach())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    with torch.no_grad():
        for name, code in codes.items():
            chosen[name].copy_(code.decode())
    return codes


def restore(module: Module, path: str | os.PathLike[str]) -> Module:
    """Put the weights of a file into a module of the plain class, bit for bit, and return it.

    Layers whose inputs were quantized in training get their quantizers back, and layers that became
    two become two.

    Raises:
        ValueError: The file is damaged, or holds other tensors than the module.

    Example:
        >>> import tempfile
        >>> from fitsmall.compressors import save
        >>> net, path = nn.Linear(2, 2), f"{tempfile.mkdtemp()}/net.fitsmall"
        >>> size = save(path, net.state_dict())
        >>> torch.equal(restore(nn.Linear(2, 2), path).weight, net.weight)
        True
    """
    expected = module.state_dict()
    # What the module itself takes is no more than its owner can afford; twice, for names it lacks.
    limit = 2 * sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    tensors = load(path, max(limit, MIN_LIMIT))
    attach_factors(module, tensors)
    attach_saved(module, tensors)
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name} is not in the module")
        elif tensor.shape != expected[name].shape:
            found, wanted = tuple(tensor.shape), tuple(expected[name].shape)
            problems.append(f"{name} has shape {found}, the module wants {wanted}")
        elif tensor.dtype != expected[name].dtype:
            problems.append(f"{name} is {tensor.dtype}, the module wants {expected[name].dtype}")
    if problems:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(tensors)
    return module


def attach_saved(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give layers the quantizers of their inputs that a state dict has."""
    layers = dict(module.named_modules())
    for name, bits in tensors.items():
        layer, found, rest = name.rpartition(f"{QUANTIZER}.bits")
        if not found or rest or (layer := layer.removesuffix(".")) not in layers:
            continue
        if any(True for _ in layers[layer].parameters(recurse=False)):
            attach_quantizer(layers[layer], int(bits))
