"""Selection: the parameters that a method acts on, and the reason for each one left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["LAYERS", "Selection", "match", "select"]

T = TypeVar("T")

# Layers whose weights hold the bytes; norms and biases are few and sensitive.
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.Bilinear,
)
# nn.MultiheadAttention keeps its projections as bare parameters of its own.
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


# Part of a name by which a factor differs from the weight or bias that it replaced.
_FACTOR = re.compile(r"\.(reduce|expand)(?=\.(weight|bias)$)")


@dataclass(frozen=True)
class Selection:
    """Parameters by name, and the reason for each one left out.

    Args:
        chosen: The selected parameters in the module's order; tied ones under their first name.
        skipped: Reason by name for all the others.
        waiting: Skipped parameters that are selected once they are trainable and initialised.
    """

    chosen: Mapping[str, nn.Parameter]
    skipped: Mapping[str, str]
    waiting: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> "Selection":
        """Return the selection without more parameters.

        Args:
            reasons: Reason for each parameter to leave out, by name.

        Raises:
            ValueError: Nothing remains.
        """
        chosen = {name: p for name, p in self.chosen.items() if name not in reasons}
        return Selection(chosen, {**self.skipped, **reasons}, self.waiting).checked()

    def checked(self) -> "Selection":
        """Return the selection itself, if it has chosen or waiting parameters.

        Raises:
            ValueError: It has none.
        """
        if not self.chosen and not self.waiting:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise ValueError(
                f"nothing to compress ({reasons or 'the module has no parameters'}): name "
                "parameters with include=[...]"
            )
        return self


def select(
    module: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> Selection:
    """Return the weights of Linear, Conv, Embedding and attention layers, or those asked for.

    Patterns are shell globs on parameter names (``"encoder.*.weight"``); the name of a module
    matches all parameters in it (``"encoder"``). Recurrent layers and EmbeddingBag are not selected
    by default; include them by name.

    Args:
        module: Module to search.
        include: Patterns that replace the default; biases and norms can be named here.
        exclude: Patterns to leave out.

    Raises:
        ValueError: A pattern matches nothing, or nothing is selected.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        >>> list(select(net, exclude="2").chosen), select(net, exclude="2").skipped["1.weight"]
        (['0.weight'], 'not the weight of a Linear, Conv, Embedding or attention layer')
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
    weights = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
        if (isinstance(layer, LAYERS) and name == "weight")
        or (isinstance(layer, nn.MultiheadAttention) and name in _ATTENTION)
    }
    chosen, skipped, waiting = {}, {}, {}
    for name, parameter in parameters.items():
        if included is not None and not any(matches(parameter, p) for p in included):
            skipped[name] = "not included"
        elif included is None and not weights.intersection(names[parameter]):
            skipped[name] = "not the weight of a Linear, Conv, Embedding or attention layer"
        elif any(matches(parameter, p) for p in excluded or ()):
            skipped[name] = "excluded"
        elif not parameter.is_floating_point():
            skipped[name] = f"its dtype is {parameter.dtype}"
        elif is_lazy(parameter):
            skipped[name], waiting[name] = "not initialised yet", parameter
        elif not parameter.requires_grad:
            skipped[name], waiting[name] = "frozen: requires_grad is False", parameter
        elif not parameter.numel():
            skipped[name] = "it is empty"
        else:
            chosen[name] = parameter
    return Selection(chosen, skipped, waiting).checked()


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
