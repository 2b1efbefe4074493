"""Coverage: the share of a network's parameters that a stage acts on, and what it leaves out."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from fitsmall.compressors.naming import abridged, group_by, grouped
from fitsmall.compressors.select import EXCLUDED, FROZEN, NOT_INCLUDED
from fitsmall.compressors.training.stage import Stage
from fitsmall.compressors.weights import BIAS_OR_NORM, POSITIONS, TOKEN

__all__ = ["Group", "coverage_warning", "groups", "num_weights"]

# Reasons that need no warning.
_DELIBERATE = (BIAS_OR_NORM, EXCLUDED, NOT_INCLUDED, FROZEN)

# Below this share a stage warns.
_LEAST = 0.8


class Group(NamedTuple):
    """Parameters whose names differ in numbers alone.

    Args:
        pattern: Pattern of the names.
        names: The names.
        weights: Number of weights in all of them.
        bytes: Their bytes.
    """

    pattern: str
    names: list[str]
    weights: int
    bytes: int


def groups(parameters: Mapping[str, Tensor], names: Iterable[str]) -> list[Group]:
    """Return parameters in groups, the largest first.

    Args:
        parameters: All parameters by name.
        names: Names of those to group.
    """
    found = []
    for pattern, alike in grouped(names):
        tensors = [parameters[name] for name in alike if not is_lazy(parameters[name])]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        found.append(Group(pattern, alike, num_weights(tensors), size))
    return sorted(found, key=lambda group: -group.weights)


def num_weights(tensors: Iterable[Tensor]) -> int:
    """Return the number of weights in some tensors; those that are not initialised have none."""
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


def coverage_warning(stage: Stage) -> str | None:
    """Return a warning if a stage leaves out much that the user did not leave out, else None.

    It counts weights that are neither biases and norms, nor frozen, nor left out by the stage's
    ``include`` and ``exclude``. It also warns if all weights of the stage are frozen.
    """
    selection, parameters = stage.selection, stage.parameters
    kind = type(stage).__name__
    waiting = selection.waiting
    if waiting and not selection.chosen and all(selection.skipped[n] == FROZEN for n in waiting):
        listed = abridged([pattern for pattern, _ in grouped(waiting)], most=3)
        return (
            f"{kind} acts on nothing, since all of its weights are frozen: {listed}. They join "
            f"once their requires_grad is True; if they stay frozen, leave {kind} out"
        )
    left = [name for name, reason in selection.skipped.items() if reason not in _DELIBERATE]
    acted = num_weights(selection.chosen.values())
    total = acted + num_weights(parameters[name] for name in left)
    if not selection.chosen or acted >= _LEAST * total:
        return None
    largest = [
        (group, reason)
        for reason, names in group_by(left, lambda name: selection.skipped[name]).items()
        for group in groups(parameters, names)
    ]
    largest = sorted(largest, key=lambda entry: -entry[0].weights)[:3]
    listed = "; ".join(
        f"{group.pattern} ({group.weights / total:.0%}: {reason})" for group, reason in largest
    )
    text = f"{kind} acts on {acted / total:.0%} of the weights. The largest left out: {listed}"
    patterns = [
        re.sub(r"\d+-\d+", "*", group.pattern)
        for group, reason in largest
        if reason in (POSITIONS, TOKEN) and stage.takes_any_weight
    ]
    if patterns:
        text += f". To act on them too, add a second {kind}(include={patterns!r})"
    return text
