"""The table of a plan: which stage acts on which parameters, when, and why others are left out."""

from collections.abc import Mapping, Sequence

from fitsmall.compressors.training.clock import Window
from fitsmall.compressors.training.stage import Stage

__all__ = ["plan_table"]


def plan_table(stages: Sequence[Stage], windows: Mapping[str, Window]) -> str:
    """Return the table of stages.

    Args:
        stages: Stages in order.
        windows: Windows by the stages' keys; a stage without one shows its fractions of training.
    """
    lines = ["Compression plan"]
    for stage in stages:
        window = windows.get(stage.key)
        when = f"steps {window.first:,} to {window.last:,}" if window else _fractions(stage)
        chosen = stage.selection.chosen
        weights = sum(parameter.numel() for parameter in chosen.values())
        coupling = stage.coupling.replace("_", "-")
        lines.append(f"  {type(stage).__name__}: {stage.describe()}, {coupling}, {when}")
        lines.append(f"    {len(chosen)} tensors, {weights:,} weights: {', '.join(chosen)}")
        lines.extend(f"    {remark}" for remark in stage.remarks())
    touched = {name for stage in stages for name in stage.selection.chosen}
    skipped = {
        name: reason
        for stage in reversed(stages)  # the first stage's reason counts
        for name, reason in stage.selection.skipped.items()
        if name not in touched
    }
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, own in skipped.items() if own == reason]
        lines.append(f"  left out ({reason}): {', '.join(names)}")
    return "\n".join(lines)


def _fractions(stage: Stage) -> str:
    bounds = []
    for name in ("start", "stop"):
        step, fraction = getattr(stage, f"{name}_step"), getattr(stage, name)
        bounds.append(f"step {step:,}" if step is not None else f"{fraction:g} of training")
    return f"from {bounds[0]} to {bounds[1]}"
