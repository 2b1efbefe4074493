"""Element types: which of them are coded, which narrower ones are exact, and equality of bits."""

import torch
from torch import Tensor

__all__ = ["CODED", "FLOATS", "INTEGERS", "NARROWER", "same_bits"]

# Types of weights that torch can add and multiply.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Types that can be compared and looked up; tensors of the others are stored as they are.
CODED = (
    *FLOATS,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)

# By dtype: those that hold some of its values exactly, narrowest first.
NARROWER = {
    torch.float64: (torch.bfloat16, torch.float16, torch.float32),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.int64: (torch.int8, torch.int16, torch.int32),
    torch.int32: (torch.int8, torch.int16),
}

# By bytes: the integer type that shows the bits of a float.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, -0 differs from +0.

    Example:
        >>> same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
        True
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().cpu().resolve_conj().resolve_neg().contiguous() for t in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = INTEGERS[a.dtype.itemsize]
    return torch.equal(a.flatten().view(bits), b.flatten().view(bits))
