"""Random transformations of a batch of images, on the device of the images.

Random numbers come from a generator on the CPU, so that every device gets the same ones.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["Affine", "Augmentation", "CropFlip"]


class Augmentation(Protocol):
    """Transforms float images of shape ``(n, channels, height, width)``."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Affine:
    """A random affine map of each image, ``x -> A x + b`` about its centre, interpolated linearly.

    Each parameter of the map is uniform between the negative and the positive bound.

    Args:
        shift: Bound of the translation in each direction, in pixels.
        rotation: Bound of the rotation, in degrees.
        scale: Bound of the change of width, and of the change of height, as a fraction.
        shear: Bound of the horizontal shear, as a fraction.

    Example:
        >>> image = torch.eye(8).view(1, 1, 8, 8)
        >>> identical = Affine()(image, torch.Generator())
        >>> torch.allclose(identical, image, atol=1e-5)
        True
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape

        def uniform(bound: float) -> Tensor:
            return (2 * torch.rand(count, generator=generator) - 1) * bound

        angle = uniform(math.radians(self.rotation))
        wide, high, shear = 1 + uniform(self.scale), 1 + uniform(self.scale), uniform(self.shear)
        # The grid spans -1 to 1, so a pixel is 2 / width of it.
        right, down = uniform(2 * self.shift / width), uniform(2 * self.shift / height)
        rows = [wide * angle.cos(), shear - wide * angle.sin(), right]
        rows += [high * angle.sin(), high * angle.cos(), down]
        maps = torch.stack(rows, 1).view(count, 2, 3).to(images.device)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class CropFlip:
    """A random crop of each image from its copy in a border of zeros; half of them are mirrored.

    Args:
        border: Width of the border in pixels, and so the largest translation.

    Example:
        >>> image = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
        >>> CropFlip(border=1)(image, torch.Generator().manual_seed(4))
        tensor([[[[1., 0.],
                  [3., 0.]]]])
    """

    border: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        offsets = torch.randint(2 * self.border + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        rows = offsets[0] + torch.arange(height)
        columns = offsets[1] + torch.arange(width)
        columns = torch.where(mirrored, columns.flip(1), columns)
        device = images.device
        numbers = torch.arange(count, device=device).view(-1, 1, 1)
        padded = F.pad(images, 4 * (self.border,))
        window = padded[numbers, :, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]
        return window.permute(0, 3, 1, 2)
