r"""Optimal brain surgeon: the weights that a projection allows, fitted to a layer's own outputs.

A layer ``y = W x_0`` is compressed to ``V`` with the least mean squared error of its outputs, where
its inputs have become ``x``, since layers before it are compressed:

    min over V of mean |W x_0 - V x|^2  =  min over V of tr (U - V) H (U - V)^T,
    H = mean of x x^T,    C = mean of x_0 x^T,    U = W C H^-1.

``H`` is the Hessian of each row, and its off-diagonal part tells how the other weights make up for
the error of one (Hassibi and Stork, 1993). The problem is solved in three steps:

1. Support: which weights survive. ADMM turns between the quadratic problem, ``X``, and the
   projection, ``D`` (Meng et al., 2024, "ALPS").
2. Values of the survivors, by least squares.
3. Levels, where the projection has a codebook or a grid: columns are rounded one by one, and later
   columns make up for the error (GPTQ, Frantar et al., 2023); then sweeps round every weight again,
   to the level that is best given all others (Behdin et al., 2023, "QuantEase").

Memory and time are those of a few matrices of the inputs, and of about 200 products of them with
the weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fitsmall.compressors.projections.levels import Levels
from fitsmall.compressors.projections.projection import Projection

__all__ = ["fit"]

# Fraction of the mean of H's diagonal that is added to it, as in GPTQ.
_DAMPING = 0.01

# ADMM: its turns, its first penalty as a fraction of H's mean eigenvalue, and its growth in a turn.
_TURNS, _PENALTY, _GROWTH = 60, 0.03, 1.08

# Conjugate gradients: most steps, and the squared residual at which they end.
_STEPS, _PRECISION = 100, 1e-16

# Sweeps over all columns, and columns whose changes reach the others together.
_SWEEPS, _BLOCK = 4, 128

_TINY = 1e-300


def fit(
    weight: Tensor,
    projection: Projection,
    hessian: Tensor,
    cross: Tensor | None = None,
    frequencies: Tensor | None = None,
) -> Tensor | None:
    """Return the weight that a projection allows whose layer comes closest to its own outputs.

    Args:
        weight: Weight ``W``, of shape ``(outputs, inputs, ...)``. Its zeros stay zero.
        projection: The projection.
        hessian: Second moment ``H`` of the inputs, in double precision and of shape
            ``(groups, n, n)``, where each group of outputs sees ``n`` inputs.
        cross: Second moment ``C`` of original inputs with inputs; by default ``H``.
        frequencies: Positive weights of the errors of each output; by default all are 1.

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
    w, h = weight.double().reshape(len(hessian), -1, hessian.shape[1]), _damped(hessian)
    unpruned = w != 0
    if cross is not None:
        w = w + torch.linalg.solve(h, w @ (cross - hessian), left=False)
    rows = w.new_ones(len(weight)) if frequencies is None else frequencies
    rows = rows.view(len(w), -1, 1)
    importance = (rows * h.diagonal(dim1=1, dim2=2)[:, None]).reshape(weight.shape)
    if projection.levels(weight, importance) is None:
        return None

    def support(values: Tensor) -> Tensor:
        return projection.support(values.view_as(weight)).view_as(w)

    mask = _support(rows.sqrt() * w, h, support) & unpruned
    v = _least_squares(w, h, mask)
    levels = projection.levels(v.view_as(weight).to(weight.dtype), importance)
    assert levels is not None  # as for the weight itself
    if not levels.any_value and mask.any():
        v = _round(w, v, h, mask, levels.view(w.shape))
    return v.view_as(weight).to(weight.dtype)


def _damped(hessian: Tensor) -> Tensor:
    """Return ``H`` with a little added to its diagonal, so that it is positive definite."""
    means = hessian.diagonal(dim1=1, dim2=2).mean(1)
    damping = torch.where(means > 0, _DAMPING * means, 1.0)
    return hessian + torch.diag_embed(damping[:, None].expand(hessian.shape[:2]))


