"""Units: what can only be removed together, against zeros in their place."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fitsmall.compressors.units import Unit, removable, remove, units_of
from fitsmall.experiments.benchmarks.units import KINDS, run
from fitsmall.experiments.models.networks import ResNet
from fitsmall.experiments.models.transformer import Transformer


class Residual(nn.Module):
    """Depthwise convolution, squeeze and excitation, a strided shortcut, and flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.project, self.shortcut = nn.Conv2d(16, 12, 1), nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        y = F.hardswish(self.depthwise(F.silu(self.norm(self.expand(x)))))
        gates = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        y = self.project(F.pad(y * gates[:, :, None, None], (0, 1, 1, 0)))[..., 1:, :-1]
        y = y + self.shortcut(x)
        return self.head(F.max_pool2d(y, 2).flatten(1))


class UNet(nn.Module):
    """Concatenation, a transposed convolution, and norms of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.middle, self.up = nn.Conv2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 10, 2, stride=2)
        self.last = nn.Conv2d(18, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.down(images)))
        return self.last(torch.cat([x, self.up(F.relu(self.middle(x)))], 1))


class Attention(nn.Module):
    """Queries of four heads, two of which share keys and values, biases, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_groups_of_heads, self.size = 4, 2, 3
        self.embedding, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.query, self.key_value = nn.Linear(8, 12), nn.Linear(8, 12)
        self.out, self.gate, self.up = nn.Linear(12, 8), nn.Linear(8, 10), nn.Linear(8, 10)
        self.down, self.biases = nn.Linear(10, 8), nn.Parameter(torch.randn(4))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        mask = self.biases[:, None, None] * torch.eye(text.shape[1])
        heads = (self.num_heads, self.num_groups_of_heads, self.num_groups_of_heads)
        q, k, v = (
            part.view(*text.shape, count, self.size).transpose(1, 2)
            for part, count in zip(
                (self.query(self.norm(x)), *self.key_value(x).chunk(2, -1)), heads, strict=True
            )
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return F.linear(self.down(F.silu(self.gate(x)) * self.up(x)) + x, self.embedding.weight)


class Tagger(nn.Module):
    """Recurrent hidden units."""

    def __init__(self, kind: Any, both: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.recurrent = kind(6, 8, 2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(16 if both else 8, 3)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(text))[0])


class Mixer(nn.Module):
    """An MLP over positions, pixels that are shuffled, and weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, 8, 2, 2), nn.Linear(16, 6)
        self.back = nn.utils.parametrizations.weight_norm(nn.Linear(6, 16))
        self.wide, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        mixed = self.back(F.gelu(self.tokens(x.flatten(2)))).view_as(x)
        return self.last(F.pixel_shuffle(self.wide(x + mixed), 2))


class Reader(nn.Module):
    """A table of positions, a state to begin with, a maximum, outer products, and tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 6), nn.Parameter(torch.randn(20, 6))
        self.recurrent, self.state = nn.GRU(6, 8, batch_first=True), nn.Parameter(torch.randn(8))
        self.a, self.b, self.last = nn.Linear(8, 4), nn.Linear(8, 3), nn.Linear(12, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.positions[: text.shape[1]]
        state = self.state.expand(1, len(text), -1).contiguous()
        y = self.recurrent(x, state)[0].max(1).values
        outer = self.a(y)[:, :, None] * self.b(y)[:, None]
        return self.head(self.last(outer.flatten(1)))


class Normed(nn.Module):
    """Weight norms, old and new, a group for each channel, and a forward that works in place."""

    def __init__(self) -> None:
        super().__init__()
        new, old = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.depthwise = new(nn.Conv2d(8, 8, 3, groups=8))
        self.other = old(nn.Conv2d(8, 8, 3, groups=8))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.other(self.depthwise(self.first(images.sub_(1)))))


