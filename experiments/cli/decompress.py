"""A compressed file as safetensors, written as a whole or not at all."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fitsmall.compressors import load
from fitsmall.compressors.file.atomic import replaced
from fitsmall.compressors.naming import printable

__all__ = ["decompress"]

_METADATA = "__metadata__"  # a key that safetensors keeps for itself


def decompress(file: Path, output: Path | None, limit: int | None) -> str:
    """Write the tensors of a compressed file, and return a line that says where they are.

    Args:
        file: Compressed file.
        output: File to write, replaced if it exists; by default ``file`` with another suffix.
        limit: Most bytes that the tensors may take, see :func:`fitsmall.compressors.read`.

    Raises:
        OSError: The file cannot be read, or the output not be written.
        ValueError: The file is damaged, or safetensors cannot hold it.
    """
    target = output or file.with_suffix(".safetensors")
    if target.exists() and target.samefile(file):
        raise ValueError(f"{target} is the compressed file itself: name another file with -o")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is no file that could be replaced: name a file with -o")
    tensors = {name: tensor.contiguous() for name, tensor in load(file, limit).items()}
    for name, tensor in tensors.items():
        if name == _METADATA or tensor.dtype == torch.complex128:
            what = "that name" if name == _METADATA else f"{tensor.dtype}"
            raise ValueError(f"{file} has a tensor {name!r}, and safetensors cannot hold {what}")
    try:
        with replaced(target) as scratch:
            save_file(tensors, scratch.name)
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error
    size = target.stat().st_size
    return printable(f"{target}: {len(tensors)} tensors, {size:,} bytes")
