"""The file that a module would make, with other values of some of its parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.training.sharding import of_first, whole
from fitsmall.compressors.weights import is_statistic

__all__ = ["FileOf", "rounded"]

_BYTES_OF_STATISTIC = 2


class FileOf:
    """Measure the file of a module, really coded.

    Running statistics of batch-norms count as bfloat16. A parameter that is not initialized yet
    does not count.

    Args:
        module: The module.
        coder: Coder of the file, see :func:`~fitsmall.compressors.save`.

    Attributes:
        left_out: Tensors that do not count.

    Example:
        >>> import torch
        >>> layer = nn.Linear(100, 10)
        >>> FileOf(layer, "context").size({layer.weight: torch.zeros(10, 100)}) < 4 * 100
        True
    """

    def __init__(self, module: nn.Module, coder: str) -> None:
        self.module, self.coder = module, coder
        self.left_out: set[Tensor] = set()

    @property
    def is_lazy(self) -> bool:
        """Whether some parameters are not initialized yet."""
        return any(map(is_lazy, self._tensors().values()))

    def size(self, changed: Mapping[Tensor, Tensor] | None = None) -> int:
        """Return the bytes of the file, the same on every process.

        Args:
            changed: Other values of some parameters, which hold where these are tied, too.
        """
        return of_first(coded_size(self._file(changed or {}), self.coder))

    def least(self, changed: Mapping[Tensor, Tensor]) -> int:
        """Return the same for floating-point buffers that have become as random as they can be.

        Args:
            changed: Other values of some parameters.
        """
        tensors = self._file(changed)
        names = dict(self.module.named_buffers()).keys() & tensors.keys()
        buffers = {name: tensors.pop(name) for name in names if tensors[name].is_floating_point()}
        return of_first(coded_size(tensors, self.coder)) + sum(
            buffer.numel() * (_BYTES_OF_STATISTIC if is_statistic(name) else buffer.itemsize)
            for name, buffer in buffers.items()
        )

    def _file(self, changed: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        file = {
            name: changed[tensor] if tensor in changed else whole(tensor.detach())
            for name, tensor in self._tensors().items()
            if tensor not in self.left_out and not is_lazy(tensor)
        }
        return {name: rounded(t) if is_statistic(name) else t for name, t in file.items()}

    def _tensors(self) -> dict[str, Tensor]:
        state: dict[str, Any] = self.module.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def rounded(tensor: Tensor) -> Tensor:
    """Round to bfloat16, and keep the type.

    Args:
        tensor: Floating-point values.
    """
    return tensor.bfloat16().to(tensor.dtype)
