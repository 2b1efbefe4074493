"""The networks of the Deep Compression paper, and a multi-layer perceptron of any widths.

==========  ===============================  ==========  ==========
network     layers                           parameters  bytes
==========  ===============================  ==========  ==========
LeNet300    784-300-100-10                      266,610   1,066,440
LeNet5      conv 20, conv 50, fc 500, fc 10     431,080   1,724,320
==========  ===============================  ==========  ==========
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["MLP", "LeNet5", "LeNet300"]


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


def _checked(images: Tensor) -> Tensor:
    if images.shape[1:] != (1, 28, 28):
        channels, height, width = images.shape[1:]
        raise ValueError(
            f"this LeNet takes grey images of 28 x 28 pixels, and got {channels} x {height} x "
            f"{width}: choose data=mnist, or model=mlp"
        )
    return images
