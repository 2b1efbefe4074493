"""Random transformations of many images at once, on the device that holds them.

Random numbers are drawn on the CPU, so that they are the same whatever that device is.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Affine", "Augmentation", "CropFlip"]


class Augmentation(Protocol):
    """Transforms float images ``(n, channels, height, width)``."""

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Affine:
    """A random affine map of each image: ``x -> A x + b`` about the centre, bilinear.

    Args:
        shift: Most pixels that an image moves, in each direction.
        rotation: Most degrees that it turns.
        scale: Most that it grows or shrinks in width and, on its own, in height, as a fraction.
        shear: Most that a line leans, as a fraction.

    Example:
        >>> image = torch.eye(8).view(1, 1, 8, 8)
        >>> still = Affine()(image, torch.Generator())
        >>> torch.allclose(still, image, atol=1e-5)
        True
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        count, _, height, width = images.shape

        def within(bound: float) -> Tensor:
            return (2 * torch.rand(count, generator=random) - 1) * bound

        angle = within(math.radians(self.rotation))
        wide, high, lean = 1 + within(self.scale), 1 + within(self.scale), within(self.shear)
        # The grid spans -1 to 1, so a pixel is 2 / width of it.
        right, down = within(2 * self.shift / width), within(2 * self.shift / height)
        rows = [wide * angle.cos(), lean - wide * angle.sin(), right]
        rows += [high * angle.sin(), high * angle.cos(), down]
        maps = torch.stack(rows, 1).view(count, 2, 3).to(images.device)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class CropFlip:
    """A window of the image, in a border of zeros, and half of the images mirrored.

    Args:
        border: Pixels of zeros on each side, and so the most that an image moves.

    Example:
        >>> image = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
        >>> CropFlip(border=1)(image, torch.Generator().manual_seed(4))
        tensor([[[[1., 0.],
                  [3., 0.]]]])
    """

    border: int = 4

    def __call__(self, images: Tensor, random: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        moves = torch.randint(2 * self.border + 1, (2, count, 1), generator=random)
        mirrored = torch.rand(count, 1, generator=random) < 0.5
        rows = moves[0] + torch.arange(height)
        columns = moves[1] + torch.arange(width)
        columns = torch.where(mirrored, columns.flip(1), columns)
        device = images.device
        which = torch.arange(count, device=device).view(-1, 1, 1)
        padded = F.pad(images, 4 * (self.border,))
        window = padded[which, :, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
        return window.permute(0, 3, 1, 2)
