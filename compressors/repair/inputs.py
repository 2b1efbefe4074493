"""Statistics of the inputs that parameters multiply, gathered where a network uses them.

A network multiplies by a weight in its layers' forward, or by itself, as one that reads its
embedding again for its outputs. Both call torch's functions, and these are watched.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fitsmall.compressors.torch_internals import opened

__all__ = ["EMBEDDINGS", "MATRIX_PRODUCTS", "Moments", "Statistics", "Watch", "unfolded"]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# Functions whose outputs and inputs have their channels last, and those that read rows of a weight.
MATRIX_PRODUCTS = (F.linear, torch.addmm)
EMBEDDINGS = (F.embedding, F.embedding_bag)

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    **dict.fromkeys(_TRANSPOSED, _CONVOLUTION),
    torch.addmm: ("bias", "input", "weight"),  # Conv1D of Hugging Face
    F.embedding: ("input", "weight"),
    F.embedding_bag: ("input", "weight"),
    F.batch_norm: ("input", "running_mean", "running_var"),
}

# Functions of several products.
_OPENED = {F.multi_head_attention_forward: opened(F.multi_head_attention_forward)}

# Numbers of unfolded inputs that are held at once, and values that are kept of an input.
_CHUNK, _SAMPLE = 2**24, 2**14

# Share of all reads of an embedding that a row has at least.
_UNSEEN = 1e-5

# Variance of inputs that do not vary, as a fraction of their second moment: sums are of float32.
_ROUNDING = 1e-5

_TINY = 1e-300


class Watch(TorchFunctionMode):
    """A context in which a listener learns of each use of a parameter, before and after it.

    Uses with empty inputs do not count.

    Args:
        before: Called with the function, the weight (of batch-norm: its running mean) and the
            arguments by name.
        after: Called with the weight and the output.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> with Watch(lambda function, weight, named: print(weight is layer.weight)):
        ...     _ = layer(torch.ones(2))
        True
    """

    def __init__(
        self,
        before: Callable[[Any, Tensor, Mapping[str, Any]], None],
        after: Callable[[Tensor, Tensor], None] = lambda weight, output: None,
    ) -> None:
        super().__init__()
        self._before, self._after = before, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        if func not in _ARGUMENTS:
            return func(*args, **kwargs)
        named = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
        weight = named.get("running_mean" if func is F.batch_norm else "weight")
        if weight is None or not named["input"].numel():  # as experts that no example is sent to
            return func(*args, **kwargs)
        self._before(func, weight, named)
        output = func(*args, **kwargs)
        self._after(weight, output)
        return output


class Moments:
    """Moments of the inputs that a weight multiplies, and of those that it did, over batches.

    Attributes:
        seen: Whether there were any inputs.
        low: Smallest value of an input, or 0.
        high: Largest value, or 0.
    """

    def __init__(self) -> None:
        self.seen, self.low, self.high = False, 0.0, 0.0
        self._counts: Tensor | None = None
        self._count = 0
        self._sums: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(
        self, function: Any, weight: Tensor, named: Mapping[str, Any], original: Tensor
    ) -> None:
        """Take in the inputs of one use.

        Args:
            function: The function.
            weight: The weight.
            named: Its arguments by name.
            original: The input of the same use in the original network.
        """
        x = named["input"]
        self.seen = True
        if function in EMBEDDINGS:
            counts = torch.bincount(x.flatten(), minlength=len(weight))
            self._counts = counts if self._counts is None else self._counts + counts
            return
        low, high = (float(bound) for bound in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._values.append(x.flatten()[:: max(1, x.numel() // _SAMPLE)].clone())
        if function in _TRANSPOSED:
            return
        parts = (_rows(function, each.float(), weight, named) for each in (x, original))
        for rows, others in zip(*parts, strict=True):
            sums = [rows.sum(1), others.sum(1), rows.mT @ rows, others.mT @ rows]
            self._count += rows.shape[1]
            self._sums = [
                mine.double() + so_far.to(mine.device)
                for mine, so_far in zip(sums, self._sums or [torch.zeros(())] * 4, strict=True)
            ]

    @property
    def values(self) -> Tensor:
        """A sample of the values."""
        return torch.cat(self._values)

    @property
    def means(self) -> tuple[Tensor, Tensor] | None:
        """Means of inputs and of original inputs, of shape ``(groups, n)``; None without any."""
        return (self._sums[0] / self._count, self._sums[1] / self._count) if self._sums else None

    @property
    def frequencies(self) -> Tensor | None:
        """How often each row of an embedding was read, of shape ``(1, rows)``; None for others."""
        if self._counts is None:
            return None
        # Rows that were never read may be read later, and be probable outputs if they are errors.
        counts = self._counts.double()[None]
        return counts + _UNSEEN * counts.sum()

    def seconds(
        self, weight: Tensor, centred: bool, reads: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return the second moments ``x x^T`` and ``x_0 x^T``, of shape ``(groups, n, n)``.

        An embedding gives a row of itself, whose errors count by the metric of what is read. Where
        an embedding is also multiplied, both uses count the same.

        Args:
            weight: The weight.
            centred: Whether they are those about the means, covariances.
            reads: Metric of rows that are read, of shape ``(1, n, n)``; by default the identity.

        Returns:
            Those of the inputs ``x``, and with original inputs ``x_0``; None for transposed
            convolutions.
        """
        found = None
        if self.means is not None:
            now, then = self.means
            found = self._sums[2] / self._count, self._sums[3] / self._count
            if centred:
                about = (
                    found[0] - now[:, :, None] * now[:, None],
                    found[1] - then[:, :, None] * now[:, None],
                )
                varies = _power(about[0]) > _ROUNDING * _power(found[0])
                found = about[0] * varies, about[1] * varies
        if self._counts is None:
            return found
        if reads is None:
            reads = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)[None]
        if found is None:
            return reads, reads
        reads = reads * _power(found[0]).mean() / _power(reads).mean().clamp_min(_TINY)
        return found[0] + reads, found[1] + reads


