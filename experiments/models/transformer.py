"""A byte-level transformer, whose weights are nearly all in Linear layers and one embedding.

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
    """A causal transformer (Vaswani et al., 2017) with norms in front, as GPT-2 has them.

    Positions are rotations of queries and keys (Su et al., 2021), norms divide by the root mean
    square, and nothing has a bias: no byte is spent on what cannot be compressed. Logits come from
    the embedding itself, whose weight is tied.

    Args:
        width: Size of the embedding. Each 32 have a head of their own, or fewer the only one.
        depth: Number of blocks.
        symbols: Size of the alphabet.

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
                f"a transformer has a width that is a multiple of {_HEAD}, or even and less, and "
                f"blocks: got width={width}, depth={depth}"
            )
        self.embedding = nn.Embedding(symbols, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.RMSNorm(width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added to the residual stream grows with the number of additions.
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Integers ``(texts, length)`` to logits ``(texts, length, symbols)`` of what follows."""
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
        mixed = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


def _rotated(x: Tensor) -> Tensor:
    """Pairs of features turned by angles that grow with the position."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.outer(torch.arange(length, device=x.device), rates)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
