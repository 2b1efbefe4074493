r"""Mixed precision: the number of bits of each weight tensor, within one budget for all.

The chosen widths :math:`b_l` are those that raise the loss least by rounding, among all that fit
into the budget. The loss is estimated to second order with a diagonal curvature :math:`F`. HAWQ
(Dong et al., 2019) has one curvature for a layer; here every single weight has its own:

.. math:: \min_b \sum_l \tfrac12 \sum_i F_{li} (w_{li} - Q_{b_l}(w_l)_i)^2
          \quad\text{subject to}\quad \sum_l \mathrm{size}_l(b_l) \le \text{budget}.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from fitsmall.compressors.projections.quantize import half, quantize_, scales_of

__all__ = ["WIDTHS", "assign", "rounding_costs"]

WIDTHS = (2, 3, 4, 6, 8, 16)


def rounding_costs(weight: Tensor, curvature: Tensor, blocks: Sequence[int]) -> dict[int, float]:
    r"""Return the rise of the loss at each width, :math:`\tfrac12 \sum_i F_i (w - Q_b(w))_i^2`.

    Args:
        weight: Tensor of weights.
        curvature: Second derivative of the loss for each weight, or a multiple of it: squared
            gradients, whose mean is the diagonal of the Fisher matrix.
        blocks: Number of scales along each dimension.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.3, -2.0]])
        >>> costs = rounding_costs(weight, torch.ones(1, 3), blocks=(1, 1))
        >>> {bits: round(cost, 4) for bits, cost in costs.items()}
        {2: 0.045, 3: 0.019, 4: 0.0006, 6: 0.0, 8: 0.0, 16: 0.0}
    """
    costs = {}
    for bits in WIDTHS:
        if bits == 16:
            nearest = half(weight)
        else:
            nearest = quantize_(weight.clone(), scales_of(weight, bits, blocks), bits)
        error = nearest.double().sub_(weight)
        costs[bits] = 0.5 * float(error.square_().mul_(curvature).sum())
    return costs


def assign(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Return the width of each tensor, with the least total cost within the budget.

    This is the multiple-choice knapsack problem, solved exactly as an integer program.

    Args:
        costs: Cost by tensor and width.
        sizes: Size by tensor and width, in any unit.
        budget: Largest sum of sizes, in the same unit.

    Raises:
        ValueError: The smallest widths are too large for the budget.

    Example:
        >>> costs = {"a": {2: 9.0, 4: 1.0}, "b": {2: 5.0, 4: 1.0}, "c": {2: 3.0, 4: 0.0}}
        >>> sizes = {"a": {2: 200, 4: 400}, "b": {2: 20, 4: 40}, "c": {2: 20, 4: 40}}
        >>> assign(costs, sizes, budget=460)
        {'a': 4, 'b': 4, 'c': 2}
    """
    smallest = sum(min(sizes[name][bits] for bits in costs[name]) for name in costs)
    if smallest > budget:
        raise ValueError(f"the budget is {budget:,}, and the smallest widths take {smallest:,}")
    options = [(name, bits) for name in costs for bits in costs[name]]
    one_each = np.array([[name == other for other, _ in options] for name in costs], dtype=float)
    cost = np.array([costs[name][bits] for name, bits in options])
    size = np.array([sizes[name][bits] for name, bits in options])
    unit = np.gcd.reduce(size)
    found = milp(
        cost * (1e6 / (cost.max() or 1.0)),  # the solver's absolute tolerances are 1e-6
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((size // unit)[None], ub=budget // unit),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.success, found.message
    return {name: bits for (name, bits), share in zip(options, found.x, strict=True) if share > 0.5}
