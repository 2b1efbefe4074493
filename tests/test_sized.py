"""A size without training: files of a given size, what they lose, and the curve of sizes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fitsmall.compressors import compress, restore, save
from fitsmall.compressors.choices.entropy_constrained import cluster, price_within
from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.repair.batches import batches_of
from fitsmall.compressors.repair.priced import Priced
from fitsmall.compressors.sized import curvatures
from fitsmall.compressors.trade_off import trade_off

Data = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.fixture(scope="module")
def data() -> Data:
    """Handwritten digits in batches."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    return list(zip(images.split(128), labels.split(128), strict=True))


@pytest.fixture(scope="module")
def trained(data: Data) -> nn.Sequential:
    """A network that has learned the first thousand of them."""
    torch.manual_seed(0)
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for images, labels in data[:8]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def loss_of(net: nn.Module, data: Data) -> float:
    """The loss on the digits that were not learned."""
    losses = [nn.functional.cross_entropy(net(images), labels) for images, labels in data[8:]]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("size", [1 / 30, "2.4 KB"])
def test_a_size_is_met_and_costs_little(
    size: Any, trained: nn.Sequential, data: Data, tmp_path: Path
) -> None:
    net = copy.deepcopy(trained)
    dense = sum(tensor.nbytes for tensor in net.state_dict().values())
    most = int(size * dense) if isinstance(size, float) else 2400
    codes = compress(net, size=size, data=data[:8])
    written = save(tmp_path / "net.fitsmall", net.state_dict())
    assert 0.98 * most < written <= most
    assert codes.keys() == dict(net.named_parameters()).keys()
    for name, code in codes.items():
        assert torch.equal(code.decode(), net.get_parameter(name))
    assert loss_of(net, data) < 1.5 * loss_of(trained, data)
    # Others make up for what is lost: rounding the weights one by one costs far more.
    alone = copy.deepcopy(trained)
    [offer] = trade_off(
        alone, curvatures(alone, [*codes], batches_of(data[:8], _CPU)), [dense / most]
    )
    offer.apply_(alone)
    assert loss_of(net, data) < loss_of(alone, data)
    assert torch.equal(restore(network(), tmp_path / "net.fitsmall")[0].weight, net[0].weight)


_CPU = torch.device("cpu")


class Recurrent(nn.Module):
    """Weights that no product shows, next to those of an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.fc = nn.Linear(32, 40)

    def forward(self, text: Tensor) -> Tensor:
        outputs: Tensor = self.fc(self.lstm(self.embedding(text))[0])
        return outputs


def test_weights_without_data_of_their_own_are_clustered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Recurrent()
    compress(net, size="4 KB", data=[torch.randint(0, 40, (16, 10)) for _ in range(4)])
    assert 3900 < save(tmp_path / "net.fitsmall", net.state_dict()) <= 4000
    assert all(len(parameter.unique()) < 256 for parameter in net.parameters())


def test_tensors_that_nothing_depends_on_have_the_mean_curvature(data: Data) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net[1].register_parameter("idle", nn.Parameter(torch.ones(2, 2)))
    names = ["1.weight", "1.bias", "1.idle"]
    found = curvatures(net, names, batches_of(data[:2], _CPU))
    both = torch.cat([found["1.weight"].flatten(), found["1.bias"]])
    assert torch.allclose(found["1.idle"] * 2, both.mean().expand(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1 / 10}, "size needs data="),
        ({"size": 40, "data": True}, "compress: a size is a fraction .* write '40 B'"),
        ({"size": 1 / 10, "data": True, "coder": "zip"}, "unknown coder 'zip'"),
        ({"size": "50 B", "data": True}, "with every selected weight at zero it takes"),
        ({"size": 0.1, "data": True, "plan": Priced(1.0, 1.0)}, "leave out a plan"),
        ({"size": 0.1, "data": True, "activation_bits": 8}, "leave out activation_bits"),
    ],
)
def test_sizes_that_cannot_be(
    settings: dict[str, Any], message: str, trained: nn.Sequential, data: Data
) -> None:
    net = copy.deepcopy(trained)
    if settings.pop("data", False):
        settings["data"] = data[:2]
    with pytest.raises(ValueError, match=message):
        compress(net, **settings)
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), trained.parameters(), strict=True)
    )


def test_smaller_files_lose_more(trained: nn.Sequential, data: Data) -> None:
    weights = curvatures(
        trained, [n for n, _ in trained.named_parameters()], batches_of(data, _CPU)
    )
    offers = trade_off(trained, weights, [5, 10, 20, 1000])
    assert [offer.ratio for offer in offers] == [5, 10, 20]  # the last one is out of reach
    losses = [offer.loss for offer in offers]
    assert losses == sorted(losses)
    dense = sum(tensor.nbytes for tensor in trained.state_dict().values())
    for offer in offers:
        assert 0.97 * dense / offer.ratio < offer.size <= dense / offer.ratio
        assert offer.loss == pytest.approx(sum(offer.losses.values()))


@pytest.mark.parametrize("near", [None, 1e-9, 1e3])
def test_a_price_is_found_from_anywhere(near: float | None) -> None:
    tried: list[float] = []

    def bits(price: float) -> float:
        tried.append(price)
        return min(5000, 100 / price**0.7)

    price = price_within(bits, 70, near, tolerance=0.01)
    assert 0.99 * 70 <= bits(price) <= 70
    assert len(tried) < 30
    # A budget for more levels than there are ends the search.
    assert bits(price_within(bits, 6000, near)) == 5000
    with pytest.raises(ValueError, match="at least 3 are needed, and 2 given"):
        price_within(lambda price: 3, 2, near)


def test_what_is_not_selected_stays_as_it_is(data: Data, tmp_path: Path) -> None:
    """Tuned norms would take more bytes than the size leaves for the rest."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10)
    )
    dense = sum(tensor.nbytes for tensor in net.state_dict().values())
    compress(net, size=0.12, include=["1.weight", "4.weight"], data=data[:2])
    assert net[2].weight.eq(1).all()
    assert save(tmp_path / "net.fitsmall", net.state_dict()) <= 0.12 * dense


def test_a_tied_weight_counts_once(data: Data) -> None:
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64, bias=False) for _ in range(2)))
    net[2].weight = net[1].weight
    [offer] = trade_off(net, {"1.weight": torch.ones(64, 64)}, [8])
    assert offer.size <= 64 * 64 * 4 // 8
    compress(net, size=1 / 8, data=data[:2])
    assert coded_size(net.state_dict()) <= 64 * 64 * 4 // 8


def test_a_tensor_that_the_loss_does_not_see() -> None:
    net = nn.Linear(64, 64)
    found = {"weight": torch.ones(64, 64), "bias": torch.zeros(64)}
    [offer] = trade_off(net, found, [8])
    assert offer.losses["bias"] == 0


def test_zeros_stay_where_no_new_ones_may_come() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # as the row of an embedding's padding
    for each in (weight, torch.zeros(6, 8)):
        found = cluster(each.numpy(), np.ones((6, 8), np.float32), 0.1, zeros=False)
        assert np.isfinite(found.bits)
        assert ((found.index == found.zero) == (each == 0).numpy()).all()
