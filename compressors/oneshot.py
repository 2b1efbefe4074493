"""Compression without training: compress a trained module in place, and restore a file."""

import logging
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.codes.code import Code
from fitsmall.compressors.file.reader import entries, load
from fitsmall.compressors.file.schema import CODER_NAMES
from fitsmall.compressors.file.sizes import bytes_of, dense_bytes
from fitsmall.compressors.naming import abridged, grouped, lookup
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.repair.batches import batches_of
from fitsmall.compressors.repair.layers import repair
from fitsmall.compressors.select import FROZEN, Selection, match, select
from fitsmall.compressors.sized import compress_to
from fitsmall.compressors.surgery.kinds import surgeries
from fitsmall.compressors.surgery.legacy import with_marks
from fitsmall.compressors.surgery.protocol import Layout, Surgery, TensorSpec, layout_of
from fitsmall.compressors.torch_internals import require

__all__ = ["compress", "restore"]

Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")

LOGGER = logging.getLogger("fitsmall")


def compress(
    module: nn.Module,
    plan: Projection | Mapping[str, Projection] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    data: Iterable[Any] | None = None,
    activation_bits: int | None = None,
    size: float | str | None = None,
    coder: str = "context",
) -> dict[str, Code]:
    """Compress a trained module in place without training, and return the codes of its weights.

    ::

        compress(net, TopK(0.7) | KMeans(16), data=loader)
        compress(net, size=1/10, data=loader)
        save("net.fitsmall", net.state_dict())

    Without data, each weight is projected: next to it comes a module of other outputs. With data,
    layer by layer, the weights that the projection allows are fitted to the layer's own outputs
    (:mod:`~fitsmall.compressors.repair.surgeon`), biases are corrected, and batch-norms get new
    statistics; then codebooks, biases and norms are tuned together, so that the module's outputs
    come closest to its own before. Weights that see no such data, as those of recurrent layers, are
    projected, and a warning names them. It takes two forward passes for each layer and some hundred
    for the whole, and no labels. Frozen parameters stay as they are.

    With a size instead of a plan, one price of a bit decides about zeros and levels of all
    parameters, biases and norms included (:mod:`~fitsmall.compressors.repair.priced`), and the
    price is found by which the file, really coded, takes 99 to 100 % of the size; less if
    254 levels of each tensor take less. Running statistics are rounded to bfloat16.

    Args:
        module: Module whose weights are replaced by their projection.
        plan: One projection for all selected parameters, or projections by pattern of parameter
            names. The last pattern that matches counts; parameters without one stay as they are.
        include: See :func:`~fitsmall.compressors.select`. With a size the default is everything.
        exclude: See :func:`~fitsmall.compressors.select`.
        data: Batches like those of training: tensors, tuples or lists whose first entry is the
            input, or dictionaries of arguments. The first 1,024 examples are used.
        activation_bits: Bits of the inputs of the layers, 2 to 8, or None to leave them as they
            are: post-training quantization, with ranges calibrated on the data.
        size: Most bytes of the file, instead of a plan: a fraction of those of the module's state
            dict, such as ``1/20``, or text with a unit, such as ``"40 KB"``.
        coder: Coder of the file, see :func:`~fitsmall.compressors.save`.

    Raises:
        ValueError: A pattern matches nothing, a weight or its inputs hold NaN, the module cannot
            take the data, inputs are to be rounded without data, or the size cannot be reached.
        TypeError: The plan is neither a projection nor a mapping, the data are no batches, or the
            module cannot be copied.

    Example:
        >>> from fitsmall.compressors import TopK
        >>> net = nn.Linear(4, 5)
        >>> codes = compress(net, TopK(sparsity=0.75))
        >>> int(net.weight.count_nonzero()), list(codes)
        (5, ['weight'])
    """
    if size is not None:
        return _compress_to(module, plan, include, exclude, data, activation_bits, size, coder)
    by_pattern = {"*": plan} if isinstance(plan, Projection) else plan
    if not isinstance(by_pattern, Mapping) or not all(
        isinstance(each, Projection) for each in by_pattern.values()
    ):
        raise TypeError(
            "compress takes a Projection, such as TopK(0.9), a mapping from patterns to "
            f"projections, or a size=1/20, and got {plan!r}"
        )
    selection = select(module, include, exclude)
    chosen = _without_frozen(selection)
    projections = {
        name: projection.along(selection.forms[name])
        for name, projection in match(by_pattern, list(chosen)).items()
    }
    if data is not None:
        device = next(iter(chosen.values())).device
        batches = batches_of(data, device)
        codes, reasons = repair(
            module, chosen, projections, selection.forms, batches, activation_bits
        )
        if reasons:
            _warn_of_projected(reasons)
        return codes
    if activation_bits is not None:
        raise ValueError("activation_bits needs data=..., to find the ranges of inputs")
    warnings.warn(
        "compress: nothing makes up for what is removed, and accuracy may fall: give it some "
        "hundred inputs, data=loader, or fine-tune afterwards",
        stacklevel=2,
    )
    codes = {}
    for name, projection in projections.items():
        try:
            codes[name] = projection.encode(chosen[name].detach())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    with torch.no_grad():
        for name, code in codes.items():
            chosen[name].copy_(code.decode())
    return codes


