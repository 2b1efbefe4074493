r"""Optimal brain surgeon: the weights that a projection allows, fitted to a layer's own outputs.

A layer ``y = W x_0`` is compressed to ``V`` with the least mean squared error of its outputs, where
its inputs have become ``x``, since layers before it are compressed:

    min over V of mean |W x_0 - V x|_G^2  =  min over V of tr G (U - V) H (U - V)^T,
    H = mean of x x^T,    C = mean of x_0 x^T,    U = W C H^-1,    |e|_G^2 = e^T G e.

``G`` is the metric of the outputs, see :mod:`~fitsmall.compressors.repair.metric`, and the
Kronecker product of ``G`` and ``H`` the Hessian: its off-diagonal part tells how the other weights
make up for the error of one (Hassibi and Stork, 1993). The problem is solved in three steps:

1. Support: which weights survive. ADMM turns between the quadratic problem, ``X``, and the
   projection, ``D`` (Meng et al., 2024, "ALPS").
2. Values of the survivors, by least squares.
3. Levels, where the projection has a codebook or a grid: columns are rounded one by one, and later
   columns make up for the error (GPTQ, Frantar et al., 2023); then sweeps round every weight again,
   to the level that is best given all others of its row (Behdin et al., 2023, "QuantEase").

Memory and time are those of a few matrices of the inputs, and of about 200 products of them with
the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection
from fitsmall.compressors.weights import Matrices

__all__ = ["fit"]

# Fraction of the mean of the diagonal that is added to it: of H as in GPTQ, and of G.
_DAMPING, _OUTPUT_DAMPING = 0.01, 0.03

# ADMM: its turns, its first penalty as a fraction of H's mean eigenvalue, and its growth in a turn.
_TURNS, _PENALTY, _GROWTH = 60, 0.03, 1.08

# Conjugate gradients: most steps, and the squared residual at which they end.
_STEPS, _PRECISION = 200, 1e-16

# Sweeps over all columns, and columns whose changes reach the others together.
_SWEEPS, _BLOCK = 4, 128

_TINY = 1e-300


def fit(
    weight: Tensor,
    projection: Projection,
    hessian: Tensor,
    cross: Tensor | None = None,
    metric: Tensor | None = None,
    form: Matrices | None = None,
) -> Tensor | None:
    """Return the weight that a projection allows whose layer comes closest to its own outputs.

    Args:
        weight: Weight ``W``. Its zeros stay zero.
        projection: The projection.
        hessian: Second moment ``H`` of the inputs, in double precision and of shape
            ``(groups, n, n)``, where each group of ``k`` outputs sees ``n`` inputs.
        cross: Second moment ``C`` of original inputs with inputs; by default ``H``.
        metric: Metric ``G`` of the outputs, of shape ``(groups, k, k)``, or its diagonal, of shape
            ``(groups, k)``; by default the identity.
        form: Dimensions of the weight; by default ``(outputs, inputs, ...)``.

    Returns:
        A weight that the projection leaves as it is; None if the projection has no levels, so that
        weights cannot be fitted one by one.

    Raises:
        ValueError: The projection refuses the weight.

    Example:
        >>> from fitsmall.compressors import TopK
        >>> weight, same = torch.tensor([[3.0, 2.0]]), torch.ones(1, 2, 2).double()
        >>> fit(weight, TopK(0.5), same)  # two inputs that are always equal
        tensor([[4.9802, 0.0000]])
    """
    form = form or Matrices("")

    def matrices(tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``(groups, k, n)``."""
        return form.split(tensor).reshape(len(hessian), -1, hessian.shape[1])

    def whole(tensor: Tensor) -> Tensor:
        return form.join(tensor.reshape(form.split(weight).shape))

    w = matrices(weight.double())
    h = _damped(hessian, _DAMPING)
    unpruned = w != 0
    if cross is not None:
        w = w + torch.linalg.solve(h, w @ (cross - hessian), left=False)
    if metric is None:
        metric = w.new_ones(w.shape[:2])
    if metric.dim() == 3:
        metric = _damped(metric, _OUTPUT_DAMPING)
    squares = metric if metric.dim() == 2 else metric.diagonal(dim1=1, dim2=2)
    # With outputs in the units of their own errors, G has ones on its diagonal.
    units = squares.sqrt()[..., None]
    g = metric / (units * units.mT) if metric.dim() == 3 else None
    importance = whole(squares[..., None] * h.diagonal(dim1=1, dim2=2)[:, None])
    if projection.levels(weight, importance) is None:
        return None

    def support(tensor: Tensor) -> Tensor:
        return matrices(projection.support(whole(tensor)))

    mask = _support(units * w, h, g, support) & unpruned
    v = _least_squares(units * w, h, g, mask) / units
    levels = projection.levels(whole(v).to(weight.dtype), importance)
    assert levels is not None  # as for the weight itself
    if not levels.any_value and mask.any():
        v = _round(v, h, squares[..., None], mask, levels.rearranged(matrices))
    return whole(v).to(weight.dtype)


def _damped(matrix: Tensor, fraction: float) -> Tensor:
    """Return matrices with a little added to their diagonal, so that they are positive definite."""
    means = matrix.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(means > 0, fraction * means, 1.0)
    return matrix + torch.diag_embed(damping[:, None].expand(matrix.shape[:2]))


