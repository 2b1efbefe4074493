"""A budget: what training may cost, the same for networks of every size."""

from dataclasses import dataclass

__all__ = ["BUDGET_UNITS", "Budget", "StepCost"]

BUDGET_UNITS = ("flops", "seconds", "steps")


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step, of all processes together.

    Args:
        flops: Floating-point operations.
        seconds: Duration.
    """

    flops: float
    seconds: float


@dataclass(frozen=True)
class Budget:
    """Amount of training, in one of three units.

    Args:
        flops: Floating-point operations.
        seconds: Seconds, converted to steps by the duration of a step on this machine.
        steps: Optimizer steps.
        scale: Factor of the amount.
        dense: Fraction of the amount that is spent before compression begins.
        calibration: Optimizer steps of a compression without fine-tuning.
        validations: Number of validations during training, evenly spaced.

    Raises:
        ValueError: Not exactly one of the three amounts is given, or a value is out of range.

    Example:
        >>> Budget(flops=1e9).steps_at(StepCost(flops=4e6, seconds=0.1))
        250
    """

    flops: float | None = None
    seconds: float | None = None
    steps: int | None = None
    scale: float = 1.0
    dense: float = 0.5
    calibration: int = 20
    validations: int = 20

    def __post_init__(self) -> None:
        amounts = [value for value in (self.flops, self.seconds, self.steps) if value is not None]
        if len(amounts) != 1 or amounts[0] <= 0 or self.scale <= 0:
            raise ValueError(
                f"a budget is one of flops, seconds and steps, and positive; got flops="
                f"{self.flops}, seconds={self.seconds}, steps={self.steps}, scale={self.scale}"
            )
        if self.calibration < 1 or self.validations < 1:
            raise ValueError(
                f"budget.calibration and budget.validations must be 1 or more; got "
                f"{self.calibration} and {self.validations}"
            )
        if not 0.0 <= self.dense < 1.0:
            raise ValueError(
                "budget.dense is the fraction of training before compression begins, in [0, 1); "
                f"got {self.dense}"
            )

    def steps_at(self, cost: StepCost) -> int:
        """Number of optimizer steps that the budget pays for.

        Args:
            cost: Cost of one step of the network.

        Raises:
            ValueError: The budget pays for fewer than two steps, or is in operations and the
                network has none that can be counted.
        """
        if self.steps is not None:
            steps = float(self.steps)
        elif self.flops is not None:
            if cost.flops == 0:
                raise ValueError(
                    "no floating-point operation of this network can be counted: give budget.steps "
                    "or budget.seconds instead"
                )
            steps = self.flops / cost.flops
        else:
            assert self.seconds is not None
            steps = self.seconds / cost.seconds
        steps = int(self.scale * steps)
        if steps < 2:
            raise ValueError(
                f"the budget pays for {steps} steps: one costs {cost.flops:.3g} operations and "
                f"{cost.seconds:.3g} seconds; give more, or use a smaller network or batch"
            )
        return steps