def _compress_to(
    module: nn.Module,
    plan: object,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    data: Iterable[Any] | None,
    activation_bits: int | None,
    size: float | str,
    coder: str,
) -> dict[str, Code]:
    """Compress a module until its file has a size."""
    if plan is not None or activation_bits is not None:
        other = "a plan" if plan is not None else "activation_bits"
        raise ValueError(f"compress: a size finds bits and zeros by itself: leave out {other}")
    if data is None:
        raise ValueError(
            "compress: size needs data=..., some hundred inputs, to find what a weight is worth"
        )
    lookup("coder", coder, {name: name for name in CODER_NAMES})
    selection = select(module, "*" if include is None else include, exclude)
    chosen = _without_frozen(selection, stacklevel=4)
    for name, parameter in chosen.items():
        if not parameter.isfinite().all():
            raise ValueError(f"{name}: cannot cluster NaN or infinity: did training diverge?")
    most = bytes_of(size, dense_bytes(module), "compress")
    batches = batches_of(data, next(iter(chosen.values())).device)
    return compress_to(module, chosen, selection.forms, batches, most, coder)


def _without_frozen(selection: Selection, stacklevel: int = 3) -> Mapping[str, nn.Parameter]:
    """Return the selected parameters, and warn of frozen ones, which stay as they are."""
    chosen = Selection(selection.chosen, selection.skipped).checked().chosen
    if frozen := [name for name, reason in selection.skipped.items() if reason == FROZEN]:
        patterns = abridged([pattern for pattern, _ in grouped(frozen)])
        warnings.warn(
            f"compress: {patterns} are frozen and stay as they are: make them trainable with "
            "requires_grad_(True), or name them in exclude=[...]",
            stacklevel=stacklevel,
        )
    return chosen


