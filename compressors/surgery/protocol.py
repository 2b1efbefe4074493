"""Surgery: changes of a module's layers that leave its function as it was."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Changed", "Layout", "Surgery", "TensorSpec", "layout_of"]


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


Layout = Mapping[str, TensorSpec]
"""Shape and dtype of every tensor of a state dict, by name."""


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return shape and dtype of tensors by name.

    Example:
        >>> layout_of({"bias": torch.zeros(3)})
        {'bias': TensorSpec(shape=torch.Size([3]), dtype=torch.float32)}
    """
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Changed(NamedTuple):
    """A row about a layer that surgery changed, for reports and curves.

    Args:
        layer: Name of the layer.
        description: Short description of the change.
        bytes: Bytes of its weights now, uncompressed.
        bytes_before: Bytes of its weights before surgery.
    """

    layer: str
    description: str
    bytes: int
    bytes_before: int


class Surgery(ABC):
    """A set of changes of a module's layers, all of one kind.

    Training creates a surgery and applies it to a module and its optimizers. In a file or
    checkpoint of the changed module the names and shapes of tensors identify it: :meth:`found`
    creates the surgery again from these, and :meth:`replay` changes a plain module so that it can
    load them.
    """

    kind: ClassVar[str]
    """Name of the kind, in messages."""

    @classmethod
    @abstractmethod
    def found(cls, layout: Layout) -> Self | None:
        """Return the surgery that gave a module this layout, or None if there was none.

        Raises:
            ValueError: Tensors that belong to a surgery are incomplete.
        """

    @classmethod
    @abstractmethod
    def own_tensors(cls, names: Iterable[str]) -> list[str]:
        """Return those names that are of a surgery's settings, and not of weights."""

    @abstractmethod
    def expect(self, module: nn.Module, layout: Layout) -> dict[str, TensorSpec]:
        """Return the layout of a module's state dict after surgery, without changing the module.

        Args:
            module: Module before any surgery.
            layout: Layout of its state dict after the surgeries before this one.

        Raises:
            ValueError: The module has no such layer, or sizes do not fit it.
        """

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """Check the values of a changed module's tensors that are settings.

        Args:
            tensors: Its state dict.

        Raises:
            ValueError: A setting is impossible.
        """

    @abstractmethod
    def apply(self, module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, bool]:
        """Change the layers of a module in place, and put new parameters into its optimizers.

        Returns:
            For each replaced weight by name, whether its whole optimizer state was carried over to
            its successors.
        """

    @abstractmethod
    def replay(self, module: nn.Module) -> None:
        """Give a plain module the layers of the changed one; layers that are changed already stay.

        Values are undefined until a state dict is loaded.
        """

    def stored(self, module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict that a module would have after surgery, for a file.

        Args:
            module: Module to which the surgery has not been applied.
            tensors: Its whole state dict.
        """
        return tensors

    @abstractmethod
    def undo(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict that the plain module would have, and warn of what it cannot hold.

        Args:
            module: The changed module, which stays as it is.
            tensors: Its state dict, without what later surgeries changed.
        """

    @abstractmethod
    def table(self, layout: Layout) -> list[Changed]:
        """Return a row for each changed layer, from the layout of the changed module."""