def _support(w: Tensor, h: Tensor, support: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mask of the weights that survive.

    ADMM for ``min tr (W - X) H (W - X)^T`` over ``X = D``, where the projection allows ``D``:

        X <- (W H - Y + rho D) (H + rho I)^-1
        D <- the projection of X + Y / rho
        Y <- Y + rho (X - D)

    The penalty ``rho`` grows, so that the mask settles.
    """
    mask = support(w)
    if bool((mask | (w == 0)).all()):  # nothing is pruned
        return mask
    values, vectors = torch.linalg.eigh(h)
    rho = _PENALTY * values.mean(1)[:, None, None]
    target, d, y = w @ h, w, torch.zeros_like(w)
    for _ in range(_TURNS):
        x = (target - y + rho * d) @ vectors / (values[:, None] + rho) @ vectors.mT
        d = x + y / rho
        mask = support(d)
        d = d * mask
        y = y + rho * (x - d)
        rho = rho * _GROWTH
    return mask


def _least_squares(w: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """Return ``min over V of tr (W - V) H (W - V)^T`` where ``V`` is zero outside of the mask.

    Each row is a system of its own, and conjugate gradients solve all of them together.
    """
    v = w * mask
    residual = (w - v) @ h * mask
    direction, squares = residual, residual.square().sum(-1, keepdim=True)
    end = _PRECISION * squares
    for _ in range(_STEPS):
        if not (squares > end).any():
            break
        curved = direction @ h * mask
        step = squares / (direction * curved).sum(-1, keepdim=True).clamp_min(_TINY)
        v = v + step * direction
        residual = residual - step * curved
        before, squares = squares, residual.square().sum(-1, keepdim=True)
        direction = residual + squares / before.clamp_min(_TINY) * direction
    return v


def _round(w: Tensor, v: Tensor, h: Tensor, mask: Tensor, levels: Levels) -> Tensor:
    """Return survivors ``v`` rounded to levels: in one pass of optimal brain surgeon, then sweeps.

    The pass moves later columns as if none of them were pruned. Rows for which it is worse than
    rounding to the nearest level, as those of few survivors, start from that.
    """
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True)  # the costly columns first
    columns = order.tolist()
    w, v, mask, h = w[..., order], v[..., order], mask[..., order], h[:, order][..., order]
    # After a change d of column j, columns k > j are best moved by d [H^-1]_jk / [H^-1]_jj, with
    # the inverse over the columns from j on. Rows of its Cholesky factor hold these fractions.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    later = (-factor / factor.diagonal(dim1=1, dim2=2)[..., None]).triu(1)
    passed = _rounded_in_turn(w, w, later, mask, levels, columns)
    each = [levels.nearest(v[..., k], column) for k, column in enumerate(columns)]
    nearest = torch.stack(each, -1) * mask
    better = _errors(w - passed, h) < _errors(w - nearest, h)
    v = torch.where(better, passed, nearest)
    # With all other columns fixed, the best value of column j is V_j + [(W - V) H]_j / H_jj.
    diagonal = h.diagonal(dim1=1, dim2=2)[:, None]
    others = h / diagonal - torch.eye(len(columns), dtype=h.dtype, device=h.device)
    for _ in range(_SWEEPS):
        targets = v + (w - v) @ h / diagonal
        v = _rounded_in_turn(targets, v, others, mask, levels, columns)
    return v[..., order.argsort()]


def _rounded_in_turn(
    targets: Tensor,
    before: Tensor,
    coupling: Tensor,
    mask: Tensor,
    levels: Levels,
    columns: list[int],
) -> Tensor:
    """Round columns one after another, each to the levels nearest to its target ``t``.

    Args:
        targets: Targets of the columns.
        before: Columns before; where they are the targets themselves, also these move.
        coupling: Matrix ``C``: a change ``d`` of column ``j`` moves the targets of the others,
            ``t_k <- t_k - d C_jk``.
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
            rounded[..., j] = levels.nearest(t, columns[j]) * mask[..., j]
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
