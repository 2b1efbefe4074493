r"""Low rank: a matrix ``W`` of ``m x n`` as a product of ``m x r`` and ``r x n`` numbers.

A convolution is a matrix in two ways, its *forms*, with kernels of ``h x w``:

=============  ===========================  ==============================================
form           matrix                       the two layers that compute the product
=============  ===========================  ==============================================
``channels``   ``out x (in h w)``           ``r`` kernels of ``h x w``, then 1 x 1
``separable``  ``(out h) x (in w)``         ``r`` kernels of ``1 x w``, then ``h x 1``
=============  ===========================  ==============================================
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fitsmall.compressors.codes.code import Code, Dense
from fitsmall.compressors.codes.dtypes import FLOATS
from fitsmall.compressors.codes.product import product
from fitsmall.compressors.projections.projection import Projection

__all__ = [
    "FORMS",
    "Factors",
    "Spectrum",
    "Truncate",
    "matrix",
    "matrix_size",
    "tensor",
]

FORMS = ("channels", "separable")  # numbers in the file: append, never reorder

# In a matrix of more than _LARGE rows, fewer than one in _FEW singular values are found faster by
# random projections (Halko et al., 2011).
_LARGE, _FEW = 1024, 8

# Columns of a matrix that are in double precision at once.
_COLUMNS = 4096


def matrix_size(shape: Sequence[int], form: str = "channels") -> tuple[int, int]:
    """Return rows and columns of the matrix of a form, for a weight of this shape.

    Raises:
        ValueError: Such a weight is no matrix of this form.

    Example:
        >>> matrix_size((20, 3, 5, 4)), matrix_size((20, 3, 5, 4), "separable")
        ((20, 60), (100, 12))
    """
    if len(shape) < 2:
        raise ValueError(f"a tensor of shape {tuple(shape)} is no matrix and has no rank")
    if form == "channels":
        return shape[0], math.prod(shape[1:])
    if form != "separable" or len(shape) != 4:
        raise ValueError(
            f"form {form!r} of a weight of shape {tuple(shape)}: choose channels, or separable "
            "for convolutions in two dimensions"
        )
    outputs, inputs, height, width = shape
    return outputs * height, inputs * width


def matrix(weight: Tensor, form: str = "channels") -> Tensor:
    """Return a weight as the matrix of a form.

    Example:
        >>> weight = torch.zeros(20, 3, 5, 4)
        >>> matrix(weight).shape, matrix(weight, "separable").shape
        (torch.Size([20, 60]), torch.Size([100, 12]))
    """
    size = matrix_size(weight.shape, form)
    return (weight if form == "channels" else weight.transpose(1, 2)).reshape(size)


def tensor(matrix: Tensor, shape: torch.Size, form: str = "channels") -> Tensor:
    """Return the weight of which a matrix is a form; the inverse of :func:`matrix`.

    Example:
        >>> weight = torch.randn(20, 3, 5, 4)
        >>> torch.equal(tensor(matrix(weight, "separable"), weight.shape, "separable"), weight)
        True
    """
    if form == "channels":
        return matrix.view(shape)
    outputs, inputs, height, width = shape
    return matrix.view(outputs, height, inputs, width).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Factors(Code):
    """A product of two matrices, ``W = left right``.

    It is computed in an order that gives the same bits on every processor, see
    :func:`~.product.product`.

    Args:
        left: Code of the ``m x r`` matrix.
        right: Code of the ``r x n`` matrix, of the same floating-point dtype.
        whole: Shape of the weight.
        form: Form in which the weight is a matrix of ``m x n``.

    Raises:
        ValueError: The factors differ in dtype, or their product is not of that shape.

    Example:
        >>> column, row = Dense(torch.tensor([[1.0], [2.0]])), Dense(torch.tensor([[3.0, 4.0]]))
        >>> Factors(column, row, torch.Size([2, 2])).decode()
        tensor([[3., 4.],
                [6., 8.]])
    """

    left: Code
    right: Code
    whole: torch.Size
    form: str = "channels"

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        rows, columns = matrix_size(self.whole, self.form)
        if len(left) != 2 or left[0] != rows or right != (left[1], columns):
            raise ValueError(
                f"factors of {left} and {right} do not give a weight of shape {tuple(self.whole)}, "
                f"which is a matrix of {rows} x {columns}"
            )
        if self.left.dtype != self.right.dtype or self.dtype not in FLOATS:
            raise ValueError(
                f"factors are floating-point and of one dtype, and got {self.left.dtype} and "
                f"{self.right.dtype}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.whole

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def decode(self) -> Tensor:
        return tensor(product(self.left.decode(), self.right.decode()), self.whole, self.form)

    def bits(self) -> float:
        return self.left.bits() + self.right.bits()

    def map(self, encode: Callable[[Tensor], Code]) -> Code:
        return Factors(self.left.map(encode), self.right.map(encode), self.whole, self.form)


class Spectrum:
    """The singular values of a matrix, and its best approximations of lower ranks.

    They are square roots of the eigenvalues of ``W W^T`` or ``W^T W``, the smaller one, computed in
    double precision, which is several times faster than a singular value decomposition. In single
    precision, eigenvalues below ``1e-7`` of the largest would be noise, and in the metric of the
    loss most are smaller. Values alone, without :meth:`factors`, take a third of the time.

    Args:
        matrix: Matrix of ``m x n`` finite numbers.
        most: Largest number of singular values to compute; by default all.

    Raises:
        ValueError: The matrix holds NaN or infinity.

    Example:
        >>> Spectrum(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).values
        tensor([4., 3.], dtype=torch.float64)
    """

    def __init__(self, matrix: Tensor, most: int | None = None) -> None:
        if not matrix.isfinite().all():
            raise ValueError("a weight holds NaN or infinity: did training diverge?")
        self.matrix = matrix
        self.flipped = matrix.shape[0] > matrix.shape[1]
        self._wide = matrix.T if self.flipped else matrix
        size = len(self._wide)
        self.most = size if most is None else min(most, size)
        self._few = size > _LARGE and self.most < size // _FEW

    @cached_property
    def _squares(self) -> Tensor:
        if self._few:
            return self._eigen[0]
        return _eigenvalues(self._gram()).flip(0)[: self.most].clamp_min(0)

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Squares of singular values in descending order, and singular vectors."""
        if self._few:
            wide = self._wide.double()
            with torch.random.fork_rng(devices=[wide.device] if wide.is_cuda else []):
                torch.manual_seed(0)  # the same on every process
                basis, values, _ = torch.svd_lowrank(wide, q=self.most + _FEW, niter=4)
            squares = values.square()
        else:
            squares, basis = _eigen(self._gram())
            squares, basis = squares.flip(0).clamp_min(0), basis.flip(1)
        return squares[: self.most], basis[:, : self.most]

    def _gram(self) -> Tensor:
        rows = len(self._wide)
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=self.matrix.device)
        for part in self._wide.split(_COLUMNS, dim=1):
            wide = part.double()
            gram.addmm_(wide, wide.T)
        return gram

    @property
    def values(self) -> Tensor:
        """Singular values in descending order."""
        return self._squares.sqrt()

    @property
    def tails(self) -> Tensor:
        """``||W - W_r||^2`` of the best approximations of rank ``r`` = 1, 2, ..."""
        return (self.norm - self._squares.cumsum(0)).clamp_min(0)

    @cached_property
    def norm(self) -> float:
        """``||W||^2``"""
        return float(torch.linalg.vector_norm(self.matrix, dtype=torch.float64)) ** 2

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best approximation of a rank as factors of ``m x r`` and ``r x n``.

        Each has the square roots of the singular values, so that neither learns faster.
        """
        squares, basis = self._eigen
        basis, root = basis[:, :rank], squares[:rank].pow(0.25)
        left = basis * root
        inverse = (basis * torch.where(root > 0, root.reciprocal(), 0.0)).T
        dtype = self.matrix.dtype
        parts = [(inverse @ part.double()).to(dtype) for part in self._wide.split(_COLUMNS, dim=1)]
        right = torch.cat(parts, dim=1)
        return (right.T, left.T.to(dtype)) if self.flipped else (left.to(dtype), right)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues, and eigenvectors, of a positive semi-definite matrix."""
    try:
        values, basis = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Slower, but it converges.
        basis, values, _ = torch.linalg.svd(gram)
        values, basis = values.flip(0), basis.flip(1)
    return values, basis


