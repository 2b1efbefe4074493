"""The weights that a training starts from: a compressed file, a checkpoint, or safetensors."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fitsmall.compressors import restore

__all__ = ["load_weights"]


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into a module.

    Args:
        module: The module.
        path: A compressed file; or, by its suffix, a checkpoint of Lightning or a state dict
            (``.ckpt``, ``.pt``, ``.pth``), or ``.safetensors``.

    Raises:
        OSError: There is no such file.
        ValueError: The file is damaged, holds more than tensors and numbers, or is not for the
            module.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: name a checkpoint, or a .fitsmall file")
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    elif file.suffix in (".ckpt", ".pt", ".pth"):
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{file} holds more than tensors and numbers, or is damaged: save it again with "
                "torch.save(module.state_dict(), ...)"
            ) from error
        if not isinstance(saved, Mapping):
            raise ValueError(f"{file} holds a {type(saved).__name__}, and no state dict")
        state = saved.get("state_dict", saved)
    else:
        restore(module, file)
        return
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} does not fit {type(module).__name__}: {reason}") from error
