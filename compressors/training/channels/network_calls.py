"""The networks in a module, and example inputs of each: those of its first call in training.

A LightningModule may be the network itself, or hold one, or several, and call them with whatever it
likes. A *network* is a module that is called while no other one of the module runs.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fitsmall.compressors.torch_internals import in_backward, inner_of, map_tensors, tensors_in

__all__ = ["Call", "NetworkCalls"]

# Examples of a batch that are kept.
_EXAMPLES = 2


class Call(NamedTuple):
    """A call of a network.

    Args:
        network: The network.
        args: Inputs by position.
        kwargs: Inputs by name.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class NetworkCalls:
    """Hooks that record the first call of each network in a module, with two examples.

    Until those of all instances are removed, compiled modules run as they are: a compiled call runs
    no hooks.

    Attributes:
        found: The calls by the path of the network.
    """

    _hooked: ClassVar[WeakSet["NetworkCalls"]] = WeakSet()
    _eager: ClassVar[ExitStack] = ExitStack()

    def __init__(self) -> None:
        self.found: dict[str, Call] = {}
        self._module = nn.Module()
        self._handles: list[RemovableHandle] = []
        self._running: list[str] = []

    def hook(self, module: nn.Module) -> None:
        """Record the calls of networks in a module, until :meth:`unhook`."""
        self.unhook()
        self._module, self._running = module, []
        if not self._hooked:
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        self._hooked.add(self)
        for path, layer in module.named_modules():
            recorder = _Recorder(self, path)
            self._handles += [
                layer.register_forward_pre_hook(recorder.enter, with_kwargs=True),
                layer.register_forward_hook(recorder.leave, always_call=True),
            ]

    def unhook(self) -> None:
        """Remove the hooks."""
        self._hooked.discard(self)
        if not self._hooked:
            self._eager.close()
        while self._handles:
            self._handles.pop().remove()

    def is_redirected(self, layer: nn.Module) -> bool:
        """Return whether a call of the whole module runs something else than its forward.

        DistributedDataParallel calls a LightningModule, which then runs its training step.
        """
        own = vars(layer).get("forward")
        return (
            layer is self._module
            and own is not None
            and getattr(own, "__func__", None) is not type(layer).forward
        )


class _Recorder:
    """The two hooks of a module in the tree."""

    def __init__(self, calls: NetworkCalls, path: str) -> None:
        self.calls, self.path = calls, path

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = self.calls
        if in_backward() or calls.is_redirected(layer):
            return
        calls._running.append(self.path)
        if len(calls._running) > 1 or next(layer.parameters(), None) is None:
            return
        # torch.compile puts a module around the network.
        network, path = layer, self.path
        while inner := inner_of(network):
            name = next(name for name, child in network.named_children() if child is inner)
            network, path = inner, f"{path}.{name}".lstrip(".")
        if path not in calls.found:
            calls.found[path] = _example(network, args, kwargs)

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.calls._running[-1:] == [self.path]:
            self.calls._running.pop()


def _example(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Return a call with copies of its inputs; of two examples, where all tensors hold as many."""
    tensors = tensors_in((args, dict(kwargs)))
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    most = _EXAMPLES if len(counts) == 1 else None
    # Autocast gives a network inputs of another type than it takes by itself.
    dtypes = [*{p.dtype for p in network.parameters() if p.is_floating_point()}]

    def kept(tensor: Tensor) -> Tensor:
        copied = (tensor[:most] if tensor.dim() else tensor).detach().clone()
        alike = len(dtypes) == 1 and tensor.is_floating_point()
        return copied.to(dtypes[0]) if alike else copied

    return Call(network, *map_tensors(kept, (tuple(args), dict(kwargs))))