def _support(w: Tensor, h: Tensor, g: Tensor | None, support: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mask of the weights that survive.

    ADMM for ``min tr G (W - X) H (W - X)^T`` over ``X = D``, where the projection allows ``D``:

        X <- the solution of G X H + rho X = G W H - Y + rho D
        D <- the projection of X + Y / rho
        Y <- Y + rho (X - D)

    The penalty ``rho`` grows, so that the mask settles. Eigenvectors of ``G`` and ``H`` give ``X``.
    """
    mask = support(w)
    if bool((mask | (w == 0)).all()):  # nothing is pruned
        return mask
    values, right = torch.linalg.eigh(h)
    curvature, target, left = values[:, None], w @ h, None
    if g is not None:
        more, left = torch.linalg.eigh(g)
        curvature, target = more[..., None] * curvature, g @ target
    rho = _PENALTY * curvature.mean((1, 2), keepdim=True)
    d, y = w, torch.zeros_like(w)
    for _ in range(_TURNS):
        x = target - y + rho * d
        if left is None:
            x = x @ right / (curvature + rho) @ right.mT
        else:
            x = left @ (left.mT @ x @ right / (curvature + rho)) @ right.mT
        d = x + y / rho
        mask = support(d)
        d = d * mask
        y = y + rho * (x - d)
        rho = rho * _GROWTH
    return mask


def _least_squares(w: Tensor, h: Tensor, g: Tensor | None, mask: Tensor) -> Tensor:
    """Return ``min over V of tr G (W - V) H (W - V)^T`` where ``V`` is zero outside of the mask.

    Each row is a system of its own without ``G``, and each group with it. Conjugate gradients solve
    all of them together.
    """
    system = -1 if g is None else (-2, -1)

    def product(v: Tensor) -> Tensor:
        return (v @ h if g is None else g @ (v @ h)) * mask

    v = w * mask
    residual = product(w - v)
    direction, squares = residual, residual.square().sum(system, keepdim=True)
    end = _PRECISION * squares
    for _ in range(_STEPS):
        if not (squares > end).any():
            break
        curved = product(direction)
        step = squares / (direction * curved).sum(system, keepdim=True).clamp_min(_TINY)
        v = v + step * direction
        residual = residual - step * curved
        before, squares = squares, residual.square().sum(system, keepdim=True)
        direction = residual + squares / before.clamp_min(_TINY) * direction
    return v


def _round(w: Tensor, h: Tensor, units: Tensor, mask: Tensor, levels: Levels) -> Tensor:
    """Return survivors ``w`` rounded to levels: in one pass of optimal brain surgeon, then sweeps.

    ``units`` are the weights of the outputs' squared errors, of shape ``(groups, k, 1)``.

    Errors are those from ``w``, row by row: it is the least-squares solution, so that others add up
    to nothing. The pass moves later columns as if none of them were pruned. Rows for which it is
    worse than rounding each weight alone, as those of few survivors, start from that.
    """
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)  # the costly columns first
    columns = order.tolist()
    w, mask, h = w[..., order], mask[..., order], h[:, order][..., order]
    # After a change d of column j, columns k > j are best moved by d [H^-1]_jk / [H^-1]_jj, with
    # the inverse over the columns from j on. Rows of its Cholesky factor hold these fractions.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    later = (-factor / factor.diagonal(dim1=1, dim2=2)[..., None]).triu(1)
    # The curvature of a column whose later ones are free, and that of one whose others are fixed.
    free = units / factor.diagonal(dim1=1, dim2=2)[:, None].square()
    fixed = units * h.diagonal(dim1=1, dim2=2)[:, None]
    passed = _rounded_in_turn(w, w, later, free, mask, levels, columns)
    each = [levels.best(w[..., k], column, fixed[..., k]) for k, column in enumerate(columns)]
    nearest = torch.stack(each, -1) * mask
    better = _errors(w - passed, h) < _errors(w - nearest, h)
    v = torch.where(better, passed, nearest)
    # With all other columns fixed, the best value of column j is V_j + [(W - V) H]_j / H_jj.
    diagonal = h.diagonal(dim1=1, dim2=2)[:, None]
    others = h / diagonal - torch.eye(len(columns), dtype=h.dtype, device=h.device)
    for _ in range(_SWEEPS):
        targets = v + (w - v) @ h / diagonal
        v = _rounded_in_turn(targets, v, others, fixed, mask, levels, columns)
    return v[..., order.argsort()]


def _rounded_in_turn(
    targets: Tensor,
    before: Tensor,
    coupling: Tensor,
    curvature: Tensor,
    mask: Tensor,
    levels: Levels,
    columns: list[int],
) -> Tensor:
    """Round columns one after another, each to the best levels for its target ``t``.

    Args:
        targets: Targets of the columns.
        before: Columns before; where they are the targets themselves, also these move.
        coupling: Matrix ``C``: a change ``d`` of column ``j`` moves the targets of the others,
            ``t_k <- t_k - d C_jk``.
        curvature: Second derivative of the error by each weight.
        mask: Weights that survive.
        levels: Levels of the weight.
        columns: Number of each column in the weight.
    """
    alone = before is targets
    targets, rounded = targets.clone(), torch.empty_like(targets)
    for first in range(0, len(columns), _BLOCK):
        block = slice(first, min(first + _BLOCK, len(columns)))
        changes = []
        for j in range(block.start, block.stop):
            t = targets[..., j].contiguous()
            rounded[..., j] = levels.best(t, columns[j], curvature[..., j]) * mask[..., j]
            changes.append(rounded[..., j] - (t if alone else before[..., j]))
            targets[..., block] -= changes[-1][..., None] * coupling[:, None, j, block]
        # All other columns in one product.
        moved = torch.stack(changes, -1) @ coupling[:, block]
        moved[..., block] = 0
        targets -= moved
    return rounded


def _errors(error: Tensor, h: Tensor) -> Tensor:
    """Return the squared error of each output."""
    return (error @ h * error).sum(-1, keepdim=True)
