"""The choice of a kernel for each layer, by measurement."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fitsmall.compressors.export.tracing import Arguments, Examples, outputs_of
from fitsmall.compressors.kernels.layers import SparseLayer, sparse_class
from fitsmall.compressors.timing import interleaved
from fitsmall.compressors.torch_internals import inner_of
from fitsmall.compressors.weights import is_conv1d, is_product, twin_of

__all__ = ["DENSE", "Choice", "Choices", "accelerate"]

DENSE = "dense"

# Rows of a block, by the name of the kernel.
_KERNELS = {"CSR": 1, "BSR 4x1": 4}

# Below this fraction of zeros no kernel was ever faster than the dense one, and none is tried.
_FEWEST_ZEROS = 0.3

# Most time of a kernel to be chosen, as a fraction of the dense kernel's.
_MARGIN = 0.95

# Largest difference of outputs that the order of sums makes, as a fraction of the largest output.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer.

    Args:
        layer: Name of the layer.
        shape: Shape of its weight.
        zeros: Fraction of zeros in the weight.
        input: Shape of its input with this sample.
        seconds: Median time of each kernel that was measured, by its name.
        kernel: Name of the kernel that was chosen.
        reason: Reason why it is the dense one.
    """

    layer: str
    shape: tuple[int, ...]
    zeros: float
    input: tuple[int, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    kernel: str = DENSE
    reason: str = ""


@dataclass(frozen=True)
class Choices:
    """The kernels of a module. They hold for the machine, the threads and the sample measured.

    Args:
        layers: The choice for each layer.
        threads: Threads of torch.
        dense: Median time of the module with dense layers, in seconds.
        accelerated: Median time of the module with the kernels that were chosen.
    """

    layers: tuple[Choice, ...]
    threads: int
    dense: float
    accelerated: float

    @property
    def speedup(self) -> float:
        return self.dense / self.accelerated

    def __str__(self) -> str:
        """Return a line for each layer, times in milliseconds."""
        names = (DENSE, *_KERNELS)
        head = ("layer", "weight", "zeros", "input", *(f"{name}, ms" for name in names), "kernel")
        lines = [head]
        for mine in self.layers:
            times = (f"{1000 * mine.seconds[n]:.3f}" if n in mine.seconds else "" for n in names)
            kernel = f"{mine.kernel}: {mine.reason}" if mine.reason else mine.kernel
            lines.append(
                (mine.layer, _by(mine.shape), f"{mine.zeros:.1%}", _by(mine.input), *times, kernel)
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        total = (
            f"the module: dense {1000 * self.dense:.3f} ms, accelerated "
            f"{1000 * self.accelerated:.3f} ms, {self.speedup:.2f} times as fast; "
            f"threads: {self.threads}"
        )
        return "\n".join([*aligned, total])


@torch.no_grad()
def accelerate(module: nn.Module, sample: Examples) -> nn.Module:
    r"""Return a copy of a module in which layers skip zeros where that was measured to be faster.

    Each Linear, Hugging Face's ``Conv1D`` and convolution is timed at its own input of this sample:

    - *dense*: torch's kernel;
    - *CSR*: single weights. One vector is multiplied by torch's CSR kernel (MKL's, on x86), more
      of them by :mod:`fitsmall.compressors.kernels.product`;
    - *BSR 4x1*: blocks of four rows and one column, for networks that were pruned with
      ``structure=Block(4, 4)``, or ``Block(4, 1)``.

    Kernels take turns, and a sparse one is chosen if it takes less than 0.95 of the dense one's
    time in three quarters of the rounds. At last the whole copy is timed against the dense module
    in the same way. If it is not faster, all layers return to dense ones. The choice holds for this
    machine, torch's number of threads, and the sizes of the sample; other sizes work, and may be
    slower.

    Of torch's own kernels, ``F.linear`` with a CSR weight was slower than dense at most sizes that
    were measured, ``torch.addmm(bias, csr, x.T)`` half as fast as the one used here from 32 vectors
    on, and BSR never the fastest (``python -m fitsmall.experiments.benchmarks.sparse``).

    The copy is for inference in float32 on a CPU, under ``torch.no_grad`` or not. Its dense layers
    share their memory with the module; others hold their nonzeros only, so that deleting the module
    frees the dense weights. What trains the module afterwards does not reach these: accelerate it
    again. The copy can be copied and pickled, yet has no state dict: save that of the module.

    Args:
        module: The module. It is left as it is.
        sample: Inputs as in use: a tensor, a tuple with one for each argument of the forward, or a
            mapping from names of arguments.

    Returns:
        The copy, in evaluation mode. Its attribute ``choices`` is a :class:`Choices`, which prints
        as a table.

    Raises:
        ValueError: A tensor of the module is not on the CPU, or a part of it is compiled.
        TypeError: The module cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 2))
        >>> _ = net[0].weight.data.mul_(torch.rand(512, 512) > 0.99)
        >>> fast = accelerate(net, torch.ones(32, 512))
        >>> type(fast[0]).__name__, fast[2]
        ('SparseLinear', Linear(in_features=512, out_features=2, bias=True))
        >>> fast.choices.layers[1].reason
        'fewer than 30% zeros'
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"accelerate is for CPUs, and {name} is on {tensor.device}: module.cpu() first"
            )
    for name, layer in module.named_modules():
        if inner_of(layer):
            raise ValueError(
                "accelerate measures layers one by one, and torch.compile has put them together in "
                f"{name or 'the module'}: give the module that is not compiled"
            )
    arguments = Arguments.of(sample)
    dense, fast = _copy(module), _copy(module)
    choices, successors = _choose(fast, arguments)
    fast = _replaced(fast, successors)
    seconds = interleaved(
        {DENSE: lambda: outputs_of(dense, arguments), "fast": lambda: outputs_of(fast, arguments)},
        least=0.02,
    )
    if successors and _ratio(seconds["fast"], seconds[DENSE]) >= 1:
        fast, seconds["fast"] = dense, seconds[DENSE]
        reason = "the module as a whole is no faster"
        choices = [
            mine if mine.kernel == DENSE else replace(mine, kernel=DENSE, reason=reason)
            for mine in choices
        ]
    medians = (statistics.median(seconds[name]) for name in (DENSE, "fast"))
    fast.choices = Choices(tuple(choices), torch.get_num_threads(), *medians)  # type: ignore[assignment]
    return fast


def _ratio(mine: list[float], theirs: list[float]) -> float:
    """The upper quartile of the ratios within a round."""
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return statistics.quantiles(ratios, method="inclusive")[2]


def _copy(module: nn.Module) -> nn.Module:
    """A copy for inference whose parameters share their memory with the module's."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return twin_of(module, memo).eval()


def _choose(
    module: nn.Module, arguments: Arguments
) -> tuple[list[Choice], dict[nn.Module, SparseLayer]]:
    """Return the choice for each layer, and the layers that take the place of others."""
    layers: dict[Any, str] = {
        layer: name for name, layer in module.named_modules() if is_product(layer)
    }
    choices: dict[nn.Module, Choice] = {}
    successors: dict[nn.Module, SparseLayer] = {}

    def measure(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if layer not in choices:  # at its first call
            x = args[0] if args else next(iter(kwargs.values()))
            choice, successor = _measured(layers[layer], layer, x)
            choices[layer] = choice
            if successor is not None:
                successors[layer] = successor

    handles = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    outputs_of(module, arguments)
    for handle in handles:
        handle.remove()
    unseen = "its forward is not called with this sample"
    found = [
        choices.get(layer) or Choice(name, tuple(layer.weight.shape), _zeros(layer), reason=unseen)
        for layer, name in layers.items()
    ]
    return found, successors


def _measured(name: str, layer: Any, x: Tensor) -> tuple[Choice, SparseLayer | None]:
    """Return the choice for a layer, and the sparse layer if one is chosen."""
    choice = Choice(name, tuple(layer.weight.shape), _zeros(layer), tuple(x.shape))
    make = sparse_class(layer)
    if reason := _refusal(layer, make, x, choice.zeros):
        return replace(choice, reason=reason), None
    assert make is not None
    rows = layer.weight.shape[0] // getattr(layer, "groups", 1)
    if is_conv1d(layer):
        rows = layer.weight.shape[1]
    sparse = {kernel: make(layer, n) for kernel, n in _KERNELS.items() if rows % n == 0}
    expected: Tensor = layer.forward(x)
    largest = float(torch.linalg.vector_norm(expected, ord=torch.inf))
    for kernel, mine in sparse.items():
        if not torch.allclose(mine.forward(x), expected, rtol=0, atol=_TOLERANCE * largest):
            return replace(choice, reason=f"{kernel} has other outputs"), None
    seconds = interleaved(
        {name: partial(each.forward, x) for name, each in {DENSE: layer, **sparse}.items()}
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(sparse, key=medians.__getitem__)
    if _ratio(seconds[best], seconds[DENSE]) > _MARGIN:
        return replace(choice, seconds=medians), None
    return replace(choice, seconds=medians, kernel=best), sparse[best]


def _refusal(layer: Any, make: object, x: Tensor, zeros: float) -> str:
    """Return the reason why no sparse kernel is measured, or nothing."""
    if make is None:
        return "no sparse kernel does what its forward does"
    if zeros < _FEWEST_ZEROS:
        return f"fewer than {_FEWEST_ZEROS:.0%} zeros"
    if not (isinstance(layer.weight, nn.Parameter) or is_parametrized(layer, "weight")):
        return "a hook computes its weight: remove the weight norm or the pruning first"
    if not x.dtype == layer.weight.dtype == torch.float32:
        return f"kernels are for float32, and it multiplies {x.dtype} by {layer.weight.dtype}"
    return ""


def _zeros(layer: Any) -> float:
    weight: Tensor = layer.weight
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def _replaced(module: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a module with layers replaced in place, or the successor of the module itself."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if layer in successors and name:
            module.set_submodule(name, successors[layer])
    return successors.get(module, module)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
