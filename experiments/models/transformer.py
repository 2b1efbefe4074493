"""A byte-level transformer. Nearly all of its weights are in Linear layers and one embedding.

=====  =====  ==========  ==========
width  depth  parameters  bytes
=====  =====  ==========  ==========
32     2          32,928     131,712
64     3         164,288     657,152
128    4         820,352   3,281,408
256    6       4,787,456  19,149,824
=====  =====  ==========  ==========
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["Transformer"]

_HEAD = 32


class Transformer(nn.Module):
    """A causal transformer (Vaswani et al., 2017) with norms before each sublayer, as GPT-2.

    It has rotary position embeddings (Su et al., 2021), RMS norms and no biases, so that hardly any
    byte goes to weights that cannot be compressed. The output layer shares the embedding's weight.

    Args:
        width: Size of the embedding: a multiple of 32, the size of a head; or an even number below
            32 for a single head.
        depth: Number of blocks.
        symbols: Size of the alphabet.

    Raises:
        ValueError: The width or the depth is not one of these.

    Example:
        >>> net = Transformer(width=32, depth=2)
        >>> net(torch.zeros(3, 10, dtype=torch.long)).shape
        torch.Size([3, 10, 256])
        >>> sum(p.numel() for p in net.parameters())
        32928
    """

    def __init__(self, width: int = 128, depth: int = 4, symbols: int = 256) -> None:
        super().__init__()
        if width < 1 or width % min(_HEAD, width) or width % 2 or depth < 1:
            raise ValueError(
                f"a transformer needs a width that is a multiple of {_HEAD}, or even and smaller, "
                f"and a depth of 1 or more; got width={width}, depth={depth}"
            )
        self.embedding = nn.Embedding(symbols, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # The variance of the residual stream grows with the number of blocks.
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map symbols ``(texts, length)`` to logits of the next, ``(texts, length, symbols)``."""
        x = self.norm(self.blocks(self.embedding(text)))
        return F.linear(x, self.embedding.weight)


class _Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = min(_HEAD, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attention(self.qkv(self.norm1(x))))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x

    def _attention(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


def _rotate(x: Tensor) -> Tensor:
    """Rotate pairs of features by angles that are proportional to the position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.outer(torch.arange(length, device=x.device), rates)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
