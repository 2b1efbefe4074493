"""The kinds of surgery, in the order in which they are replayed; add a new kind here."""

from collections.abc import Iterable

from torch import Tensor, nn

from fitsmall.compressors.surgery.factors import Factorization
from fitsmall.compressors.surgery.narrowing import Narrowing
from fitsmall.compressors.surgery.protocol import Changed, Layout, Surgery, layout_of
from fitsmall.compressors.surgery.quantizers import InputQuantizers

__all__ = ["SURGERIES", "changes", "own_tensors", "replay", "surgeries", "to_plain"]

SURGERIES: tuple[type[Surgery], ...] = (Narrowing, Factorization, InputQuantizers)


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


def to_plain(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a module as its plain class would have it.

    Factors are multiplied out to the weight, under its plain name, and quantizers of inputs are
    left out, with a warning. Loaded into the plain class, it gives the same outputs but for
    rounding errors and the rounding of inputs. It serves other libraries::

        model.save_pretrained(folder, state_dict=to_plain(model))
        torch.save(to_plain(module), "plain.pt")

    :func:`~fitsmall.compressors.save` needs no plain names, and loses nothing.

    Args:
        module: Module, changed or not; it stays as it is.

    Returns:
        Its tensors; those that are no product are not copied.

    Example:
        >>> from fitsmall.compressors import Rank, factorize
        >>> net = nn.Sequential(nn.Linear(20, 10))
        >>> factorize(net, {"0.weight": Rank("channels", 3)})
        >>> list(net.state_dict())
        ['0.factor_form', '0.reduce.weight', '0.expand.weight', '0.expand.bias']
        >>> {name: tuple(tensor.shape) for name, tensor in to_plain(net).items()}
        {'0.weight': (10, 20), '0.bias': (10,)}
    """
    tensors: dict[str, Tensor] = module.state_dict()
    for surgery in reversed(surgeries(layout_of(tensors))):
        tensors = surgery.undo(module, tensors)
    return tensors


def changes(layout: Layout) -> list[Changed]:
    """Return a row for each layer that surgery changed."""
    return [row for surgery in surgeries(layout) for row in surgery.table(layout)]


def own_tensors(names: Iterable[str]) -> list[str]:
    """Return those names that are of surgeries' settings, which are not to be averaged."""
    names = list(names)
    return [name for kind in SURGERIES for name in kind.own_tensors(names)]
