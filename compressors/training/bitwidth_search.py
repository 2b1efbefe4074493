"""Widths that training finds: how much the loss would rise is gathered, and a budget shared out."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.bitwidths import WIDTHS, assign, rounding_costs
from fitsmall.compressors.training.sharding import gather, shard

__all__ = ["Widths"]


class Widths:
    r"""The bits of every weight, out of 2, 3, 4, 6, 8 and 16, within one budget.

    Sensitivities are the diagonal of the empirical Fisher matrix, means of squared gradients over
    steps. Gradients of batches are small where those of examples cancel, everywhere alike: costs
    are as good as sums over examples for comparing layers, and no prediction of the loss itself.

    Args:
        average_bits: Bits of a weight on average, over all that are quantized.
        max_bytes: Bytes of all that the module saves: integers and their steps before entropy
            coding, which only makes them smaller, and everything else as it is.
    """

    def __init__(self, average_bits: float | None, max_bytes: int | None) -> None:
        if (average_bits is None) == (max_bytes is None):
            raise MisconfigurationException(
                "QuantizationAwareTraining: weight_bits='auto' needs one budget, average_bits or "
                "max_bytes"
            )
        if average_bits is not None and not WIDTHS[0] <= average_bits <= WIDTHS[-1]:
            raise MisconfigurationException(
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
        """Forget what was gathered and chosen."""
        self.fisher: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.sensitivities: dict[str, float] = {}
        self.costs: dict[str, dict[int, float]] = {}
        self.chosen: dict[str, int] = {}
        self.again = False

    def attach(
        self, module: nn.Module, blocks: Mapping[str, tuple[int, ...]], fixed: Mapping[str, int]
    ) -> None:
        """Work out what each width of each weight takes.

        Args:
            module: Module whose weights they are.
            blocks: Number of steps along each dimension, by name.
            fixed: Widths that stay as they are.

        Raises:
            MisconfigurationException: Not even the smallest widths fit into the budget.
        """
        self.weights = {name: module.get_parameter(name) for name in blocks}
        self.blocks = dict(blocks)
        self.sizes = {}
        for name, weight in self.weights.items():
            steps = 0 if self.average_bits is not None else 32 * math.prod(blocks[name])
            widths = (fixed[name],) if name in fixed else WIDTHS
            self.sizes[name] = {
                bits: bits * weight.numel() + steps * (bits < 16) for bits in widths
            }
        stored = module.state_dict().keys() - blocks.keys()
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self.rest = sum(t.nbytes for name, t in tensors if name in stored and not is_lazy(t))
        smallest = sum(min(sizes.values()) for sizes in self.sizes.values())
        if smallest > self._total():
            if self.average_bits is not None:
                least = smallest / sum(weight.numel() for weight in self.weights.values())
                reach = f"average_bits={self.average_bits:g}, and {least:.2f}"
            else:
                reach = f"max_bytes={self.max_bytes:,}, and {smallest // 8 + self.rest + 1:,}"
            raise MisconfigurationException(
                f"QuantizationAwareTraining: {reach} is the least there is with 2 bits wherever "
                "overrides say nothing else: raise it, or lower those"
            )

    def observe(self, name: str, gradient: Tensor) -> None:
        """Take in the gradient of one step, of this process's part of a weight."""
        square = gradient.float().square()
        self.counts[name] = self.counts.get(name, 0) + 1
        if name in self.fisher:
            self.fisher[name].lerp_(square, 1 / self.counts[name])
        else:
            self.fisher[name] = square

    def weigh(self, name: str, weight: Tensor) -> None:
        """Turn what was gathered into the cost of each width, and forget it."""
        fisher = gather(self.fisher.pop(name), self.weights[name])
        del self.counts[name]
        self.sensitivities[name] = float(fisher.mean())
        self.costs[name] = rounding_costs(weight.float(), fisher, self.blocks[name])

    def solve(self) -> list[str]:
        """Choose the widths of all weights that were weighed; returns those that changed."""
        costs = self._costs()
        before = self.chosen
        chosen = assign(costs, self.sizes, self._budget())
        self.chosen = {name: bits for name, bits in chosen.items() if name in self.costs}
        return [name for name, bits in self.chosen.items() if before.get(name) != bits]

    def table(self) -> str:
        """What was chosen, and by what."""
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
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(size) if cell is row[0] else cell.rjust(size)
                for cell, size in zip(row, columns, strict=True)
            )
            for row in rows
        ]
        total = sum(costs[name][bits] for name, bits in width.items())
        head = f"widths of weights, within {self}: cost {total:.3g}"
        for bits in reversed(WIDTHS):
            even = {name: bits if name in self.chosen else width[name] for name in width}
            if sum(self.sizes[name][even[name]] for name in even) <= self._budget():
                uniform = sum(costs[name][even[name]] for name in even)
                head += f", and {uniform:.3g} with {bits} bits everywhere"
                break
        return "\n  ".join([head, *lines])

    def state(self) -> dict[str, Any]:
        """All of it, for the checkpoint."""
        return {
            "fisher": {name: gather(f, self.weights[name]) for name, f in self.fisher.items()},
            "counts": self.counts,
            "sensitivities": self.sensitivities,
            "costs": self.costs,
            "widths": self.chosen,
            "again": self.again,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.fisher = {
            name: shard(fisher.to(self.weights[name].device), self.weights[name])
            for name, fisher in state["fisher"].items()
        }
        self.counts, self.sensitivities = state["counts"], state["sensitivities"]
        self.costs, self.chosen, self.again = state["costs"], state["widths"], state["again"]

    def _costs(self) -> dict[str, dict[int, float]]:
        """Costs of what was weighed, and none of what has a given width."""
        return {
            name: self.costs.get(name, dict.fromkeys(sizes, 0.0))
            for name, sizes in self.sizes.items()
            if name in self.costs or len(sizes) == 1
        }

    def _budget(self) -> int:
        """Bits for all that has a given width or was weighed; the rest waits with the least."""
        waiting = self.sizes.keys() - self._costs()
        return self._total() - sum(min(self.sizes[name].values()) for name in waiting)

    def _total(self) -> int:
        if self.max_bytes is not None:
            return 8 * (self.max_bytes - self.rest)
        assert self.average_bits is not None
        return int(self.average_bits * sum(weight.numel() for weight in self.weights.values()))