def _eigenvalues(gram: Tensor) -> Tensor:
    """Return ascending eigenvalues of a positive semi-definite matrix."""
    try:
        values: Tensor = torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = torch.linalg.svdvals(gram).flip(0)
    return values


@dataclass(frozen=True)
class Truncate(Projection):
    r"""The nearest weight of a rank: ``min ||W - V||^2`` subject to ``rank(V) <= r``.

    Eckart and Young (1936): the largest singular values stay, the others become zero.

    Args:
        rank: Number of singular values that stay, at least 1.
        energy: Instead: as few as hold this fraction of ``||W||^2``; of the result fewer can hold
            it, so that a rank alone is idempotent.
        form: How a convolution is a matrix, ``channels`` or ``separable``.

    Example:
        >>> Truncate(rank=1).project(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).abs()
        tensor([[0., 0.],
                [0., 4.]])
        >>> Truncate(energy=0.6).encode(torch.tensor([[3.0, 0.0], [0.0, -4.0]])).rank
        1
    """

    rank: int | None = None
    energy: float | None = None
    form: str = "channels"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise ValueError("Truncate takes a rank or an energy")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"a rank is at least 1, got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy is a fraction in (0, 1], got {self.energy}")
        if self.form not in FORMS:
            raise ValueError(f"unknown form {self.form!r}: choose {' or '.join(FORMS)}")

    def refusal(self, shape: torch.Size) -> str | None:
        try:
            matrix_size(shape, self.form)
        except ValueError as error:
            return str(error)
        return None

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        spectrum = Spectrum(matrix(weight, self.form), self.rank)
        rank = self.rank
        if self.energy is not None:
            left_out = (1 - self.energy) * float(weight.double().square().sum())
            rank = 1 + int((spectrum.tails > left_out).count_nonzero())
        left, right = spectrum.factors(min(rank or 1, spectrum.most))
        return Factors(Dense(left), Dense(right), weight.shape, self.form)
