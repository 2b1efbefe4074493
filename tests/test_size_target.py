"""A target for the size of the file: one price for all tensors, and the file at the end."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from fitsmall.callbacks import EMA, Compress, CompressedCheckpoint, SizeTarget
from fitsmall.compressors import save
from fitsmall.compressors.choices.entropy_constrained import cluster, price_within
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.surgery.factors import Factored
from fitsmall.compressors.training import Plan
from training import Net, fit, loader, trainer, validation


def matrix(seed: int = 0, shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_no_single_weight_is_better_off_with_another_level() -> None:
    """Of a matrix of equal rows and columns, where only the levels' frequencies count."""
    weight, price = matrix(shape=(1, 400)), 0.02
    curvature = np.random.default_rng(1).uniform(0.5, 2.0, weight.shape).astype(np.float32)
    found = cluster(weight, curvature, price)
    counts = np.bincount(found.index.ravel(), minlength=len(found.codebook))
    bits = -np.log2(counts / counts.sum()) + 16 / counts * (np.arange(len(counts)) != found.zero)
    error = curvature[0, :, None] * (weight[0, :, None] - found.codebook) ** 2 / 2
    best = (error + price * bits).argmin(1)
    assert (best == found.index[0]).mean() > 0.97  # the last frequencies changed a little
    assert found.loss == pytest.approx(error[np.arange(400), found.index[0]].sum(), rel=0.01)


def test_a_dearer_bit_gives_fewer_bits_and_more_loss() -> None:
    weight = matrix()
    curves = [cluster(weight, np.ones_like(weight), 10.0**power) for power in range(-6, 1)]
    for cheap, dear in itertools.pairwise(curves):
        assert dear.bits < cheap.bits
        assert dear.loss > cheap.loss
        assert dear.kept <= cheap.kept
    assert curves[0].kept > 2300
    assert curves[-1].kept < 300


def test_the_estimate_is_near_the_coder() -> None:
    """Also where most rows and columns are nearly empty."""
    scales = np.random.default_rng(1).exponential(size=(1, 784)) ** 2
    weight = (matrix(shape=(300, 784)) * scales).astype(np.float32)
    found = cluster(weight, np.ones_like(weight), 1.0)
    coded = exact(torch.from_numpy(found.codebook[found.index]).bfloat16().float()).bits()
    assert 0.01 < found.kept / weight.size < 0.2
    assert found.bits == pytest.approx(coded, rel=0.1)


def test_a_matrix_of_zeros_has_no_levels() -> None:
    found = cluster(np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32), 1e-9)
    assert found.codebook.tolist() == [0.0]
    assert found.kept == 0


def test_no_price_is_enough() -> None:
    with pytest.raises(ValueError, match="at least 7 are needed, and 5 given"):
        price_within(lambda price: 7.0, 5.0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.lstm(inputs.view(-1, 4, 16))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs).relu()).relu())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 4)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False),
        nn.Flatten(),
        nn.Linear(512, 4),
    ),
    "recurrent": Recurrent,
    "tied": Tied,
}


def train(net: nn.Module, *stages: SizeTarget, steps: int = 60) -> list[float]:
    """Train on a function that the network can learn, and return the losses."""
    torch.manual_seed(1)
    inputs = torch.randn(256, 64)
    labels = (inputs[:, :2].sign() @ torch.tensor([1.0, 2.0]) + 3).div(2).long()
    plan, optimizer = Plan(stages, net), torch.optim.Adam(net.parameters(), 0.01)
    plan.hook([optimizer])
    plan.begin(steps)
    losses = []
    for _ in range(steps):
        plan.open()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), labels)
        loss.backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
        losses.append(float(loss.detach()))
    plan.finish()
    return losses


