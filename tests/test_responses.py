"""Ranks of a trained network by what its layers answer, and the command that shows them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fitsmall.compressors import Rank, factorize
from fitsmall.compressors.choices.responses import (
    error,
    plain,
    rectified,
    relu_singular_values,
    whitened,
)
from fitsmall.experiments.cli.main import main
from fitsmall.experiments.cli.needed_ranks import rank_table, record_responses


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


class Net(nn.Module):
    """Layers with and without a batch-norm and a ReLU after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.fc1 = nn.Linear(8, 6)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(6, 4)
        self.fc3 = nn.Linear(6, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        x = (self.grouped(x) + self.conv2(x)).relu()
        x = self.fc1(x.mean((2, 3)))
        y = self.fc3(self.act(x))
        return self.fc2(y.relu() + x + y)  # a ReLU, and what it does not see


@pytest.fixture
def trained() -> tuple[Net, Tensor]:
    net, images = Net(), torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(20):  # averages of batch-norm
        net.train()(images)
    return net, images


def test_layers_are_seen_with_what_is_behind_them(trained: Any) -> None:
    net, images = trained
    layers, left_out = record_responses(net, images)
    assert {name: layer.relu for name, layer in layers.items()} == {
        "conv1": True,
        "conv2": False,
        "fc1": False,
        "fc2": False,
        "fc3": False,
    }
    assert left_out == {"grouped": "grouped, or of a class of its own"}
    # Responses are those of the batch-norm, and the plain map of full rank gives them back.
    layer = layers["conv1"]
    outputs = net.norm1(net.conv1(images)).double()
    assert layer.responses.mean() == pytest.approx(float(outputs.mean()), abs=0.1)
    for name, found in layers.items():
        full = min(found.weight.shape)
        map_ = plain(found.weight, found.scale, found.shift, full)
        assert error(found.responses, map_, found.relu) < 1e-9, name


def test_a_plain_map_is_the_layer_of_the_nearest_weight(trained: Any) -> None:
    net, images = trained
    found = record_responses(net, images)[0]["conv1"]
    net = nn.Sequential(net.conv1, net.norm1).eval()
    before = net(images).movedim(1, -1).double()
    factorize(net, {"0.weight": Rank("channels", 3)})
    after = net(images).movedim(1, -1).double()
    answers = plain(found.weight, found.scale, found.shift, 3)(before)
    torch.testing.assert_close(answers, after, atol=1e-4, rtol=1e-4)


def test_each_criterion_is_no_worse_than_the_one_before() -> None:
    mixed = random(400, 12) @ random(12, 12, seed=1) * torch.logspace(0, -1, 12)
    responses = mixed - 0.5 * mixed.std()
    for rank in range(1, 12):
        by_responses, by_relu = whitened(responses, rank), rectified(responses, rank)
        weight, ones, zeros = random(12, 30, seed=2), torch.ones(12), torch.zeros(12)
        by_weight = plain(weight, ones.double(), zeros.double(), rank)
        for map_ in (by_weight, by_responses, by_relu):
            assert torch.linalg.matrix_rank(map_.matrix) == rank
        assert error(responses, by_responses, False) <= error(responses, by_weight, False)
        assert error(responses, by_relu, True) <= error(responses, by_responses, True)
    # Where half of the numbers are hidden, minding that is worth something.
    gain = error(responses, rectified(responses, 5), True)
    assert gain < 0.9 * error(responses, whitened(responses, 5), True)


@pytest.mark.parametrize("shape", [(2, 2), (6, 9), (12, 5)], ids=str)
def test_relu_singular_values_lie_within_a_factor_of_two(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    values = torch.linalg.svdvals(weight)
    found = relu_singular_values(weight)
    assert (found <= values + 1e-12).all()
    assert (found >= values / 2 - 1e-12).all()


def test_the_maximum_is_found_in_the_plane() -> None:
    weight = random(2, 2, seed=3)
    left, values, right = torch.linalg.svd(weight)
    angles = torch.linspace(0, 2 * torch.pi, 100_000, dtype=torch.double)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    lower = values[0] * left[:, :1] @ right[:1]
    gap = ((circle @ weight.T).relu() - (circle @ lower.T).relu()).norm(dim=1)
    expected = torch.minimum(gap.max(), values[1])
    assert float(relu_singular_values(weight)[1]) == pytest.approx(float(expected), rel=1e-3)


def test_the_table_of_a_network(trained: Any, tmp_path: Path) -> None:
    net, images = trained
    table = rank_table(net, images, 0.1, tmp_path / "ranks.png")
    assert [*table.columns[0].cells] == ["conv1", "conv2", "fc1", "fc2", "fc3", "total"]
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    lines = (tmp_path / "ranks.csv").read_text().splitlines()
    assert lines[0] == "layer,dimension,singular_value,relu_singular_value"
    assert len(lines) == 1 + 8 + 8 + 6 + 4 + 6
    assert "left out: grouped" in str(table.caption)
    for tolerance in (0.0, 1.0):
        with pytest.raises(ValueError, match="a tolerance is a fraction"):
            rank_table(net, images, tolerance, tmp_path / "ranks.png")
    with pytest.raises(ValueError, match=r"has no layer to reduce \(no layers\)"):
        rank_table(nn.ReLU(), images, 0.1, tmp_path / "ranks.png")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["trainer.max_epochs=2", "reference=false", "callbacks=[rank]"]
    words += ["callbacks.rank.exclude=[net.fc2]", "callbacks.rank.keep_flops=0.8"]
    main(["train", *words, f"hydra.run.dir={run}"])
    main(["ranks", str(run), "--images", "200"])
    printed = capsys.readouterr().out
    assert "net.fc2" in printed
    assert "net.fc1 (two factors already)" in " ".join(printed.split())
    assert (run / "ranks.png").is_file()
    for words, message in (
        ([str(run), "--tolerance", "2"], "a tolerance is a fraction"),
        ([str(run), "--images", "1"], "give 2 or more; got 1"),
        ([str(tmp_path / "none")], "No such file"),
    ):
        with pytest.raises(SystemExit):
            main(["ranks", *words])
        assert message in capsys.readouterr().err
