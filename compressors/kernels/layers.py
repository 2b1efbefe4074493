"""Linear layers and convolutions that multiply by the nonzeros of their weights alone.

They are for inference in float32 on a CPU. Zeros are skipped: where an input is infinite, a dense
layer returns NaN and these do not.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fitsmall.compressors.kernels.product import Array, SparseMatrix, multiply_, tiled, transpose_
from fitsmall.compressors.surgery.factorable import kind_of
from fitsmall.compressors.torch_internals import move_hooks
from fitsmall.compressors.weights import is_conv1d

__all__ = ["SparseConvolution", "SparseLayer", "SparseLinear", "sparse_class"]

_REMEDY = "work with the module that it was made from, and accelerate(module, sample) again"


class SparseLayer(nn.Module):
    """A layer in whose place it stands: the same outputs, hooks and settings.

    Args:
        layer: The layer, in evaluation mode. It gives its hooks away.
        rows: Rows of a block, 1 for single weights.
    """

    def __init__(self, layer: Any, rows: int) -> None:
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        move_hooks(layer, self)
        for name, child in layer.named_children():
            if name != "parametrizations":
                self.add_module(name, child)
        weight, bias = layer.weight.detach(), layer.bias
        self._transposed = is_conv1d(layer)
        matrix = weight.T if self._transposed else weight.flatten(1)
        self.bias = None if bias is None else bias.detach()
        self.matrix = SparseMatrix.of(matrix, rows)
        sums = torch.zeros(len(matrix)) if bias is None else bias.detach().contiguous()
        self._sums: Array = sums.numpy()
        self._shape = weight.shape
        self._known: tuple[object, Any] = (None, None)
        self.register_state_dict_pre_hook(_refuse_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_refuse_state)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded each time."""
        matrix = self.matrix.decode()
        return matrix.T if self._transposed else matrix.view(self._shape)

    def extra_repr(self) -> str:
        rows, blocks = self.matrix.values.shape[1], len(self.matrix.values)
        kind = "nonzeros" if rows == 1 else f"blocks of {rows} x 1"
        return f"{tuple(self._shape)}, {blocks:,} {kind}"

    def train(self, mode: bool = True) -> "SparseLayer":
        """Refuse to train.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError(f"an accelerated module cannot be trained: {_REMEDY}")
        return super().train(mode)

    def _remembered(self, key: object, make: Callable[[], Any]) -> Any:
        """Return the value of a key: the last one is kept, and another is made."""
        known = self._known  # both at once, since another thread may replace them
        if known[0] != key:
            known = self._known = (key, make())
        return known[1]

    def _check(self, x: Tensor) -> None:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(
                f"an accelerated layer takes float32 on the CPU, and got {x.dtype} on {x.device}: "
                f"convert the input, or {_REMEDY}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "an accelerated layer has no gradients: call it within torch.no_grad(), or "
                f"{_REMEDY}"
            )


class SparseLinear(SparseLayer):
    """A linear layer, or Hugging Face's ``Conv1D``, that skips zeros.

    A single vector is multiplied by torch's CSR kernel if torch has MKL, and more of them by
    :func:`~fitsmall.compressors.kernels.product.multiply_`, for which they are transposed.

    Example:
        >>> layer = nn.Linear(4, 2).eval()
        >>> SparseLinear(layer, rows=1)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, layer: Any, rows: int) -> None:
        super().__init__(layer, rows)
        self._csr = _csr(self.matrix)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_csr": None}  # torch can neither copy nor pickle it

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._csr = _csr(self.matrix)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        outputs, inputs = self.matrix.shape
        if input.shape[-1] != inputs:
            raise ValueError(f"a layer of {inputs} inputs got an input of {tuple(input.shape)}")
        vectors = input.reshape(-1, inputs).contiguous()
        many = len(vectors)
        if many == 1 and self._csr is not None:
            sums = torch.addmv(torch.from_numpy(self._sums), self._csr, vectors[0])
            return sums.view(*input.shape[:-1], outputs)
        length = tiled(many)
        x = np.empty((inputs, length), np.float32)
        x[:, many:] = 0  # what lies there is multiplied too, and denormal numbers are slow
        transpose_(x, vectors.numpy())
        out = np.empty((1, outputs, length), np.float32)
        places = self._remembered(
            length,
            lambda: _narrowed(np.multiply(self.matrix.columns, length, dtype=np.int64), x.size),
        )
        multiply_(out, self.matrix, self._sums, x, places, 0, torch.get_num_threads())
        y = torch.empty(many, outputs)
        transpose_(y.numpy(), out[0])
        return y.view(*input.shape[:-1], outputs)


class _Grid(NamedTuple):
    """The places of a convolution in an input that was padded and parted by phases.

    Args:
        sides: Sides of a phase.
        outputs: Sides of the output.
        offsets: Index in the input that each nonzero reads for the first output.
    """

    sides: tuple[int, ...]
    outputs: tuple[int, ...]
    offsets: Array