class Heads(nn.Module):
    """Heads that a forward counts, whose size it leaves to the view."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.heads, self.out = 4, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Cells(nn.Module):
    """Recurrent cells one after another, a slope for each unit, and bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.lstm, self.gru = nn.EmbeddingBag(9, 6), nn.LSTMCell(6, 8), nn.GRUCell(8, 5)
        self.tanh, self.relu = nn.RNNCell(5, 7), nn.RNNCell(7, 6, nonlinearity="relu")
        self.slope, self.pair, self.last = nn.PReLU(6), nn.Bilinear(6, 6, 4), nn.Linear(4, 3)

    def forward(self, text: Tensor) -> Tensor:
        x, _ = self.lstm(self.bag(text))
        x, _ = self.lstm(self.bag(text), (x, x))
        x = self.slope(self.relu(self.tanh(self.gru(x))))
        return self.last(self.pair(x, F.normalize(x, dim=1)))


class Shuffled(nn.Module):
    """Channels that are shuffled, by an operation and by views, slopes, and a view into images."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(3 * 64, 3 * 64), nn.BatchNorm2d(3)
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3)
        self.slopes, self.third = nn.PReLU(12), nn.Conv2d(12, 12, 3, groups=12)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        images = self.norm(self.dense(images.flatten(1)).view(len(images), -1, 8, 8))
        x = self.slopes(self.second(F.channel_shuffle(self.first(images), 2)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 3, channels // 3, height, width).transpose(1, 2).contiguous()
        return self.last(self.third(x.view(batch, channels, height, width)))


class Sums(nn.Module):
    """Sums by letters, parts taken out, places in tables, messages, and spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.table = nn.Embedding(9, 6), nn.Parameter(torch.randn(9, 4))
        self.qkv, self.heads = nn.Linear(6, 24), 4
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6))
        self.last, self.vector = nn.Linear(6, 3), nn.Parameter(torch.randn(6))

    def forward(self, text: Tensor) -> Tensor:
        parts = self.qkv(self.names(text)).unflatten(-1, (3, -1)).unsqueeze(0).transpose(0, -2)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts.squeeze(-2))
        bias = self.table[text[:, :, None] - text[:, None] % 2].permute(0, 3, 1, 2)
        scores = (torch.einsum("bihd, bjhd -> bhij", q, k) + bias).softmax(-1)
        x = self.out(torch.einsum("...hij,...jhd->...ihd", scores, v).flatten(2))
        x = x.index_select(1, torch.tensor([1, 2, 0, 1]))
        places = (text[:, :4, None] % 3).expand_as(x)
        x = torch.zeros_like(x[:, :3]).scatter_add(1, places, x.gather(1, places))
        return self.last(x) + (x @ self.vector)[..., None]


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def text() -> Tensor:
    return torch.randint(9, (2, 5))


# A network, its input, and the number of units of each group.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[int]]] = {
    "padded shortcuts": (lambda: ResNet(8), lambda: torch.randn(2, 3, 32, 32), [16, 16, 32, 64]),
    "strided shortcut": (Residual, images, [8, 16, 4, 12]),
    "concatenation": (UNet, images, [4, 6, 10]),
    "shared keys": (Attention, text, [2, 10]),
    "fused projections": (lambda: Transformer(64, 1), lambda: torch.randint(9, (2, 5)), [2, 256]),
    "LSTM": (lambda: Tagger(nn.LSTM, both=True), text, [6, 8]),
    "GRU": (lambda: Tagger(nn.GRU, both=False), text, [6, 8]),
    "positions": (Mixer, images, [8, 6, 3]),
    "reader": (Reader, text, [6, 8, 4]),
    "cells": (Cells, text, [6, 8, 5, 7, 6, 4]),
    "shuffled": (Shuffled, images, [3, 4, 4]),
    "sums": (Sums, text, [4, 6, 6]),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 2, 1)),
        images,
        [4, 3],
    ),
}


def some(groups: Any) -> list[Unit]:
    """Every second unit of each group."""
    return [unit for group in groups for unit in group[1::2]]


@torch.no_grad()
def masked(module: nn.Module, units: list[Unit]) -> nn.Module:
    """The network with zeros in place of units."""
    zeros = copy.deepcopy(module)
    tensors = dict(zeros.named_parameters()) | dict(zeros.named_buffers())
    for unit in units:
        for (name, dim), index in unit.slices.items():
            tensors[name].index_fill_(dim, index, 0)
    return zeros


