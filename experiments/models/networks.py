"""The networks of the Deep Compression paper, networks for CIFAR-10, and a perceptron.

==========  ===============================  ==========  ==========
network     layers                           parameters  bytes
==========  ===============================  ==========  ==========
LeNet300    784-300-100-10                      266,610   1,066,440
LeNet5      conv 20, conv 50, fc 500, fc 10     431,080   1,724,320
ResNet      3 stages of 3 residual blocks       269,722   1,078,888
ResNet18    4 stages of 2 residual blocks    11,173,962  44,695,848
VGG         3 stages of 2 convolutions        4,660,106  18,640,424
AlexNet     5 convolutions, fc 4096, 4096    23,272,266  93,089,064
SqueezeNet  8 fire modules                      729,034   2,916,136
==========  ===============================  ==========  ==========
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = [
    "CNN",
    "MLP",
    "VGG",
    "AlexNet",
    "LeNet5",
    "LeNet300",
    "ResNet",
    "ResNet18",
    "SqueezeNet",
]

# Shape of a network's images, and a data set with that shape.
_GREY = (1, 28, 28), "mnist"
_COLOUR = (3, 32, 32), "cifar10"


class MLP(nn.Sequential):
    """Fully connected layers ``fc1``, ``fc2``, ... with activations between them.

    Args:
        widths: Units of the input, of each hidden layer and of the output.
        activation: Name of another activation in torch, for example ``"tanh"``.

    Example:
        >>> MLP([64, 30, 10]).fc2
        Linear(in_features=30, out_features=10, bias=True)
    """

    def __init__(self, widths: Sequence[int], activation: str = "relu") -> None:
        super().__init__()
        self.activation = activation
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.add_module(f"fc{number}", nn.Linear(inputs, outputs))

    def forward(self, images: Tensor) -> Tensor:
        *hidden, last = self
        x = images.flatten(1)
        for layer in hidden:
            x = getattr(torch, self.activation)(layer(x))
        logits: Tensor = last(x)
        return logits


class LeNet300(MLP):
    """LeNet-300-100 (LeCun et al., 1998): 266,610 parameters, for images of 28 x 28 pixels."""

    def __init__(self, activation: str = "relu") -> None:
        super().__init__([784, 300, 100, 10], activation)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(_check_shape(images, *_GREY))


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe: 431,080 parameters, for grey images of 28 x 28 pixels.

    It has 20 and 50 feature maps, 500 units, and a single ReLU, after the first fully connected
    layer. Han et al. (2016) compress this network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(_check_shape(images, *_GREY)), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


class CNN(nn.Module):
    """A small network for images of any size: convolutions of 3 x 3, each with batch-norm and ReLU.

    After every convolution but the last, max-pooling halves the pixels in each direction, and the
    next convolution has twice the channels. A linear layer reads the mean over pixels.

    Args:
        depth: Number of convolutions.
        width: Channels of the first one.
        channels: Channels of the images.

    Example:
        >>> sum(p.numel() for p in CNN(depth=3, width=16).parameters())
        24058
    """

    def __init__(self, depth: int = 3, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(depth):
            outputs = width << stage
            conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
            channels = outputs
        self.features = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(images).mean((2, 3)))
        return logits


class ResNet(nn.Module):
    """The residual network for images of 32 x 32 pixels (He et al., 2016, section 4.2).

    It has three stages of ``n`` blocks with two convolutions. Each stage has twice the channels and
    half the pixels in each direction of the one before. Where the shape changes, the shortcut takes
    every second pixel and pads the channels with zeros (option A).

    Args:
        depth: Number of layers with weights, ``6 n + 2``: 20, 32, 44, 56, 110.
        width: Channels of the first stage.

    Raises:
        ValueError: The depth is not ``6 n + 2``.

    Example:
        >>> [sum(p.numel() for p in ResNet(depth).parameters()) for depth in (20, 56)]
        [269722, 853018]
    """

    def __init__(self, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        n, left = divmod(depth - 2, 6)
        if left or n < 1:
            raise ValueError(f"a ResNet has 6 n + 2 layers, as 20 or 56; got depth={depth}")
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width, *[width] * n, *[2 * width] * n, *[4 * width] * n]
        self.blocks = nn.Sequential(*(_Block(*pair) for pair in pairwise(widths)))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(_check_shape(images, *_COLOUR))))
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 x 32 pixels: its stem is one convolution of 3 x 3, no pooling.

    It has four stages of two blocks. Where the shape changes, the shortcut is a convolution of
    1 x 1 (He et al., 2016, option B).

    Args:
        width: Channels of the first stage; the last one has eight times as many.

    Example:
        >>> sum(p.numel() for p in ResNet18().parameters())
        11173962
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width << stage for stage in (0, 0, 0, 1, 1, 2, 2, 3, 3)]
        blocks = (_Block(*pair, projected=True) for pair in pairwise(widths))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(_check_shape(images, *_COLOUR))))
        logits: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return logits


class _Block(nn.Module):
    """``relu(shortcut(x) + f(x))``. With twice the channels it halves the pixels a direction."""

    def __init__(self, inputs: int, outputs: int, projected: bool = False) -> None:
        super().__init__()
        stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs and projected:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        elif inputs != outputs:
            self.shortcut = _PadChannels(outputs - inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class _PadChannels(nn.Module):
    """Take every ``stride``-th pixel in each direction, and add channels of zeros on both sides."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.channels // 2, self.channels - self.channels // 2))


