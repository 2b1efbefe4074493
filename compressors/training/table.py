"""The table of a plan: which stage acts on which parameters, when, and why others are left out."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fitsmall.compressors.naming import abridged, group_by
from fitsmall.compressors.training.clock import Window
from fitsmall.compressors.training.coverage import groups, num_weights
from fitsmall.compressors.training.stage import Stage

__all__ = ["plan_table"]

# Groups of parameters, and reasons, that are written out.
_ROWS, _REASONS = 18, 8


def plan_table(stages: Sequence[Stage], windows: Mapping[str, Window]) -> str:
    """Return the table of stages.

    Args:
        stages: Stages in order.
        windows: Windows by the stages' keys; a stage without one shows its fractions of training.
    """
    parameters = stages[0].parameters if stages else {}
    total = num_weights(parameters.values())
    lines = [f"Compression plan of {total:,} parameters"]
    sets = {frozenset(stage.selection.chosen): type(stage).__name__ for stage in reversed(stages)}
    shown: set[frozenset[str]] = set()
    for stage in stages:
        window = windows.get(stage.key)
        when = f"steps {window.first:,} to {window.last:,}" if window else _fractions(stage)
        coupling = stage.coupling.replace("_", "-")
        lines.append(f"  {type(stage).__name__}: {stage.describe()}, {coupling}, {when}")
        lines.extend(f"    {remark}" for remark in stage.remarks())
        chosen = frozenset(stage.selection.chosen)
        acts = f"    acts on {_share(num_weights(stage.selection.chosen.values()), total)}"
        if not chosen:
            lines.append("    acts on nothing")
        elif chosen in shown:
            lines.append(f"{acts}: as {sets[chosen]}")
        else:
            lines.append(f"{acts}:")
            lines.extend(_rows(parameters, stage.selection.chosen, total, _ROWS // len(sets)))
        shown.add(chosen)
    return "\n".join([*lines, *_left_out(stages, parameters, total)])


def _rows(
    parameters: Mapping[str, Tensor], names: Mapping[str, Tensor], total: int, most: int
) -> list[str]:
    """Return a row for each of the largest groups of parameters, and one for all others."""
    found = groups(parameters, names)
    rows = [
        (group.pattern, _times(group.names), f"{group.weights:,}", _share(group.weights, total))
        for group in found[:most]
    ]
    if others := found[most:]:
        names_of_others = [name for group in others for name in group.names]
        weights = sum(group.weights for group in others)
        label = f"{len(others)} more patterns"
        rows.append((label, _times(names_of_others), f"{weights:,}", _share(weights, total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "      "
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        )
        for row in rows
    ]


def _left_out(stages: Sequence[Stage], parameters: Mapping[str, Tensor], total: int) -> list[str]:
    """Return a line for each reason why no stage acts on some parameters."""
    touched = {name for stage in stages for name in stage.selection.chosen}
    skipped = {
        name: reason
        for stage in reversed(stages)  # the first stage's reason counts
        for name, reason in stage.selection.skipped.items()
        if name not in touched
    }
    rows = []
    for reason, names in group_by(skipped, lambda name: skipped[name]).items():
        found = groups(parameters, names)
        weights, size = sum(group.weights for group in found), sum(group.bytes for group in found)
        listed = abridged([group.pattern for group in found], most=3)
        share = f"{_share(weights, total)}, {size:,} bytes"
        rows.append((weights, f"  left out ({reason}): {listed}; {share}"))
    lines = [line for _, line in sorted(rows, key=lambda row: -row[0])]
    more = len(lines) - _REASONS
    return lines if more <= 0 else [*lines[:_REASONS], f"  left out for {more} more reasons"]


def _times(names: Sequence[str]) -> str:
    return f"{len(names)} x" if len(names) > 1 else ""


def _share(weights: int, total: int) -> str:
    return f"{100 * weights / max(1, total):.1f} %"


def _fractions(stage: Stage) -> str:
    bounds = []
    for name in ("start", "stop"):
        step, fraction = getattr(stage, f"{name}_step"), getattr(stage, name)
        bounds.append(f"step {step:,}" if step is not None else f"{fraction:g} of training")
    return f"from {bounds[0]} to {bounds[1]}"
