"""The kinds of surgery, in the order in which they are replayed; add a new kind here."""

from collections.abc import Iterable

from torch import nn

from fitsmall.compressors.surgery.factors import Factorization
from fitsmall.compressors.surgery.protocol import Changed, Layout, Surgery
from fitsmall.compressors.surgery.quantizers import InputQuantizers

__all__ = ["SURGERIES", "changes", "own_tensors", "replay", "surgeries"]

SURGERIES: tuple[type[Surgery], ...] = (Factorization, InputQuantizers)


def surgeries(layout: Layout) -> list[Surgery]:
    """Return the surgeries that gave a module this layout, in order.

    Args:
        layout: Shape and dtype of each tensor of the module's state dict.

    Raises:
        ValueError: Tensors that belong to a surgery are incomplete.
    """
    found = (kind.found(layout) for kind in SURGERIES)
    return [surgery for surgery in found if surgery is not None]


def replay(module: nn.Module, layout: Layout) -> None:
    """Change the layers of a plain module to those of a module with this layout."""
    for surgery in surgeries(layout):
        surgery.replay(module)


def changes(layout: Layout) -> list[Changed]:
    """Return a row for each layer that surgery changed."""
    return [row for surgery in surgeries(layout) for row in surgery.table(layout)]


def own_tensors(names: Iterable[str]) -> list[str]:
    """Return those names that are of surgeries' settings, which are not to be averaged."""
    names = list(names)
    return [name for kind in SURGERIES for name in kind.own_tensors(names)]