@pytest.mark.parametrize("case", CASES)
def test_a_network_without_units_is_the_one_with_zeros(case: str) -> None:
    torch.manual_seed(0)
    make, inputs, sizes = CASES[case]
    module, batch = make().eval(), inputs()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    found = units_of(module, [batch])
    assert not found.unknown
    assert [len(group) for group in found.groups] == sizes
    units = some(found.groups)
    expected = masked(module, units)(batch)
    parameters = [*module.parameters()]
    before = sum(parameter.numel() for parameter in parameters)
    other = copy.deepcopy(module)
    cut = remove(module, units, [batch])
    cut.apply(other)
    assert torch.equal(other(batch), module(batch))
    with pytest.raises(ValueError, match="the cut is of another network, or has been applied"):
        cut.apply(other)
    torch.testing.assert_close(module(batch), expected, rtol=1e-4, atol=1e-5)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert sum(parameter.numel() for parameter in parameters) < 0.7 * before


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
)
def test_optimizers_go_on(optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """A step after removal is the step of the network with zeros."""
    torch.manual_seed(0)
    module, batch = Residual(), images()
    units = some(units_of(module, [batch]).groups)
    chosen = optimizer([{"params": [p], "weight_decay": 0.1} for p in module.parameters()])
    module(batch).square().sum().backward()
    chosen.step()
    zeros = masked(module, units)
    twin = optimizer([{"params": [p], "weight_decay": 0.1} for p in zeros.parameters()])
    twin.load_state_dict(copy.deepcopy(chosen.state_dict()))
    for parameter, other in zip(module.parameters(), zeros.parameters(), strict=True):
        assert parameter.grad is not None
        other.grad = parameter.grad.clone()
    remove(module, units, [batch], optimizers=[chosen])
    for each in (chosen, twin):
        each.step()
    kept = masked(zeros, units)
    torch.testing.assert_close(module.eval()(batch), kept.eval()(batch), rtol=1e-4, atol=1e-5)
    module.train()
    chosen.zero_grad()
    module(batch).sum().backward()
    chosen.step()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_layers_learn_their_sizes_where_others_hold_their_weights() -> None:
    torch.manual_seed(0)
    module, batch = Normed(), images()
    module(batch.clone())
    expected = copy.deepcopy(batch)
    [group] = units_of(module, [batch]).groups
    remove(module, group[1::2], [batch])
    assert torch.equal(batch, expected)
    for layer in (module.depthwise, module.other):
        assert (layer.groups, layer.in_channels, layer.out_channels) == (4, 4, 4)
    reader = Reader()
    groups = units_of(reader, [text()]).groups
    factored = torch.optim.Adafactor(reader.parameters())  # its state has means of rows and columns
    loss = reader(text()).sum()
    loss.backward()
    factored.step()
    remove(reader, groups[0][:2], [text()], optimizers=[factored])
    reader(text()).sum().backward()
    factored.step()
    assert reader.head.in_features == reader.embedding.embedding_dim == 4
    with pytest.raises(ValueError, match=r"find them again with units_of"):
        remove(reader, groups[0][4:], [text()])


class Parted(nn.Module):
    """Parts of one size, parts whose sizes are kept, groups of an own norm, and stiff heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(6, 6)
        self.sizes, self.third = (5, 8), nn.Linear(12, 13)
        self.fourth, self.groups = nn.Linear(13, 8), 4
        self.heads, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.narrow = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.zeros(8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.first(x * torch.rand(1))
        a, b = y.split(y.shape[1] // 2, 1)
        a, b = self.third(torch.cat([self.second(a), b], 1)).split(self.sizes, 1)
        y = self.fourth(torch.cat([a, b.relu()], 1))
        by_group = y.view(len(y), self.groups, -1)
        y = (by_group / by_group.square().mean(2, keepdim=True).add(1).sqrt()).flatten(1)
        y = self.heads(y * self.scale).view(len(y), 2, 4).tanh()
        return self.narrow(self.last(y.flatten(1))) + self.last(y.flatten(1))


def test_units_that_can_be_removed_are_found_on_copies() -> None:
    torch.manual_seed(0)
    module, batch = Parted().train(), torch.randn(3, 4)
    before, generator = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    units = removable(module, [batch])
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(layer.training for layer in module.modules())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    groups = dict(zip(units.names, units.groups, strict=True))
    assert {name: len(group) for name, group in groups.items()} == {
        "first": 6, "second": 6, "third": 13, "fourth": 4,
    }  # fmt: skip
    assert {*units.refused} == {"heads"}
    units = [*groups["third"][3:7], *groups["fourth"][:3]]
    cut = remove(module, units, [batch])
    assert cut.attributes == [("", "sizes", (3, 6)), ("", "groups", 1)]
    assert module.fourth.out_features == 2
    module(batch)

    # Heads of nearly equal scores, as new ones have, mix as well in the wrong order.
    with torch.no_grad():
        small = Heads().requires_grad_(False)
        small.query.weight.mul_(1e-3)
    [group] = removable(small, [torch.randn(2, 5, 8)]).groups
    assert remove(small, group[1:3], [torch.randn(2, 5, 8)]).attributes == [("", "heads", 2)]

    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    units = removable(encoder, [torch.randn(2, 3, 8)])
    assert units.names == ["linear1"]
    assert "MultiheadAttention needs an embed_dim" in units.refused["self_attn.in_proj_weight"]


class Stubborn(nn.Module):
    """A width that code repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y + torch.arange(6.0) * y.detach().view(-1, 6).sign())


