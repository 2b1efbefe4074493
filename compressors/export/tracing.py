"""Tracing: the arguments of a module's forward, and its graph for any number of examples."""

import inspect
import logging
import os
import traceback
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.torch_internals import tensors_in

__all__ = ["PREFIX", "Arguments", "Examples", "cause_of", "outputs_of", "trace"]

Examples = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]

# The traced module is a submodule of this name, so that its forward may have any signature.
PREFIX = "module."

# Characters of another library's message that an error repeats.
_LONGEST = 200

# OpenVINO's lines on where in its own source an error came from.
_WHERE = ("Exception from", "Check '")


@dataclass(frozen=True)
class Arguments:
    """The arguments of a forward pass: tensors with examples in the first dimension.

    Args:
        positional: Arguments that are passed by position.
        named: Arguments that are passed by keyword.
    """

    positional: tuple[Tensor, ...]
    named: dict[str, Tensor]

    @classmethod
    def of(cls, examples: Examples) -> "Arguments":
        """Return arguments: one tensor, a tensor for each by position, or a mapping from names.

        Raises:
            ValueError: An argument is no tensor, or they differ in their number of examples.

        Example:
            >>> Arguments.of({"x": torch.ones(2, 1), "mask": torch.ones(3, 1)})
            Traceback (most recent call last):
                ...
            ValueError: the inputs x (2), mask (3) differ in their first dimension, which counts ...
        """
        if isinstance(examples, Mapping):
            given: dict[Any, Tensor] = dict(examples)
        else:
            given = dict(enumerate([examples] if isinstance(examples, Tensor) else examples))
        for name, value in given.items():
            if not isinstance(value, Tensor) or not value.dim():
                raise ValueError(
                    f"input {name} is no tensor with examples in its first dimension: leave it "
                    "out, or set it in the forward of a module around yours"
                )
        if len({len(value) for value in given.values()}) > 1:
            sizes = ", ".join(f"{name} ({len(value)})" for name, value in given.items())
            raise ValueError(
                f"the inputs {sizes} differ in their first dimension, which counts examples: keep "
                "an input that is the same for all examples in a buffer of a module around yours"
            )
        given = {name: value.detach().cpu() for name, value in given.items()}
        named = isinstance(examples, Mapping)
        return cls((), given) if named else cls(tuple(given.values()), {})

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments, in order."""
        return [*self.positional, *self.named.values()]

    def names(self, module: nn.Module) -> list[str]:
        """Return the names of all arguments in a module's forward.

        Example:
            >>> Arguments.of(torch.ones(2, 4)).names(nn.Linear(4, 3))
            ['input']
        """
        parameters = inspect.signature(module.forward).parameters.values()
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [parameter.name for parameter in parameters if parameter.kind in kinds]
        more = [f"args_{i}" for i in range(len(names), len(self.positional))]  # of *args
        return [*names, *more][: len(self.positional)] + list(self.named)


def outputs_of(module: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Return the tensors in a module's outputs, which may be nested, in order."""
    return tensors_in(module(*arguments.positional, **arguments.named))


class _Traced(nn.Module):
    """A module with a fixed signature, whose outputs are a tuple of tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> tuple[Any, ...]:
        return tuple(outputs_of(self.module, Arguments(positional, named)))


def trace(
    module: nn.Module, arguments: Arguments, dynamic: bool = False
) -> torch.export.ExportedProgram:
    """Return the graph of a module's forward pass; parameters have :data:`PREFIX` in their names.

    Args:
        module: The module, in evaluation mode.
        arguments: Arguments of its forward.
        dynamic: Whether the graph is for any number of examples, instead of that of the arguments.

    Raises:
        ValueError: The forward cannot be traced.
    """
    positional, named = arguments.positional, arguments.named
    if dynamic and len(arguments) == 1:  # of one example, torch makes a graph for one alone
        positional = tuple(torch.cat([x, x]) for x in positional)
        named = {name: torch.cat([x, x]) for name, x in named.items()}
    size: Any = {0: torch.export.Dim("batch")} if dynamic else None
    shapes = tuple(size for _ in positional), dict.fromkeys(named, size)
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Before it raises an error, torch prints the graph. The old weight norm sets an attribute.
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            return torch.export.export(
                _Traced(module), (positional, named), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        if str(error).startswith("Constraints violated"):
            raise ValueError(
                f"the forward of {type(module).__name__} is for {len(arguments)} examples alone: "
                "derive shapes from those of the inputs, as in x.reshape(len(x), -1)"
            ) from error
        place = _place(error)
        raise ValueError(
            f"the forward of {type(module).__name__} cannot be traced"
            f"{f', {place}' if place else ''}: {cause_of(error)}. Its control flow and its shapes "
            "must not depend on values of tensors: use torch.where or torch.cond, or export the "
            "part of the network without it."
        ) from error
    finally:
        logger.setLevel(level)


def cause_of(error: BaseException) -> str:
    """Return the first sentence of the first error in a chain of causes.

    Example:
        >>> cause_of(ValueError("It failed. More advice:\\n..."))
        'It failed'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_WHERE)]
    sentence = said[0].partition(". ")[0].rstrip(".") if said else type(error).__name__
    return sentence[:_LONGEST]


def _place(error: BaseException) -> str:
    """Return the line outside of torch and of this package where an error came from, if any."""
    ours = tuple(str(Path(path).parent) + os.sep for path in (torch.__file__, __file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours) and Path(frame.filename).is_file()
    ]
    return f"in {frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""
