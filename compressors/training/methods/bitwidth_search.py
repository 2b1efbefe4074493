"""Automatic bits: training measures the cost of rounding, and a budget is spent by it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.choices.bitwidths import WIDTHS, assign, rounding_costs
from fitsmall.compressors.text_table import aligned
from fitsmall.compressors.training.sharding import gather, shard

__all__ = ["BitwidthSearch"]


class BitwidthSearch:
    r"""A search for the bits of every weight tensor, out of 2, 3, 4, 6, 8 and 16, in one budget.

    Sensitivities are the diagonal of the empirical Fisher matrix: means of squared gradients over
    steps. In the gradient of a batch those of its examples partly cancel, in all layers alike, so
    that costs compare layers but do not predict the loss itself.

    Args:
        average_bits: Average number of bits of a quantized weight.
        max_bytes: Bytes of the whole state dict, with quantized weights as integers and scales,
            before entropy coding.

    Raises:
        ValueError: None or both are given, one is no number, or the average is not between 2 and
            16.
    """

    def __init__(self, average_bits: float | None, max_bytes: int | None) -> None:
        if (average_bits is None) == (max_bytes is None):
            raise ValueError(
                "QuantizationAwareTraining: weight_bits='auto' needs one budget, average_bits or "
                "max_bytes"
            )
        for name, budget in (("average_bits", average_bits), ("max_bytes", max_bytes)):
            if budget is not None and not isinstance(budget, int | float):
                raise ValueError(f"QuantizationAwareTraining: {name}={budget!r} is no number")
        if average_bits is not None and not WIDTHS[0] <= average_bits <= WIDTHS[-1]:
            raise ValueError(
                f"QuantizationAwareTraining: average_bits={average_bits} is not between 2 and 16"
            )
        self.average_bits, self.max_bytes = average_bits, max_bytes
        self.weights: dict[str, nn.Parameter] = {}
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, dict[int, int]] = {}
        self.rest = 0
        self.reset()

    def __str__(self) -> str:
        if self.average_bits is not None:
            return f"{self.average_bits:g} bits on average"
        return f"{self.max_bytes:,} bytes"

    def reset(self) -> None:
        """Forget gradients and choices."""
        self.fisher: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.sensitivities: dict[str, float] = {}
        self.costs: dict[str, dict[int, float]] = {}
        self.chosen: dict[str, int] = {}
        self.reallocated = False

    def attach(
        self, module: nn.Module, blocks: Mapping[str, tuple[int, ...]], fixed: Mapping[str, int]
    ) -> None:
        """Compute the size of each weight at each width.

        Args:
            module: Module whose weights they are.
            blocks: Number of scales along each dimension, by name.
            fixed: Widths of the weights that have an override.

        Raises:
            ValueError: Not even the smallest widths fit into the budget.
        """
        self.weights = {name: module.get_parameter(name) for name in blocks}
        self.blocks = dict(blocks)
        self.sizes = {}
        for name, weight in self.weights.items():
            scales = 0 if self.average_bits is not None else 32 * math.prod(blocks[name])
            widths = (fixed[name],) if name in fixed else WIDTHS
            self.sizes[name] = {
                bits: bits * weight.numel() + scales * (bits < 16) for bits in widths
            }
        stored = module.state_dict().keys() - blocks.keys()
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self.rest = sum(t.nbytes for name, t in tensors if name in stored and not is_lazy(t))
        smallest = sum(min(sizes.values()) for sizes in self.sizes.values())
        if smallest > self._total():
            if self.average_bits is not None:
                least = smallest / sum(weight.numel() for weight in self.weights.values())
                budget = f"average_bits={self.average_bits:g} is below {least:.2f}"
            else:
                bound = smallest // 8 + self.rest + 1
                budget = f"max_bytes={self.max_bytes:,} is below {bound:,}"
            raise ValueError(
                f"QuantizationAwareTraining: {budget}, which 2 bits take wherever no override "
                "applies: raise the budget, or lower the overrides"
            )

    def observe(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of one step to the sensitivity of this process's part of a weight."""
        square = gradient.float().square()
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.fisher:
            self.fisher[name].lerp_(square, 1 / self.counts[name])
        else:
            self.fisher[name] = square

    def drop(self, names: Collection[str]) -> None:
        """Forget the gradients of weights whose shapes have changed."""
        for name in names:
            self.fisher.pop(name, None)
            self.counts.pop(name, None)

    def measure(self, name: str, weight: Tensor) -> None:
        """Compute the cost of each width from the collected gradients; forget these."""
        fisher = gather(self.fisher.pop(name), self.weights[name])
        del self.counts[name]
        self.sensitivities[name] = float(fisher.mean())
        self.costs[name] = rounding_costs(weight.float(), fisher, self.blocks[name])

    def solve(self) -> list[str]:
        """Choose the widths of all weights with known costs, and return the names that changed."""
        costs = self._costs()
        before = self.chosen
        chosen = assign(costs, self.sizes, self._budget())
        self.chosen = {name: bits for name, bits in chosen.items() if name in self.costs}
        return [name for name, bits in self.chosen.items() if before.get(name) != bits]

    def table(self) -> str:
        """Return the table of chosen widths, with sensitivities and costs."""
        costs = self._costs()
        width = {name: self.chosen.get(name, next(iter(costs[name]))) for name in costs}
        rows = [("weight", "weights", "bits", "sensitivity", "cost", "bytes")]
        for name, bits in width.items():
            known = name in self.chosen
            rows.append(
                (
                    name,
                    f"{self.weights[name].numel():,}",
                    f"{bits}" if known else f"{bits} (given)",
                    f"{self.sensitivities[name]:.3g}" if known else "",
                    f"{costs[name][bits]:.3g}" if known else "",
                    f"{-(-self.sizes[name][bits] // 8):,}",
                )
            )
        total = sum(costs[name][bits] for name, bits in width.items())
        head = f"widths of weights, within {self}: cost {total:.3g}"
        for bits in reversed(WIDTHS):
            even = {name: bits if name in self.chosen else width[name] for name in width}
            if sum(self.sizes[name][even[name]] for name in even) <= self._budget():
                uniform = sum(costs[name][even[name]] for name in even)
                head += f", and {uniform:.3g} with {bits} bits everywhere"
                break
        return "\n  ".join([head, *aligned(rows)])

    def state(self) -> dict[str, Any]:
        """Return gradients, costs and choices, for a checkpoint."""
        return {
            "fisher": {name: gather(f, self.weights[name]) for name, f in self.fisher.items()},
            "counts": self.counts,
            "sensitivities": self.sensitivities,
            "costs": self.costs,
            "widths": self.chosen,
            "again": self.reallocated,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state` returned."""
        self.fisher = {
            name: shard(fisher.to(self.weights[name].device), self.weights[name])
            for name, fisher in state["fisher"].items()
        }
        self.counts, self.sensitivities = state["counts"], state["sensitivities"]
        self.costs, self.chosen, self.reallocated = state["costs"], state["widths"], state["again"]

    def _costs(self) -> dict[str, dict[int, float]]:
        """Return the costs of the weights that were measured, and 0 for fixed widths."""
        return {
            name: self.costs.get(name, dict.fromkeys(sizes, 0.0))
            for name, sizes in self.sizes.items()
            if name in self.costs or len(sizes) == 1
        }

    def _budget(self) -> int:
        """Return the bits for weights of known costs, if all others take the smallest width."""
        waiting = self.sizes.keys() - self._costs()
        return self._total() - sum(min(self.sizes[name].values()) for name in waiting)

    def _total(self) -> int:
        if self.max_bytes is not None:
            return 8 * (self.max_bytes - self.rest)
        assert self.average_bits is not None
        return int(self.average_bits * sum(weight.numel() for weight in self.weights.values()))