@pytest.mark.parametrize("size", [1 / 10, 1 / 25])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_file_is_just_below_its_target(
    make: Callable[[], nn.Module], size: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = make()
    stage = SizeTarget(size)
    losses = train(net, stage)
    written = save(tmp_path / "net.fitsmall", net.state_dict())
    assert 0.985 * stage.target < written <= stage.target
    assert written == pytest.approx(stage.bytes, rel=0.01)
    assert losses[-1] < losses[0]


def test_zeros_stay_and_levels_are_few(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = NETWORKS["perceptron"]()
    stage = SizeTarget("2 KB")
    train(net, stage)
    for name, parameter in net.named_parameters():
        kept = parameter[parameter != 0]
        assert kept.numel() < parameter.numel() or parameter.dim() == 1
        assert kept.unique().numel() <= len(stage.clusterings[name]["codebook"])
        assert torch.equal(kept.bfloat16().float(), kept)


def test_a_target_beyond_reach_is_refused_before_the_first_step() -> None:
    net = NETWORKS["convolutions"]()
    with pytest.raises(ValueError, match="with every selected weight at zero it takes 15"):
        train(net, SizeTarget("150 B"))


def test_what_is_left_out_counts() -> None:
    torch.manual_seed(0)
    net = NETWORKS["perceptron"]()
    with pytest.raises(ValueError, match=r"a file of 2,000 bytes cannot be reached: .* takes 20,"):
        train(net, SizeTarget("2 KB", exclude="0.weight"))


@pytest.mark.parametrize("size", [40, 1, 0, -0.1, "40", "a lot", "5 PB", "1/0"])
def test_sizes_without_a_meaning(size: object) -> None:
    with pytest.raises(ValueError, match="SizeTarget: a size is a fraction of the dense bytes"):
        SizeTarget(size)  # type: ignore[arg-type]


def test_compress_writes_a_file_of_the_size(tmp_path: Path) -> None:
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, Compress(size=1 / 8), file, module=Net())
    assert file.path is not None
    dense = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert 0.98 * dense / 8 < file.path.stat().st_size <= dense / 8


@pytest.mark.parametrize("methods", [None, ["ranks", "prune", "quantize"]])
def test_layers_become_smaller_first(tmp_path: Path, methods: list[str] | None) -> None:
    compress = Compress(size="1.5 KB", flops=0.6, methods=methods, stop=0.8)
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, compress, file, module=Net())
    assert isinstance(module.body[0], nn.Linear if methods is None else Factored)
    assert sum(weight.numel() for weight in module.parameters()) < 0.7 * 3090
    assert file.path is not None
    assert 1450 < file.path.stat().st_size <= 1500
    assert [row.met for row in compress.outcome(file.path.stat().st_size)] == [True, True]


