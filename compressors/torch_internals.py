"""All private names of torch that are used, each with the feature that needs it.

:func:`require` raises an error before training that says which feature needs which version, instead
of an AttributeError during training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "PRIVATE",
    "TESTED",
    "Private",
    "evaluating",
    "has_forward_pre_hook",
    "has_vnni",
    "in_backward",
    "inner_of",
    "is_there",
    "map_tensors",
    "move_hooks",
    "opened",
    "probe_of",
    "remove_forward_pre_hook",
    "require",
    "saves_buffers",
    "tensors_in",
    "unscales_gradients",
]

TESTED = "torch 2.11 to 2.13"


class Private(NamedTuple):
    """A private name of a library.

    Args:
        holder: Module, or class as ``module:class``, that has the name.
        name: Attribute of the holder or of its instances.
        feature: The feature of fitsmall that needs it.
    """

    holder: str
    name: str
    feature: str


# Dictionaries of a layer's hooks, which its replacement takes over.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_CHANNELS = "ChannelPruning and restore"
_RANKS, _QUANTIZERS = "RankLearning and factorize", "QuantizationAwareTraining and restore"
_MODULE, _OPTIMIZER = "torch.nn:Module", "torch.optim:Optimizer"

PRIVATE = (
    *(Private(_MODULE, name, _RANKS) for name in _HOOKS),
    Private(_OPTIMIZER, "_optimizer_step_pre_hooks", _RANKS),
    Private(_OPTIMIZER, "_optimizer_step_post_hooks", _RANKS),
    Private(_MODULE, "_forward_pre_hooks", _QUANTIZERS),
    Private(_MODULE, "_load_from_state_dict", _QUANTIZERS),
    Private(_MODULE, "_save_to_state_dict", _CHANNELS),
    Private(_MODULE, "_apply", _QUANTIZERS),
    Private(_MODULE, "_buffers", _QUANTIZERS),
    Private("torch.utils._pytree", "tree_leaves", "CompressedCheckpoint and export_onnx"),
    Private("torch.utils._pytree", "tree_map", "CompressedCheckpoint and export_onnx"),
)


def require(feature: str) -> None:
    """Check that this version of torch has the private names that a feature needs.

    Args:
        feature: Name of the feature, or a part of it.

    Raises:
        RuntimeError: A name is gone.
    """
    for private in PRIVATE:
        if feature in private.feature and not is_there(private):
            raise RuntimeError(
                f"{private.feature}: torch {torch.__version__} has no "
                f"{private.holder}.{private.name} any more: install {TESTED}"
            )


def is_there(private: Private) -> bool:
    """Return whether a private name exists, as an attribute or in the constructor.

    Example:
        >>> [is_there(Private("torch.nn:Module", name, "")) for name in ("_buffers", "_gone")]
        [True, False]
    """
    try:
        holder = resolve_name(private.holder)
    except (ImportError, AttributeError):
        return False
    if hasattr(holder, private.name):
        return True
    try:
        return hasattr(holder(), private.name)
    except TypeError:  # a module, or a class that takes arguments
        code = getattr(vars(holder).get("__init__"), "__code__", None)
        return code is not None and private.name in code.co_names


# Hooks.


def has_forward_pre_hook(layer: nn.Module, hook: Callable[..., Any]) -> bool:
    """Return whether a hook is registered with a layer."""
    return hook in layer._forward_pre_hooks.values()


def remove_forward_pre_hook(layer: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook by itself: a copy of a layer has no handle of it."""
    for key in [key for key, own in layer._forward_pre_hooks.items() if own is hook]:
        del layer._forward_pre_hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)


def move_hooks(layer: nn.Module, successor: nn.Module) -> None:
    """Give a successor a layer's hooks: the same dictionaries, so that handles stay valid."""
    for hooks in _HOOKS:
        setattr(successor, hooks, getattr(layer, hooks))


def in_backward() -> bool:
    """Return whether a backward pass is running: layers called in it are computed a second time.

    Activation checkpointing does so.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1)


def inner_of(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile wrapped in another one, or None."""
    inner: nn.Module | None = getattr(module, "_orig_mod", None)
    return inner


def saves_buffers(layer: nn.Module) -> bool:
    """Return whether a layer saves all of its buffers: some layers say themselves what they save.

    Example:
        >>> saves_buffers(nn.Linear(1, 1))
        True
    """
    return type(layer)._save_to_state_dict is nn.Module._save_to_state_dict


# Optimizers.


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer unscales gradients itself, as fused ones do under a scaler."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def probe_of(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter) -> Optimizer:
    """Return a copy of an optimizer that holds only one parameter, with the settings of a group.

    No constructor runs. Hooks and the wrapper that a scheduler puts around ``step`` are left out.

    Args:
        optimizer: Optimizer to copy.
        group: Its group of parameters with the settings.
        parameter: Parameter of the copy.
    """
    probe: Optimizer = object.__new__(type(optimizer))
    own = {name: value for name, value in vars(optimizer).items() if name != "step"}
    vars(probe).update(own)
    probe._optimizer_step_pre_hooks = type(own["_optimizer_step_pre_hooks"])()
    probe._optimizer_step_post_hooks = type(own["_optimizer_step_post_hooks"])()
    probe.param_groups = [{**group, "params": [parameter]}]
    probe.state = type(optimizer.state)(dict)
    return probe


# The processor.


def has_vnni() -> bool:
    """Return whether the processor adds products of 8-bit integers in 32 bits (VNNI)."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: True)())


# Nested inputs and outputs.


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context in which a module and all modules in it are in evaluation mode.

    Example:
        >>> layer = nn.Dropout()
        >>> with evaluating(layer):
        ...     layer.training
        False
        >>> layer.training
        True
    """
    modes = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of one of torch's functions, in which modes see the functions that it calls.

    A function that is written in Python is handed to a mode as a whole.

    Args:
        function: Function of ``torch.nn.functional``.

    Example:
        >>> opened(torch.nn.functional.softmin)(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    names = function.__globals__ | {
        name: lambda *tensors: False for name in function.__code__.co_names if "has_torch" in name
    }
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries, in order.

    Example:
        >>> tensors_in({"a": [torch.tensor(1)], "b": "text"})
        [tensor(1)]
    """
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a nested value with a function applied to each tensor in it.

    Example:
        >>> map_tensors(len, {"a": [torch.ones(3)], "b": "text"})
        {'a': [3], 'b': 'text'}
    """
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)