def _power(moments: Tensor) -> Tensor:
    """Return the means of the diagonals of second moments, of shape ``(groups, 1, 1)``."""
    return moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


def _rows(function: Any, x: Tensor, weight: Tensor, named: Mapping[str, Any]) -> Iterator[Tensor]:
    """Return the vectors that the matrices of a weight multiply, in parts of ``(groups, k, n)``."""
    if function in MATRIX_PRODUCTS:
        yield x.reshape(1, -1, x.shape[-1])
        return
    settings = {
        name: named[name] for name in ("stride", "padding", "dilation", "groups") if name in named
    }
    examples = x.reshape(-1, *x.shape[1 - weight.dim() :])
    size = examples[:1].numel() * weight[0, 0].numel()
    for part in examples.split(max(1, _CHUNK // max(1, size))):
        yield unfolded(part, weight.shape, **settings)


def unfolded(
    x: Tensor,
    shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the patches of its input that a convolution multiplies by its kernels.

    Args:
        x: Batch of inputs.
        shape: Shape of the weight.
        stride: As of :func:`torch.nn.functional.conv2d`, in one to three dimensions.
        padding: The same.
        dilation: The same.
        groups: The same.

    Returns:
        Tensor of shape ``(groups, patches, n)``, whose columns ``n`` are those of
        ``weight.flatten(1)``.

    Example:
        >>> image, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
        >>> outputs = unfolded(image, weight.shape, padding="same")[0] @ weight.flatten(1).T
        >>> expected = F.conv2d(image, weight, padding="same")
        >>> torch.allclose(outputs.T.view(1, 3, 5, 5), expected, atol=1e-5)
        True
    """
    kernel = tuple(shape[2:])
    steps, gaps = _each(stride, kernel), _each(dilation, kernel)
    totals = [gap * (size - 1) for size, gap in zip(kernel, gaps, strict=True)]
    if isinstance(padding, str):
        sides = [(n // 2, n - n // 2) if padding == "same" else (0, 0) for n in totals]
    else:
        sides = [(n, n) for n in _each(padding, kernel)]
    x = F.pad(x, [n for side in reversed(sides) for n in side])
    for k, total in enumerate(totals):
        x = x.unfold(2 + k, total + 1, steps[k])[..., :: gaps[k]]
    x = x.unflatten(1, (groups, -1))  # batch, groups, channels, *positions, *kernel
    x = x.movedim(1, 0).movedim(2, 2 + len(kernel))
    return x.reshape(groups, -1, x.shape[2 + len(kernel)] * math.prod(kernel))


def _each(value: int | Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return a setting for each dimension."""
    values = [value] if isinstance(value, int) else [*value]
    return values * len(kernel) if len(values) == 1 else values


class Statistics:
    """Mean and variance of each channel of a batch-norm's inputs, over batches."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def __call__(
        self, function: Any, mean: Tensor, named: Mapping[str, Any], original: Tensor
    ) -> None:
        """Take in the inputs of one use, with channels in dimension 1."""
        x = named["input"].double()
        others = [d for d in range(x.dim()) if d != 1]
        self._count += x.numel() // x.shape[1]
        self._sum = self._sum + x.sum(others)
        self._squares = self._squares + x.square().sum(others)

    def write_(self, running_mean: Tensor, running_var: Tensor) -> None:
        """Make these a batch-norm's running statistics, if there are any."""
        if not self._count:
            return
        mean = torch.as_tensor(self._sum / self._count)
        variance = self._squares / self._count - mean * mean
        running_mean.copy_(mean)
        running_var.copy_(variance * (self._count / max(1, self._count - 1)))
