"""The networks of the Deep Compression paper, a residual network, and a perceptron of any widths.

==========  ===============================  ==========  ==========
network     layers                           parameters  bytes
==========  ===============================  ==========  ==========
LeNet300    784-300-100-10                      266,610   1,066,440
LeNet5      conv 20, conv 50, fc 500, fc 10     431,080   1,724,320
ResNet20    3 stages of 3 residual blocks       269,722   1,078,888
==========  ===============================  ==========  ==========
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["MLP", "LeNet5", "LeNet300", "ResNet20"]


class MLP(nn.Sequential):
    """Fully connected layers ``fc1``, ``fc2``, ... with ReLU between them.

    Args:
        widths: Units of the input, of each hidden layer and of the output.

    Example:
        >>> MLP([64, 30, 10]).fc2
        Linear(in_features=30, out_features=10, bias=True)
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))

    def forward(self, images: Tensor) -> Tensor:
        *hidden, last = self
        x = images.flatten(1)
        for layer in hidden:
            x = F.relu(layer(x))
        logits: Tensor = last(x)
        return logits


class LeNet300(MLP):
    """LeNet-300-100 (LeCun et al., 1998): 266,610 parameters, for images of 28 x 28 pixels."""

    def __init__(self) -> None:
        super().__init__([784, 300, 100, 10])

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(_checked(images))


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 431,080 parameters, for grey images of 28 x 28 pixels.

    The network that Han et al. compress: 20 and 50 feature maps, 500 units, and its only ReLU
    behind the first fully connected layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(_checked(images)), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class ResNet20(nn.Module):
    """ResNet-20 for images of 32 x 32 pixels in three colours (He et al., 2016, section 4.2).

    Three stages of 16, 32 and 64 channels with three blocks each; where the shape changes the
    shortcut takes every second pixel and fills the new channels with zeros (option A).

    Example:
        >>> sum(p.numel() for p in ResNet20().parameters())
        269722
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16, *[16] * 3, *[32] * 3, *[64] * 3]
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(images)))
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """``relu(x + f(x))``; twice as many channels come with half the pixels in each direction."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        missing = residual.shape[1] - x.shape[1]
        return F.relu(residual + F.pad(shortcut, (0, 0, 0, 0, missing // 2, missing // 2)))


def _checked(images: Tensor) -> Tensor:
    if images.shape[1:] != (1, 28, 28):
        channels, height, width = images.shape[1:]
        raise ValueError(
            f"this LeNet takes grey images of 28 x 28 pixels, and got {channels} x {height} x "
            f"{width}: choose data=mnist, or model=mlp"
        )
    return images
