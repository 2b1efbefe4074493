"""The loss metric: a distance of two weights, by how much a change raises the loss."""

import math

import torch
from torch import Tensor

__all__ = ["LossMetric"]


class LossMetric:
    r"""A distance of two weights, by how much a change from one to the other raises the loss.

    To second order a change ``D`` of a weight raises the loss by ``vec(D)^T H vec(D) / 2``, and the
    Hessian of a layer is about ``H = A (x) B``, a Kronecker product of a matrix of its outputs and
    one of its inputs. Both are found in gradients ``G``: ``A = E[G G^T]`` and ``B = E[G^T G]``,
    divided by the trace that they share (the preconditioner of Shampoo, Gupta et al., 2018; Morwani
    et al., 2024). With Cholesky factors ``A = K K^T`` and ``B = L L^T`` it is
    ``D^T H D = ||K^T D L||^2``: the matrix that is nearest to ``K^T W L`` by squared error gives
    the one that is nearest to ``W`` by this distance. For convolutions the matrices act on
    channels; all positions of a kernel are treated alike.

    Args:
        outputs: ``A`` up to a factor, of shape ``out x out``; or its diagonal.
        inputs: ``B`` up to a factor, of shape ``in x in``; or its diagonal.
        peak: Unit of the gradients that ``outputs`` and ``inputs`` are squares of.
        damping: Fraction of the mean eigenvalue that is added to each eigenvalue: in directions
            without gradients the weight would otherwise be arbitrary.

    Example:
        >>> metric = LossMetric(torch.eye(2), torch.diag(torch.tensor([9.0, 1.0])), damping=0.0)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> metric.whiten(weight)
        tensor([[0.9487, 0.0000],
                [0.0000, 0.6325]])
        >>> torch.allclose(metric.unwhiten(metric.whiten(weight)), weight)
        True
    """

    def __init__(
        self, outputs: Tensor, inputs: Tensor, peak: float = 1.0, damping: float = 1e-2
    ) -> None:
        self.scale = peak * math.sqrt(_diagonal(outputs).sum(dtype=torch.float64))
        self._outputs, self._inputs = _root(outputs, damping), _root(inputs, damping)

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``K^T W L``, whose squared error is the distance, in single precision or more."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        rows = _times(self._outputs, wide).mul_(self._scale(weight))
        return _times(self._inputs, rows.transpose(0, 1)).transpose(0, 1)

    def unwhiten(self, weight: Tensor) -> Tensor:
        """Return the weight for which :meth:`whiten` gives this one."""
        rows = _divided(self._outputs, weight).div_(self._scale(weight))
        return _divided(self._inputs, rows.transpose(0, 1)).transpose(0, 1)

    def _scale(self, weight: Tensor) -> float:
        return self.scale / math.sqrt(weight.numel())


def _diagonal(gram: Tensor) -> Tensor:
    return gram.diagonal() if gram.dim() == 2 else gram


def _root(gram: Tensor, damping: float) -> Tensor:
    """Return the Cholesky factor of a matrix over its mean eigenvalue, damped; of a diagonal its
    square root."""
    wide = gram.double()
    wide = wide / _diagonal(wide).mean()
    _diagonal(wide).add_(damping)
    return torch.linalg.cholesky(wide) if wide.dim() == 2 else wide.sqrt()


def _times(root: Tensor, weight: Tensor) -> Tensor:
    """Return ``K^T W`` for each input and position of a kernel."""
    rows, root = weight.flatten(1), root.to(weight.dtype)
    return (root.T @ rows if root.dim() == 2 else root[:, None] * rows).view(weight.shape)


def _divided(root: Tensor, weight: Tensor) -> Tensor:
    """Return the inverse of :func:`_times`."""
    rows, root = weight.flatten(1), root.to(weight.dtype)
    if root.dim() == 2:
        rows = torch.linalg.solve_triangular(root.T, rows, upper=True)
    else:
        rows = rows / root[:, None]
    return rows.view(weight.shape)