class Sensitive(nn.Sequential):
    """A network that makes rounding errors ten thousand times as large."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.sin(1e4 * self[0](x)))


def test_rounding_errors_are_no_mistakes() -> None:
    net, x = Sensitive(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(2, 64)
    hidden = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), net)
    [group, *_] = removable(hidden, [x]).groups
    cut = remove(hidden, group[:32], [x])
    assert cut.kept["2.0.weight", 1].tolist() == [*range(32, 64)]


def test_what_cannot_be_done_is_refused_and_changes_nothing() -> None:
    module, batch = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), torch.randn(3, 4)
    [group] = units_of(module, [batch]).groups
    with pytest.raises(ValueError, match=r"nothing of 0\.weight would be left"):
        remove(module, group, [batch])
    stubborn = Stubborn()
    slices = {("first.weight", 0): torch.tensor([1]), ("first.bias", 0): torch.tensor([1]),
              ("last.weight", 1): torch.tensor([1])}  # fmt: skip
    with pytest.raises(ValueError, match="Stubborn keeps sizes that do not follow its tensors"):
        remove(stubborn, [Unit(slices)], [batch])
    assert stubborn.first.weight.shape == (6, 4)
    assert not units_of(stubborn, [batch]).groups  # constants have the width, too

    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="forward of Branch cannot be traced"):
        units_of(Branch(4, 4), [batch])


@pytest.mark.parametrize(
    ("forward", "zero"),
    [
        (lambda x: x.relu().sum(1), True),
        (lambda x: (x.tanh() * x.sigmoid()).norm(dim=1), True),
        (lambda x: (x * x.exp()) @ x.sigmoid().mT, True),
        (lambda x: (x / x.exp() - x).sum(1), True),
        (lambda x: x.sigmoid().sum(1), False),
        (lambda x: (x + 1).sum(1), False),
        (lambda x: x.exp().norm(dim=1), False),
        (lambda x: x.exp() @ x.sigmoid().mT, False),
        (lambda x: torch.einsum("ni,ni->n", x.cos(), x.cos()), False),
        (lambda x: x.mean(1), False),
    ],
)
def test_sums_lose_units_only_where_they_are_zero(
    forward: Callable[[Tensor], Tensor], zero: bool
) -> None:
    class Summed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return forward(super().forward(x))

    torch.manual_seed(0)
    module, batch = Summed(4, 6), torch.randn(3, 4)
    groups = units_of(module, [batch]).groups
    assert [len(group) for group in groups] == ([6] if zero else [])
    remove(module, some(groups), [batch])


class Gate(nn.Module):
    """A way through the network that depends on values, and a width that flattening multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.last, self.other = nn.Linear(24, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) if x.sum() > 0 else self.conv(-x)
        return self.other(self.last(y.flatten(1)))