class VGG(nn.Module):
    """VGG-small, which quantization papers use: six convolutions of 3 x 3 and one linear layer.

    It has three stages of two convolutions with batch-norm. Each stage has twice the channels of
    the one before, and ends with max-pooling.

    Args:
        width: Channels of the first stage.

    Example:
        >>> sum(p.numel() for p in VGG().parameters())
        4660106
    """

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in range(3):
            for _ in range(2):
                outputs = width << stage
                conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(16 * channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(_check_shape(images, *_COLOUR)).flatten(1))
        return logits


class AlexNet(nn.Module):
    """AlexNet for images of 32 x 32 pixels: five convolutions of 3 x 3, and three linear layers.

    The first convolution takes every second pixel, and max-pooling halves them three times more.
    As in Krizhevsky et al. (2012), dropout comes before the first two linear layers.

    Args:
        width: Channels of the first convolution, 64; the others have 3, 6, 4 and 4 times as many.
        hidden: Units of the first two linear layers, 4,096.

    Example:
        >>> [sum(p.numel() for p in net.parameters()) for net in (AlexNet(), AlexNet(32, 1024))]
        [23272266, 2148778]
    """

    def __init__(self, width: int = 64, hidden: int = 4096) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, pooled = 3, (0, 1, 4)
        for number, factor in enumerate((1, 3, 6, 4, 4)):
            stride = 1 if number else 2
            layers += [nn.Conv2d(channels, factor * width, 3, stride, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] * (number in pooled)
            channels = factor * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(4 * channels, hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(_check_shape(images, *_COLOUR)).flatten(1)
        logits: Tensor = self.classifier(features)
        return logits


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 (Iandola et al., 2016) for images of 32 x 32 pixels.

    A fire module squeezes its channels by a convolution of 1 x 1, and expands them by one of 1 x 1
    and one of 3 x 3 side by side. The stem has a convolution of 3 x 3 in place of 7 x 7, which
    takes every pixel. Weights begin as He et al. (2015) choose them: without norms, smaller ones
    let the signal vanish.

    Args:
        scale: Factor of all channels.

    Example:
        >>> [sum(p.numel() for p in net.parameters()) for net in (SqueezeNet(), SqueezeNet(0.5))]
        [729034, 184938]
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        channels = round(96 * scale)
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
        for number, (squeezed, expanded) in enumerate(
            ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
        ):
            layers += [nn.MaxPool2d(2)] * (number in (0, 3, 7))
            layers.append(_Fire(channels, round(squeezed * scale), round(expanded * scale)))
            channels = 2 * round(expanded * scale)
        self.features = nn.Sequential(*layers, nn.Dropout())
        self.head = nn.Conv2d(channels, 10, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(_check_shape(images, *_COLOUR))
        return F.relu(self.head(features)).mean((2, 3))


class _Fire(nn.Module):
    """Squeeze, and expand twice."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1(x), self.expand3(x)], 1))


def _check_shape(images: Tensor, shape: tuple[int, int, int], data: str) -> Tensor:
    if images.shape[1:] != shape:
        wanted, got = (" x ".join(map(str, size)) for size in (shape, images.shape[1:]))
        raise ValueError(
            f"this network takes images of {wanted}, and got {got}: choose data={data}, or "
            "model=mlp"
        )
    return images