def test_levels_without_zeros(tmp_path: Path) -> None:
    compress, file = Compress(size="1.5 KB", methods="quantize"), CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, compress, file, module=Net())
    assert file.path is not None
    assert 1450 < file.path.stat().st_size <= 1500
    assert module.body[0].weight.count_nonzero() == 2560


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "Compress has no target: give it size=1/20"),
        ({"flops": 0.5, "latency": 0.5}, "two targets for the same units"),
        ({"size": 0.1, "max_drop": 0.1}, "both say how small the file becomes"),
        ({"max_drop": -1}, "max_drop is a difference of at least 0"),
        ({"size": 0.1, "dense": 0.2}, "dense is what max_drop is compared with"),
        ({"size": 0.1, "engine": "openvino"}, "engine='openvino' measures a latency"),
        ({"size": 20}, "write '20 B'"),
        ({"size": 0.1, "methods": "prune"}, "add 'quantize'"),
        ({"size": 0.1, "methods": ["quantise"]}, "did you mean quantize"),
        ({"size": 0.1, "methods": ["quantize", "ranks"]}, "'ranks', which serves flops"),
        ({"latency": 0.5, "methods": "ranks"}, "'ranks', which serves flops"),
        ({"flops": 0.5, "methods": ["channels", "ranks"]}, "one of 'channels' and 'ranks'"),
        ({"flops": 2}, "keep_flops"),
    ],
)
def test_targets_that_make_no_sense(targets: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compress(**targets)  # type: ignore[arg-type]


class Validated(Net):
    """A network whose metric the test decides."""

    def __init__(self, errors: Callable[[int], float]) -> None:
        super().__init__()
        self.errors = errors
        self.seen: list[int] = []
        self.path = Path()
        self.checked = 0

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        size = len(self.body[0].weight[self.body[0].weight != 0].unique())
        self.seen.append(size)
        self.log("val/error", self.errors(size))


def floor_run(
    tmp_path: Path, errors: Callable[[int], float], **settings: Any
) -> tuple[Validated, Compress]:
    pl.seed_everything(0)
    compress = Compress(max_drop=0.01, **{"start": 0.1, "stop": 0.8} | settings)
    module, file = Validated(errors), CompressedCheckpoint(tmp_path)
    runner = trainer(tmp_path, compress, file, max_epochs=30, num_sanity_val_steps=0)
    runner.fit(module, loader(), validation())
    assert file.path is not None
    module.path = file.path
    return module, compress


def test_validations_see_levels_and_training_goes_on_with_floats(tmp_path: Path) -> None:
    module, compress = floor_run(tmp_path, lambda levels: 0.1)
    assert module.seen[0] > 1000
    assert all(levels < 255 for levels in module.seen[3:])
    assert module.path.stat().st_size < 2500  # nothing held it up
    assert compress.outcome(2000)[-1].met


def test_a_size_that_loses_the_metric_is_taken_back(tmp_path: Path) -> None:
    """With fewer than eight levels the error is worse."""
    module, compress = floor_run(tmp_path, lambda levels: 0.1 if levels >= 8 else 0.2)
    assert min(module.seen) < 8
    assert module.seen[-1] >= 8
    floor = compress.floor
    assert floor.good["bytes"] == pytest.approx(module.path.stat().st_size, rel=0.02)
    assert all(row.met for row in compress.outcome(module.path.stat().st_size))


def test_a_loss_after_the_window_is_taken_back(tmp_path: Path) -> None:
    """The last validation fails, and the file is the one that held."""
    epochs = itertools.count(1)
    module, compress = floor_run(tmp_path, lambda levels: 0.1 if next(epochs) < 30 else 0.2)
    assert next(epochs) == 31
    assert all(row.met for row in compress.outcome(module.path.stat().st_size))
    weights = module.body[0].weight
    assert torch.equal(weights, compress.floor.good["tensors"]["body.0.weight"])


@pytest.mark.parametrize("remembered", [0.3, 1.0])
def test_training_goes_back_as_a_whole(tmp_path: Path, remembered: float) -> None:
    """Levels, latents and moments; also where nothing held after the window."""
    epochs = itertools.count(1)
    module, compress = floor_run(
        tmp_path, lambda _: 0.1 if next(epochs) <= 30 * remembered else 0.2, stop=0.5
    )
    floor, runner = compress.floor, module.trainer
    [optimizer] = runner.optimizers
    for state in optimizer.state.values():
        state["exp_avg"].fill_(7)
    floor.restore_(runner)
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    saved = [state["exp_avg"] for state in floor.good["moments"]]
    assert all(torch.equal(now, then) for now, then in zip(moments, saved, strict=True))
    assert len(module.body[0].weight.unique()) <= 1 + len(
        floor.stage.clusterings["body.0.weight"]["codebook"]
    )
    assert floor.outcome().met


def test_a_network_that_loses_at_once_stays_dense(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no size kept val/error within 0.01 of 0.1"):
        module, compress = floor_run(tmp_path, lambda levels: 0.1 if levels > 300 else 0.9)
    assert module.seen[-1] > 1000
    assert not compress.floor.outcome().met


def test_the_dense_metric_has_to_be_known(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no validation before step"):
        floor_run(tmp_path, lambda levels: 0.1, start=0.0)


def test_an_accuracy_needs_a_mode() -> None:
    with pytest.raises(MisconfigurationException, match="more is usually better"):
        Compress(max_drop=0.01, monitor="val/acc")


def test_a_validation_sees_the_levels_that_the_file_has(tmp_path: Path) -> None:
    class Seen(Validated):
        def on_validation_epoch_start(self) -> None:
            target = compress.floor.stage if compress.floor is not None else None
            assert target is not None
            for name, mine in target.clusterings.items():
                weight = self.get_parameter(name)
                levels = mine["codebook"].bfloat16().float()
                assert torch.isin(weight[weight != 0], levels).all()
                self.checked += 1

    pl.seed_everything(0)
    module = Seen(lambda levels: 0.1)
    compress = Compress(max_drop=0.01, start=0.2, stop=0.6)
    runner = trainer(tmp_path, compress, max_epochs=10, num_sanity_val_steps=0)
    runner.fit(module, loader(), validation())
    assert module.checked > 20
    final = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert compress.floor is not None
    compress.floor.show_levels_(runner)
    assert all(torch.equal(final[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("methods", [None, ["ranks", "prune", "quantize"]])
def test_layers_that_become_smaller_before_a_size_fails(
    tmp_path: Path, methods: list[str] | None
) -> None:
    """The network that was remembered has other layers, and cannot come back."""
    epochs = itertools.count()
    with pytest.warns(UserWarning, match="no size kept val/error"):
        module, compress = floor_run(
            tmp_path, lambda _: 0.1 if next(epochs) < 13 else 0.9, flops=0.5, methods=methods
        )
    assert sum(weight.numel() for weight in module.parameters()) < 0.7 * 3090
    assert not compress.outcome(1000)[-1].met


class Stop(pl.Callback):
    """Ends training after the second epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_a_training_that_stops_early_has_not_met_its_target(tmp_path: Path) -> None:
    compress, file = Compress(size="2 KB"), CompressedCheckpoint(tmp_path)
    runner = trainer(tmp_path, compress, file, Stop(), max_epochs=10)
    with pytest.warns(UserWarning, match="has not reached its full strength"):
        runner.fit(Net(), loader())
    assert not compress.outcome(1000)[0].met


@pytest.mark.parametrize("methods", ["channels", "ranks"])
def test_layers_that_are_not_smaller_yet(tmp_path: Path, methods: str) -> None:
    compress = Compress(flops=0.5, methods=methods)
    assert [row.reached for row in compress.outcome(0)] == ["1.000"]
    with pytest.warns(UserWarning, match="full strength"):
        trainer(tmp_path, compress, Stop(), max_epochs=10).fit(Net(), loader())
    assert not compress.outcome(0)[0].met


def test_sizes_that_cannot_be_met_exactly() -> None:
    """More than a tensor has levels for; and fewer bytes than prices tell apart."""
    for size in (0.5, "700 B", "620 B"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
        stage = SizeTarget(size)
        train(net, stage)
        assert coded_size(net.state_dict()) <= stage.target


@pytest.mark.parametrize("average", [False, True])
def test_running_statistics_become_bfloat16(tmp_path: Path, average: bool) -> None:
    """And the file that counts on it has its size, also that of an average."""
    pl.seed_everything(0)
    module, file = Net(), CompressedCheckpoint(tmp_path)
    module.body.insert(1, nn.BatchNorm1d(module.body[0].out_features))
    callbacks = [SizeTarget("2 KB"), file, *([EMA(0.5)] if average else [])]
    trainer(tmp_path, *callbacks, max_epochs=10).fit(module, loader())
    norm = module.body[1]
    for statistic in (norm.running_mean, norm.running_var):
        assert torch.equal(statistic, statistic.bfloat16().float())
        assert len(statistic.unique()) > 10
    assert file.path is not None
    assert 1900 < file.path.stat().st_size <= 2000


def test_frozen_weights_count(tmp_path: Path) -> None:
    """As they are; and where they are more than the whole size, a warning tells."""
    file = CompressedCheckpoint(tmp_path)
    module = Net()
    module.head.requires_grad_(False)
    fit(tmp_path, SizeTarget("3 KB"), file, module=module)
    assert file.path is not None
    assert 2900 < file.path.stat().st_size <= 3000
    module = Net()
    module.body.requires_grad_(False)
    with pytest.warns(UserWarning, match="larger than 2,000 bytes, since body"):
        fit(tmp_path, SizeTarget("2 KB"), module=module)


def test_the_size_is_that_of_the_files_coder(tmp_path: Path) -> None:
    for method in (SizeTarget("2.5 KB"), Compress(size="2.5 KB")):
        file = CompressedCheckpoint(tmp_path, coder="huffman")
        fit(tmp_path, method, file)
        assert file.path is not None
        assert 2400 < file.path.stat().st_size <= 2500


def test_another_module_has_another_dense_metric(tmp_path: Path) -> None:
    compress = Compress(max_drop=0.01, start=0.2, stop=0.8)
    runner = trainer(tmp_path, compress, max_epochs=10, num_sanity_val_steps=0)
    runner.fit(Validated(lambda levels: 0.1), loader(), validation())
    runner.fit_loop.max_epochs = 20
    runner.fit(Validated(lambda levels: 0.5), loader(), validation())
    assert compress.outcome(1)[-1].wanted == "within 0.01 of 0.5"


def test_held_out_data_that_are_too_few(tmp_path: Path) -> None:
    """An error of 10 % on 360 examples has a standard error of 1.6 points."""
    with pytest.warns(UserWarning, match="standard error of 0.016.* validate on 900 or more"):
        floor_run(tmp_path, lambda levels: 0.1)


@pytest.mark.parametrize("sampler", [None, "batches"])
def test_examples_of_a_validation(tmp_path: Path, sampler: str | None) -> None:
    """Half of its batches are used."""
    data = TensorDataset(torch.zeros(360, 64), torch.zeros(360, dtype=torch.long))
    batches = BatchSampler(SequentialSampler(data), 60, drop_last=False)
    held_out = DataLoader(data, 60) if sampler is None else DataLoader(data, batch_sampler=batches)
    module, compress = Validated(lambda levels: 0.1), Compress(max_drop=0.01, start=0.4)
    runner = trainer(tmp_path, compress, max_epochs=4, limit_val_batches=0.5)
    with pytest.warns(UserWarning, match="on 180 examples"):
        runner.fit(module, loader(), held_out)


def test_a_size_that_is_met_already() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4))
    train(net, SizeTarget(1 / 10))
    with pytest.warns(UserWarning, match="nothing has to become smaller; ask for less"):
        train(net, SizeTarget(1 / 5))
    frozen = nn.Sequential(nn.Linear(100, 100).requires_grad_(False), nn.Linear(100, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = Plan([SizeTarget(1 / 4)], frozen)
        plan.hook([torch.optim.SGD(frozen[1].parameters(), 0.1)])
        plan.begin(100)
