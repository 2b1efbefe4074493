"""Compression without training: project a trained module in place, and restore a file."""

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.codes import Code
from fitsmall.compressors.file.reader import entries, load
from fitsmall.compressors.projections import Projection
from fitsmall.compressors.select import Selection, match, select
from fitsmall.compressors.surgery.kinds import surgeries
from fitsmall.compressors.surgery.legacy import with_marks
from fitsmall.compressors.surgery.protocol import Layout, TensorSpec, layout_of
from fitsmall.compressors.torch_internals import require

__all__ = ["compress", "restore"]

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
        plan: One projection for all selected parameters, or projections by pattern of parameter
            names. The last pattern that matches counts; parameters without one stay as they are.
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
    # Without training, frozen parameters stay frozen: they are left out.
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
    """Load a file into a module of the plain class, bit for bit, and return the module.

    Layers that training changed are changed again: factored layers are replaced, and quantized
    inputs get their quantizers. The file's directory is checked first, before memory is allocated:
    a file that does not fit raises an error and leaves the module as it is.

    Args:
        module: Module of the class that was trained, with its original layers.
        path: The file.

    Raises:
        ValueError: The file is damaged, or its tensors do not fit the module.

    Example:
        >>> import tempfile
        >>> from fitsmall.compressors import save
        >>> net, path = nn.Linear(2, 2), f"{tempfile.mkdtemp()}/net.fitsmall"
        >>> size = save(path, net.state_dict())
        >>> torch.equal(restore(nn.Linear(2, 2), path).weight, net.weight)
        True
    """
    require("restore")
    _, directory = entries(path)
    held = {entry.name: TensorSpec(torch.Size(entry.shape), entry.dtype) for entry in directory}
    plain = layout_of(_tensors_of(module))
    stored = with_marks(held, plain, lambda mark: TensorSpec(mark.shape, mark.dtype))
    try:
        changes, expected = surgeries(stored), plain
        for surgery in changes:
            expected = surgery.expect(module, expected)
        if problems := _differences(stored, expected):
            more = [f"and {len(problems) - 9:,} more"] if len(problems) > 9 else []
            raise ValueError("; ".join(problems[:9] + more))
        # The directory fits the module, so that its tensors need no more memory than the module's,
        # or a few times as much with the parts of sums and products.
        size = sum(spec.shape.numel() * spec.dtype.itemsize for spec in held.values())
        tensors = with_marks(load(path, limit=4 * size), plain, lambda mark: mark)
        for surgery in changes:
            surgery.check_values(tensors)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {error}") from error
    for surgery in changes:
        surgery.replay(module)
    module.load_state_dict(tensors)
    return module


def _differences(stored: Layout, expected: Layout) -> list[str]:
    """Return the reasons why a file does not fit a module, one for each tensor."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, (shape, dtype) in stored.items():
        if name not in expected:
            problems.append(f"{name} is not in the module")
        elif shape != expected[name].shape:
            wanted = tuple(expected[name].shape)
            problems.append(f"{name} has shape {tuple(shape)}, the module wants {wanted}")
        elif dtype != expected[name].dtype:
            problems.append(f"{name} is {dtype}, the module wants {expected[name].dtype}")
    return problems


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module that a file can be put into."""
    tensors: dict[str, Tensor] = module.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} of {type(module).__name__} is a {type(value).__name__}, and a file holds "
                "tensors alone"
            )
        if is_lazy(value):
            raise ValueError(
                f"{name} of {type(module).__name__} is not initialised: run the module once before"
            )
    return tensors
