"""A warning where a library saves a changed module without knowing of the change."""

import traceback
import warnings
from typing import Any

from torch import nn

__all__ = ["warn_of_save_pretrained"]

# Methods of transformers, diffusers and huggingface_hub. They save a state dict, and load it into
# a module of the plain class.
_METHODS = {"save_pretrained", "_save_pretrained"}


def warn_of_save_pretrained(layer: nn.Module, *args: Any) -> None:
    """Warn if ``save_pretrained`` asks for a changed layer's tensors: a hook of ``state_dict()``.

    Args:
        layer: The changed layer, or the submodule that changes it.
        args: Other arguments of the hook.
    """
    if any(frame.f_code.co_name in _METHODS for frame, _ in traceback.walk_stack(None)):
        warnings.warn(
            "save_pretrained writes names that from_pretrained skips: quantizers of inputs will be "
            "lost, and the weights of layers of low rank initialised again; use "
            "save_pretrained(..., state_dict=fitsmall.compressors.to_plain(module)), or "
            "fitsmall.compressors.save, which loses nothing",
            stacklevel=2,
        )