def test_groups_can_be_declared() -> None:
    torch.manual_seed(0)
    module, batch = Gate(), torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r'groups=\{"hidden": \{"fc1.weight": 0'):
        removable(module, [batch])
    channels = {"conv.weight": 0, "conv.bias": 0, "norm.weight": 0, "norm.bias": 0,
                "norm.running_mean": 0, "norm.running_var": 0, "last.weight": -1}  # fmt: skip
    groups = {"channels": channels, "hidden": {"last.weight": 0, "last.bias": 0}}
    units = removable(module, [batch], groups=groups)
    assert (units.names, len(units.groups[0])) == (["channels"], 6)
    assert "hidden" in units.refused  # the layer that reads it is missing
    expected = masked(module, some(units.groups)).eval()(batch)
    remove(module, some(units.groups), [batch])
    torch.testing.assert_close(module.eval()(batch), expected, rtol=1e-4, atol=1e-5)
    assert module.last.in_features == 12

    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    pairs = {"0": {"1.weight": 0, "1.bias": 0, "2.weight": 1}}
    net.register_parameter("tied", net[1].weight)
    pairs["0"]["tied"] = pairs["0"].pop("1.weight")
    units = removable(net, [torch.randn(3, 4)], groups=pairs)
    assert {name: len(group) for name, group in zip(units.names, units.groups, strict=True)} == {
        "0": 8, "0 (2)": 6,
    }  # fmt: skip
    for group, message in (
        (
            {"1.wieght": 0},
            r"groups\['a'\]: Sequential has no .* '1.wieght'; .* 1.weight",
        ),
        ({"1.bias": 1}, r"1.bias has shape \(8,\), and no dimension 1"),
        ({"1.bias": 0, "0.bias": 0}, r"dimension 0 of 1.bias has 8 slices, no multiple of 6"),
        ({}, r"groups\['a'\] names no tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            removable(net, [torch.randn(3, 4)], groups={"a": group})
    with pytest.raises(ValueError, match=r"dimension 0 of 1.bias is in groups\['a'\] already"):
        removable(net, [torch.randn(3, 4)], groups={"a": {"1.bias": 0}, "b": {"1.bias": 0}})


@pytest.mark.parametrize("kind", ["U-Net", "GAN generator", "weight norm"])
def test_the_benchmark_finds_all_as_it_should_be(kind: str) -> None:
    result = run(KINDS[kind])
    assert (result.refused, result.alive) == ({}, 1)
    assert result.difference < 1e-12
    assert 0.6 < result.removed < 0.8


def test_unknown_operations_keep_what_they_read() -> None:
    class Sorted(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).sort(1).values)

    found = units_of(Sorted(nn.Linear(4, 6), nn.Linear(6, 2)), [torch.randn(3, 4)])
    assert found.groups == []
    assert list(found.unknown) == ["aten.sort.default"]

    class Chosen(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = self[1](self[0](x))
            return self[2](y[y[:, 0] > 0]).sum(0)

    chosen = Chosen(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    found = units_of(chosen, [torch.randn(3, 4)])
    assert found.names == ["0"]
    assert [*found.unknown] == ["aten.index.Tensor", "aten.linear.default"]
    assert not units_of(nn.ReLU(), [torch.randn(3, 4)]).groups  # nothing to label


class Weighed(nn.Module):
    """Weights that are used twice, in parts, transposed, and at each of several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.back = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.both = nn.Parameter(torch.randn(6, 4))
        self.state = nn.GRU(3, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.back(self.conv(x).relu())).mean(3).transpose(1, 2)
        first, second = self.both.chunk(2)
        hidden = nn.functional.linear(x, first) + x @ second.T
        return self.state(hidden)[0]


def test_positions_count_multiply_adds() -> None:
    """Of an example: 6 x 6, 12 x 12 after the transposed convolution, then 10 x 10, then 10."""
    positions = units_of(Weighed(), [torch.zeros(1, 3, 6, 6)]).positions
    assert positions == {
        "conv.weight": 36,
        "back.weight": 36,
        "depthwise.weight": 100,
        "both": 10,
        "state.weight_ih_l0": 10,
        "state.weight_hh_l0": 10,
    }