class SparseConvolution(SparseLayer):
    """A convolution that skips zeros.

    Unfolding an image writes every pixel once for each weight of a kernel. It is not needed: in an
    image with its padding, row after row in memory, the inputs that one weight multiplies lie as
    the outputs do, at a distance that is the same for all of them (Park et al., 2017, "Faster CNNs
    with direct sparse convolutions"). So a nonzero adds one piece of the image to one piece of the
    output. The few outputs that cross the end of a row are cut off at last. With a stride ``s``,
    pixels are parted into ``s`` phases for each side, and the same holds within a phase.

    Example:
        >>> layer = nn.Conv2d(2, 4, 3, padding=1, stride=2).eval()
        >>> SparseConvolution(layer, rows=4)(torch.ones(1, 2, 5, 5)).shape
        torch.Size([1, 4, 3, 3])
    """

    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]

    def __init__(self, layer: Any, rows: int) -> None:
        super().__init__(layer, rows)
        self._kernel: tuple[int, ...] = tuple(self._shape[2:])
        self._inputs = self._shape[1] * self.groups
        if self.padding == "same":
            self._around = [d * (k - 1) for d, k in zip(self.dilation, self._kernel, strict=True)]
            self._before = tuple(n // 2 for n in self._around)
        else:
            none = (0,) * len(self._kernel)
            self._before = none if isinstance(self.padding, str) else self.padding
            self._around = [2 * n for n in self._before]

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        dims = len(self._kernel)
        images = input if input.dim() == dims + 2 else input[None]
        if images.dim() != dims + 2 or images.shape[1] != self._inputs:
            raise ValueError(
                f"a convolution of {self._inputs} channels got an input of {tuple(input.shape)}"
            )
        sides = tuple(images.shape[2:])
        grid = self._remembered(sides, lambda: self._grid(sides))
        many, rows = len(images), self.matrix.shape[0]
        length = tiled(grid.outputs[0] * prod(grid.sides[1:]))
        size = self._inputs * prod(self.stride) * prod(grid.sides)
        x = torch.zeros(many * size + length)  # the last tile reads past the end
        phases = x[: many * size].view(many, self._inputs, *self.stride, *grid.sides)
        for phase in product(*map(range, self.stride)):
            here = zip(phase, self._before, self.stride, images.shape[2:], strict=True)
            to: list[Any] = [*phase]
            of: list[Any] = []
            for r, before, stride, side in here:
                first = (r - before) % stride
                start = (first + before) // stride
                of.append(slice(first, None, stride))
                to.append(slice(start, start + len(range(first, side, stride))))
            phases[..., *to] = images[..., *of]
        out = torch.empty(many, rows, length)
        threads = torch.get_num_threads()
        multiply_(out.numpy(), self.matrix, self._sums, x.numpy(), grid.offsets, size, threads)
        lines = grid.outputs[0], *grid.sides[1:]
        y = out[..., : prod(lines)].view(many, rows, *lines)
        for axis, side in enumerate(grid.outputs, start=2):
            y = y.narrow(axis, 0, side)
        y = y.contiguous()
        return y if images is input else y[0]

    def _grid(self, sides: Sequence[int]) -> _Grid:
        """Return the places for images of some sides."""
        here = [*zip(sides, self._around, self.stride, self.dilation, self._kernel, strict=True)]
        outputs = tuple((side + a - d * (k - 1) - 1) // s + 1 for side, a, s, d, k in here)
        if min(outputs) < 1:
            raise ValueError(f"images of {tuple(sides)} are smaller than the convolution's kernel")
        grid = tuple(-(-(side + a) // s) for side, a, s, _, _ in here)
        taps = [
            sum(
                (place * d % s) * step * prod(grid) + place * d // s * inner
                for place, (_, _, s, d, _), step, inner in zip(
                    places, here, _steps(self.stride), _steps(grid), strict=True
                )
            )
            for places in product(*map(range, self._kernel))
        ]
        channel, place = np.divmod(self.matrix.columns, prod(self._kernel))
        # Blocks of a later group of outputs read later channels.
        group = (
            self.matrix.block_rows() * self.matrix.values.shape[1] * self.groups // self._shape[0]
        )
        size = prod(self.stride) * prod(grid)
        offsets = (group * self._shape[1] + channel) * size + np.array(taps)[place]
        return _Grid(grid, outputs, _narrowed(offsets, self._inputs * size))


def sparse_class(layer: Any) -> type[SparseLayer] | None:
    """Return the class that computes what a layer does and skips zeros, or None if there is none.

    Example:
        >>> sparse_class(nn.Linear(1, 1)).__name__, sparse_class(nn.ReLU())
        ('SparseLinear', None)
    """
    kind = kind_of(layer)
    if kind is nn.Linear or is_conv1d(layer):
        return SparseLinear if kind else None
    return SparseConvolution if kind and layer.padding_mode == "zeros" else None


def _steps(sides: Sequence[int]) -> list[int]:
    """Distances in memory along each dimension.

    Example:
        >>> _steps([4, 3, 2])
        [6, 2, 1]
    """
    return [prod(sides[axis + 1 :]) for axis in range(len(sides))]


def _narrowed(indexes: Array, size: int) -> Array:
    """Return indexes of an array in 32 bits, or in 64 if it is larger.

    Example:
        >>> _narrowed(np.arange(2), 2**31).dtype, _narrowed(np.arange(2), 2**31 + 1).dtype
        (dtype('int32'), dtype('int64'))
    """
    return indexes.astype(np.int32 if size <= 2**31 else np.int64)


def _csr(matrix: SparseMatrix) -> Tensor | None:
    """Return torch's form of a matrix of single weights, which shares its memory.

    Without MKL there is none, since torch cannot multiply by it on every system.
    """
    if matrix.values.shape[1] > 1 or not torch.backends.mkl.is_available():
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        parts = matrix.starts, matrix.columns, matrix.values[:, 0]
        starts, columns, values = map(torch.from_numpy, parts)
        return torch.sparse_csr_tensor(starts, columns, values, matrix.shape, check_invariants=True)


def _refuse_state(*_: Any) -> None:
    raise RuntimeError(
        "an accelerated module has no state_dict: save that of the module that it was made from, "
        "and accelerate(module, sample) again where it runs"
    )
