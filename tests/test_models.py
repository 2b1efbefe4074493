"""The networks have the sizes and the shapes that they promise."""

import pytest
import torch

from fitsmall.experiments.models.networks import (
    VGG,
    AlexNet,
    LeNet5,
    LeNet300,
    ResNet,
    ResNet18,
    SqueezeNet,
)
from fitsmall.experiments.models.transformer import Transformer


def test_residual_networks_shrink_with_their_width() -> None:
    images = torch.rand(2, 3, 32, 32)
    sizes = []
    for net in (
        ResNet(20, 8),
        ResNet(56, 4),
        ResNet18(8),
        VGG(8),
        AlexNet(4, 16),
        SqueezeNet(0.25),
    ):
        assert net(images).shape == (2, 10)
        sizes.append(sum(p.numel() for p in net.parameters()))
    assert sizes == [68_050, 54_286, 176_402, 23_426, 10_446, 47_578]
    with pytest.raises(ValueError, match="depth=21"):
        ResNet(21)


def test_the_papers_networks_have_the_papers_sizes() -> None:
    assert sum(p.numel() for p in LeNet300().parameters()) == 266_610
    assert sum(p.numel() for p in LeNet5().parameters()) == 431_080
    images = torch.rand(3, 1, 28, 28)
    assert LeNet300()(images).shape == LeNet5()(images).shape == (3, 10)


def test_a_transformer_looks_back_only() -> None:
    torch.manual_seed(0)
    net = Transformer(width=64, depth=2).eval()
    text = torch.randint(256, (2, 30))
    changed = text.clone()
    changed[:, 20:] = 0
    assert torch.equal(net(text)[:, :20], net(changed)[:, :20])
    assert not torch.equal(net(text)[:, 20:], net(changed)[:, 20:])
    # Order counts.
    assert not torch.equal(net(text.flip(1))[:, -1], net(text)[:, -1])
    with pytest.raises(ValueError, match="width=48"):
        Transformer(width=48)