def _warn_of_projected(reasons: Mapping[str, str]) -> None:
    """Warn of weights that were not fitted to data; each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    listed = (f"{', '.join(found)} ({reason})" for reason, found in names.items())
    warnings.warn(
        f"compress: not fitted to data, but projected as they are: {'; '.join(listed)}",
        stacklevel=3,
    )


def restore(module: Module, path: str | os.PathLike[str]) -> Module:
    """Load a file into a module of the plain class, bit for bit, and return the module.

    Layers that training changed are changed again: factored layers are replaced, and quantized
    inputs get their quantizers. The file of a LightningModule also goes into the bare network that
    it wraps, and the file of a network into a module that only wraps it; the logger ``fitsmall``
    says so. The file's directory is checked first, before memory is allocated:
    a file that does not fit raises an error and leaves the module as it is.

    Args:
        module: Module of the class that was trained, with its original layers; or the network in
            it, or a module that wraps it.
        path: The file.

    Raises:
        TypeError: The first argument is no module.
        ValueError: The file is damaged, or its tensors do not fit the module.

    Example:
        >>> import tempfile
        >>> from fitsmall.compressors import save
        >>> net, path = nn.Linear(2, 2), f"{tempfile.mkdtemp()}/net.fitsmall"
        >>> size = save(path, net.state_dict())
        >>> torch.equal(restore(nn.Linear(2, 2), path).weight, net.weight)
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "restore takes a module and then a file, as in restore(MyModule(), path), and got "
            f"{module!r} first"
        )
    require("restore")
    _, directory = entries(path)
    held = {entry.name: TensorSpec(torch.Size(entry.shape), entry.dtype) for entry in directory}
    try:
        part, prefix, changes = _find_place(module, held)
        # The directory fits the module, so that its tensors need no more memory than the module's,
        # or a few times as much with the parts of sums and products.
        size = sum(spec.shape.numel() * spec.dtype.itemsize for spec in held.values())
        loaded = _without(prefix, load(path, limit=4 * size))
        tensors = with_marks(loaded, layout_of(part.state_dict()), lambda mark: mark)
        for surgery in changes:
            surgery.check_values(tensors)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {error}") from error
    for surgery in changes:
        surgery.replay(part)
    part.load_state_dict(tensors)
    return module


def _find_place(module: nn.Module, held: Layout) -> tuple[nn.Module, str, list[Surgery]]:
    """Return the part of a module that a file is for.

    It is the module itself; or, if all names in the file begin with the name of a wrapper, the
    wrapped module; or, if those of the module do, the part that it wraps.

    Args:
        module: The module.
        held: Layout of the file.

    Returns:
        The part, the beginning of the file's names, and the surgeries that the part needs.

    Raises:
        ValueError: The file is for no part of the module.
    """
    try:
        return module, "", _changes(module, held)
    except ValueError as error:
        reasons = error
    tensors = _tensors_of(module)
    for prefix in _prefixes(held):
        with suppress(ValueError):
            changes = _changes(module, _without(prefix, held))
            LOGGER.info(
                f"restore: the file is of a module that wraps {type(module).__name__} as "
                f"{prefix[:-1]!r}: its tensors are taken without this prefix"
            )
            return module, prefix, changes
    for prefix in _prefixes(tensors):
        with suppress(ValueError, AttributeError):  # hooks may give tensors any names
            part = module.get_submodule(prefix[:-1])
            changes = _changes(part, held)
            LOGGER.info(
                f"restore: the file is of a {type(part).__name__} as {type(module).__name__} has "
                f"one in {prefix[:-1]!r}: its tensors are put there"
            )
            return part, "", changes
    raise reasons


def _changes(module: nn.Module, held: Layout) -> list[Surgery]:
    """Return the surgeries that give a module a state dict of this layout.

    Raises:
        ValueError: There are none; the error tells all differences.
    """
    plain = layout_of(_tensors_of(module))
    stored = with_marks(held, plain, lambda mark: TensorSpec(mark.shape, mark.dtype))
    changes, expected = surgeries(stored), plain
    for surgery in changes:
        expected = surgery.expect(module, expected)
    if problems := _differences(stored, expected):
        more = [f"and {len(problems) - 9:,} more"] if len(problems) > 9 else []
        raise ValueError("; ".join(problems[:9] + more))
    return changes


def _prefixes(names: Collection[str]) -> list[str]:
    """Return the prefixes, ending in a dot, that all names have, the shortest first."""
    parts = next(iter(names), "").split(".")
    prefixes = [".".join([*parts[:n], ""]) for n in range(1, len(parts))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]


def _without(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


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
