"""Selection: the parameters that a method acts on, and the reason for each one left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.naming import abridged, group_by, grouped
from fitsmall.compressors.weights import Matrices, is_multiplied, matrices_of, no_weight

__all__ = ["EXCLUDED", "FROZEN", "NOT_INCLUDED", "Selection", "match", "select"]

T = TypeVar("T")

# Reasons why a parameter is left out that are the user's own.
EXCLUDED, NOT_INCLUDED, FROZEN = "excluded", "not included", "frozen: requires_grad is False"


# Part of a name by which a factor differs from the weight or bias that it replaced.
_FACTOR = re.compile(r"\.(reduce|expand)(?=\.(weight|bias)$)")


@dataclass(frozen=True)
class Selection:
    """Parameters by name, and the reason for each one left out.

    Args:
        chosen: The selected parameters in the module's order; tied ones under their first name.
        skipped: Reason by name for all the others.
        waiting: Skipped parameters that are selected once they are trainable and initialised.
        forms: Dimensions of each chosen parameter by name.
    """

    chosen: Mapping[str, nn.Parameter]
    skipped: Mapping[str, str]
    waiting: Mapping[str, nn.Parameter] = field(default_factory=dict)
    forms: Mapping[str, Matrices] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> "Selection":
        """Return the selection without more parameters.

        Args:
            reasons: Reason for each parameter to leave out, by name.

        Raises:
            ValueError: Nothing remains.
        """
        chosen = {name: p for name, p in self.chosen.items() if name not in reasons}
        skipped = {**self.skipped, **reasons}
        return Selection(chosen, skipped, self.waiting, self.forms).checked()

    def match(self, overrides: Mapping[str, T]) -> dict[str, T]:
        """Return the override of each chosen parameter that has one, see :func:`match`.

        A pattern may also be that of parameters that wait.
        """
        found = match(overrides, [*self.chosen, *self.waiting])
        return {name: found[name] for name in self.chosen if name in found}

    def checked(self) -> "Selection":
        """Return the selection itself, if it has chosen or waiting parameters.

        Raises:
            ValueError: It has none.
        """
        if not self.chosen and not self.waiting:
            by_reason = group_by(self.skipped, self.skipped.get)
            reasons = "; ".join(
                f"{abridged([pattern for pattern, _ in grouped(names)])}: {reason}"
                for reason, names in by_reason.items()
            )
            raise ValueError(
                "name other parameters with include=[...], or leave the method out, since there is "
                "nothing to compress: "
                f"{reasons or 'the module has no parameters'}"
            )
        return self


def select(
    module: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> Selection:
    """Return the weights of a module: all of its matrices, or the parameters asked for.

    Weights are all parameters of two and more dimensions, of any layer, but for norms, biases and
    learned positions; see :func:`~fitsmall.compressors.weights.no_weight`. Patterns are shell globs
    on parameter names (``"encoder.*.weight"``); the name of a module matches all parameters in it
    (``"encoder"``).

    Args:
        module: Module to search.
        include: Patterns that replace the default; biases, norms and positions can be named here.
        exclude: Patterns to leave out.

    Raises:
        ValueError: A pattern matches nothing, or nothing is selected.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> list(select(net, exclude="2").chosen), select(net, exclude="2").skipped["1.weight"]
        (['0.weight'], 'a bias or a norm')
    """
    parameters = dict(module.named_parameters())
    # Tied parameters answer to all of their names.
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)

    def matches(parameter: nn.Parameter, pattern: str) -> bool:
        return any(_matches(name, pattern) for name in names[parameter])

    included, excluded = _patterns(include), _patterns(exclude)
    for pattern in [*(included or ()), *(excluded or ())]:
        if not any(matches(parameter, pattern) for parameter in names):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter of {type(module).__name__}; "
                f"{_nearest(pattern, list(parameters))}"
            )
    chosen, skipped, waiting = {}, {}, {}
    for name, parameter in parameters.items():
        if included is not None and not any(matches(parameter, p) for p in included):
            skipped[name] = NOT_INCLUDED
        elif any(matches(parameter, p) for p in excluded or ()):
            skipped[name] = EXCLUDED
        elif included is None and (reason := _no_weight(module, names[parameter])):
            skipped[name] = reason
        elif not is_lazy(parameter) and not any(is_multiplied(module, n) for n in names[parameter]):
            skipped[name] = "its layer computes the weight from it by more than scaling"
        elif not parameter.is_floating_point():
            skipped[name] = f"its dtype is {parameter.dtype}"
        elif is_lazy(parameter):
            skipped[name], waiting[name] = "not initialised yet", parameter
        elif not parameter.requires_grad:
            skipped[name], waiting[name] = FROZEN, parameter
        elif not parameter.numel():
            skipped[name] = "it is empty"
        else:
            chosen[name] = parameter
    forms = {name: matrices_of(module, name) for name in chosen}
    return Selection(chosen, skipped, waiting, forms).checked()


def match(overrides: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """Return the override of each name that has one; the last pattern that matches counts.

    Args:
        overrides: Values by pattern, see :func:`select`.
        names: Names of the selected parameters.

    Raises:
        ValueError: A pattern matches none of the names.

    Example:
        >>> match({"*": 8, "conv1*": 16}, ["conv1.weight", "fc.weight"])
        {'conv1.weight': 16, 'fc.weight': 8}
    """
    found: dict[str, T] = {}
    for pattern, value in overrides.items():
        matching = [name for name in names if _matches(name, pattern)]
        if not matching:
            raise ValueError(
                f"override {pattern!r} matches none of the selected parameters; "
                f"{_nearest(pattern, names)}"
            )
        found.update(dict.fromkeys(matching, value))
    return {name: found[name] for name in names if name in found}


def _no_weight(module: nn.Module, names: Sequence[str]) -> str | None:
    """Return the reason why a parameter is no weight under any of its names."""
    reasons = [no_weight(module, name) for name in names]
    return None if None in reasons else reasons[0]


def _matches(name: str, pattern: str) -> bool:
    # Factors answer to the name of the weight that they replaced, as patterns outlive surgery.
    names = (name, _FACTOR.sub("", name))
    return any(fnmatchcase(own, pattern) or own.startswith(f"{pattern}.") for own in names)


def _patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Return a hint at names that may have been meant."""
    near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
    more = len(names) - len(near)
    return f"did you mean {' or '.join(near) or 'another module'}? ({more} more)"
