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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fitsmall.compressors.codes import Code, Dense
from fitsmall.compressors.dtypes import FLOATS
from fitsmall.compressors.product import product
from fitsmall.compressors.projections import Projection

__all__ = [
    "DENSE",
    "FORMS",
    "Factors",
    "LossMetric",
    "Options",
    "Rank",
    "Spectrum",
    "Truncate",
    "choose_ranks",
    "matrix",
    "matrix_size",
    "price_of",
    "tensor",
]

FORMS = ("channels", "separable")  # numbers in the file: append, never reorder

# In a matrix of more than _LARGE rows, fewer than one in _FEW singular values are found faster by
# random projections (Halko et al., 2011).
_LARGE, _FEW = 1024, 8


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

    They are square roots of the eigenvalues of ``W W^T``, computed in double precision, which is
    several times faster than a singular value decomposition.

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
        wide = matrix.double()
        self.flipped = wide.shape[0] > wide.shape[1]
        self._wide = wide = wide.T if self.flipped else wide
        size = len(wide)
        most = size if most is None else min(most, size)
        if size > _LARGE and most < size // _FEW:
            with torch.random.fork_rng(devices=[wide.device] if wide.is_cuda else []):
                torch.manual_seed(0)  # the same on every process
                basis, values, _ = torch.svd_lowrank(wide, q=most + _FEW, niter=4)
            squares = values.square()
        else:
            squares, basis = _eigen(wide @ wide.T)
            squares, basis = squares.flip(0).clamp_min(0), basis.flip(1)
        self._squares, self._basis = squares[:most], basis[:, :most]

    @property
    def values(self) -> Tensor:
        """Singular values in descending order."""
        return self._squares.sqrt()

    @property
    def tails(self) -> Tensor:
        """``||W - W_r||^2`` of the best approximations of rank ``r`` = 1, 2, ..."""
        return (self.norm - self._squares.cumsum(0)).clamp_min(0)

    @property
    def norm(self) -> float:
        """``||W||^2``"""
        return float(self._wide.square().sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best approximation of a rank as factors of ``m x r`` and ``r x n``.

        Each has the square roots of the singular values, so that neither learns faster.
        """
        basis = self._basis[:, :rank]
        root = self._squares[:rank].pow(0.25)
        left = basis * root
        right = (basis / root.clamp_min(torch.finfo(root.dtype).tiny)).T @ self._wide
        left, right = (right.T, left.T) if self.flipped else (left, right)
        return left.to(self.matrix.dtype), right.to(self.matrix.dtype)


class LossMetric:
    r"""A distance of two weights, by how much a change from one to the other raises the loss.

    To second order a change ``D`` of a weight raises the loss by ``vec(D)^T H vec(D) / 2``, and the
    Hessian of a layer is about ``H = A (x) B``, a Kronecker product of a matrix of its outputs and
    one of its inputs. Both are found in gradients ``G``: ``A = E[G G^T]`` and ``B = E[G^T G]``,
    divided by the trace that they share (the preconditioner of Shampoo, Gupta et al., 2018; Morwani
    et al., 2024). So ``D^T H D = ||A^(1/2) D B^(1/2)||^2``: the matrix that is nearest to
    ``A^(1/2) W B^(1/2)`` by squared error gives the one that is nearest to ``W`` by this distance.
    For convolutions the matrices act on channels; all positions of a kernel are treated alike.

    Args:
        outputs: ``A`` up to a factor, of shape ``out x out``.
        inputs: ``B`` up to a factor, of shape ``in x in``.
        damping: Fraction of the mean eigenvalue that is added to each eigenvalue: in directions
            without gradients the weight would otherwise be arbitrary.

    Example:
        >>> metric = LossMetric(torch.eye(2), torch.diag(torch.tensor([9.0, 1.0])), damping=0.0)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> metric.whiten(weight)
        tensor([[0.9487, 0.0000],
                [0.0000, 0.6325]], dtype=torch.float64)
        >>> torch.allclose(metric.unwhiten(metric.whiten(weight)), weight.double())
        True
    """

    def __init__(self, outputs: Tensor, inputs: Tensor, damping: float = 1e-2) -> None:
        self.trace = outputs.double().trace()
        self._outputs, self._inputs = _roots(outputs, damping), _roots(inputs, damping)

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``A^(1/2) W B^(1/2)`` in double precision, whose squared error is the distance."""
        return self._apply(weight.double(), 0) * (self.trace / weight.numel()).sqrt()

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Return the weight for which :meth:`whiten` gives this one."""
        return self._apply(weight, 1) / (self.trace / weight.numel()).sqrt()

    def _apply(self, weight: Tensor, which: int) -> Tensor:
        by_place = weight.reshape(*weight.shape[:2], -1)
        left, right = self._outputs[which], self._inputs[which]
        return torch.einsum("ij,jkp,kl->ilp", left, by_place, right).view(weight.shape)


def _roots(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the square root of a matrix over its mean eigenvalue, damped, and its inverse."""
    wide = gram.double()
    mean = wide.diagonal().mean().clamp_min(torch.finfo(wide.dtype).tiny)
    values, basis = _eigen(wide / mean)
    root = (values.clamp_min(0) + damping).sqrt()
    return (basis * root) @ basis.T, (basis / root) @ basis.T


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues, and eigenvectors, of a positive semi-definite matrix."""
    try:
        values, basis = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # Slower, but it converges.
        basis, values, _ = torch.linalg.svd(gram)
        values, basis = values.flip(0), basis.flip(1)
    return values, basis


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

    def encode(self, weight: Tensor) -> Code:
        weight = weight.detach()
        spectrum = Spectrum(matrix(weight, self.form), self.rank)
        rank = self.rank
        if self.energy is not None:
            left_out = (1 - self.energy) * float(weight.double().square().sum())
            rank = 1 + int((spectrum.tails > left_out).count_nonzero())
        left, right = spectrum.factors(min(rank or 1, len(spectrum.values)))
        return Factors(Dense(left), Dense(right), weight.shape, self.form)


class Rank(NamedTuple):
    """The rank of a layer and the form of its matrix; a rank of None keeps the layer as it is."""

    form: str
    rank: int | None

    def __str__(self) -> str:
        return "dense" if self.rank is None else f"{self.rank} ({self.form})"


DENSE = Rank("channels", None)


class Options:
    r"""All ranks that a layer may have, each with its cost and its error ``||W - W_r||^2``.

    Args:
        spectra: Spectrum of the layer's weight in each form.
        units: Cost of one rank in each form.
        dense: Cost of the layer as it is, with an error of 0; ranks must cost less.

    Example:
        >>> weight = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.0]))
        >>> options = Options({"channels": Spectrum(weight)}, {"channels": 7.0}, dense=16.0)
        >>> options.cheapest(price=2.0), options.cheapest(price=4.0)
        (Rank(form='channels', rank=2), Rank(form='channels', rank=1))
    """

    def __init__(
        self, spectra: Mapping[str, Spectrum], units: Mapping[str, float], dense: float
    ) -> None:
        self.norm = max(spectrum.norm for spectrum in spectra.values())
        self.ranks, self.costs, errors = [DENSE], [dense], [0.0]
        for form, spectrum in spectra.items():
            for rank, tail in enumerate(spectrum.tails.tolist(), start=1):
                if rank * units[form] >= dense:
                    break
                self.ranks.append(Rank(form, rank))
                self.costs.append(rank * units[form])
                errors.append(tail)
        self._costs = torch.tensor(self.costs, dtype=torch.float64)
        self._errors = torch.tensor(errors, dtype=torch.float64)

    @property
    def least(self) -> float:
        """The lowest cost of all."""
        return min(self.costs)

    def cheapest(self, price: float) -> Rank:
        """Return the rank ``r`` that minimises ``price C(r) + error(r)``."""
        return self.ranks[self._best(price)]

    def cost(self, price: float) -> float:
        """Return the cost of :meth:`cheapest`."""
        return self.costs[self._best(price)]

    def _best(self, price: float) -> int:
        if math.isinf(price):
            return int(self._costs.argmin())
        return int((price * self._costs + self._errors).argmin())


def choose_ranks(options: Mapping[str, Options], price: float) -> dict[str, Rank]:
    r"""Return the ranks that minimise ``price C(r) + sum over layers of ||W - W_r||^2``.

    The solution is in closed form, since each layer has its own term (Idelbayev and
    Carreira-Perpinan, 2020). In the paper a layer of full rank costs more than the layer as it is;
    here it stays as it is.
    """
    return {name: mine.cheapest(price) for name, mine in options.items()}


def price_of(options: Mapping[str, Options], budget: float) -> float:
    """Return the lowest price at which the chosen ranks fit into a budget, by bisection.

    Raises:
        ValueError: Even a rank of 1 in every layer costs more.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        >>> options = {"a": Options({"channels": Spectrum(weight)}, {"channels": 7.0}, dense=16.0)}
        >>> choose_ranks(options, price_of(options, budget=7.5))
        {'a': Rank(form='channels', rank=1)}
    """

    def cost(price: float) -> float:
        return sum(mine.cost(price) for mine in options.values())

    if cost(0.0) <= budget:
        return 0.0
    least = sum(mine.least for mine in options.values())
    if least > budget:
        raise ValueError(f"a rank of 1 everywhere costs {least:,.0f}, above {budget:,.0f}")
    # At this price every layer takes its lowest cost.
    costs = [cost for mine in options.values() for cost in mine.costs if cost]
    high = 2 * max(mine.norm for mine in options.values()) / min(costs)
    high *= max(costs) / min(costs)
    low = 1e-15 * high
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= budget else (middle, high)
    return high
