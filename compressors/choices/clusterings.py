"""Entropy-constrained clusterings of tensors, and the table of what was chosen for a network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fitsmall.compressors.choices.entropy_constrained import Clustering, cluster
from fitsmall.compressors.codes.code import matrix_shape
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.text_table import aligned

__all__ = ["CODEBOOK_DTYPE", "clustered", "clusterings_table", "decoded"]

CODEBOOK_DTYPE = torch.bfloat16
"""Float type that levels are rounded to in the file."""


def clustered(weight: Tensor, curvature: Tensor, price: float) -> Clustering:
    """Return the clustering of a weight of any shape.

    Args:
        weight: The weight.
        curvature: Second derivative of the loss by each of its numbers, positive.
        price: Loss that a bit is worth.

    Example:
        >>> clustered(torch.eye(2), torch.ones(2, 2), price=0.001).codebook
        array([0., 1.])
    """
    shape = matrix_shape(weight.shape)
    matrix, curvatures = (t.float().reshape(shape).cpu().numpy() for t in (weight, curvature))
    return cluster(matrix, curvatures, price)


def decoded(found: Clustering) -> Tensor:
    """Return the matrix of a clustering, with levels as they are stored."""
    codebook = torch.from_numpy(found.codebook).to(CODEBOOK_DTYPE).float()
    return codebook[torch.from_numpy(found.index).int()]


def clusterings_table(found: Mapping[str, Clustering]) -> list[str]:
    """Return the lines of a table of clusterings: what is left of each tensor, and what it costs.

    Args:
        found: Clustering of each parameter, by name.

    Example:
        >>> weight = torch.eye(8)
        >>> found = {"fc.weight": clustered(weight, torch.ones(8, 8), price=0.001)}
        >>> print("\\n".join(clusterings_table(found)))
        parameter  weights  kept %  levels  bytes  loss
        fc.weight       64    12.5       2     11     0
    """
    rows = [("parameter", "weights", "kept %", "levels", "bytes", "loss")]
    for name, mine in found.items():
        size = exact(decoded(mine)).bits() / 8
        numbers = (
            f"{mine.index.size:,}",
            f"{100 * mine.kept / max(1, mine.index.size):.1f}",
            f"{len(mine.codebook)}",
            f"{size:,.0f}",
            f"{mine.loss:.2g}",
        )
        rows.append((name, *numbers))
    return aligned(rows)
