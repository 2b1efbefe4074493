"""Low rank: projections, real factors, and ranks that are learned while training."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lion_pytorch import Lion
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from fitsmall.callbacks import (
    EMA,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    LearningCompression,
    QuantizationAwareTraining,
    RandomState,
    RankLearning,
    WeightSharing,
    plan_of,
)
from fitsmall.compressors import (
    Factored,
    KMeans,
    Rank,
    Sum,
    TopK,
    Truncate,
    factorize,
    restore,
    training,
)
from fitsmall.compressors.projections.lowrank import Factors, matrix
from fitsmall.compressors.surgery.factorable import forms
from fitsmall.compressors.surgery.factors import Factorization, is_factor
from fitsmall.compressors.surgery.kinds import changes, replay
from fitsmall.compressors.surgery.protocol import layout_of
from fitsmall.compressors.surgery.quantizers import attach_quantizer
from fitsmall.compressors.training import Plan
from fitsmall.compressors.training.methods.product_decay import (
    decay_products_,
    decays_weights_directly,
)
from fitsmall.compressors.training.stage import Stage
from fitsmall.experiments.benchmarks.soak import differences
from training import IMAGES, LABELS, Net, fit, resumable, trainer


class Conv1D(nn.Module):
    """As in Hugging Face's transformers: a linear layer whose weight is stored as in x out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 10), (5, 20)),
    "linear without bias": (lambda: nn.Linear(10, 20, bias=False), (5, 4, 10)),
    "inputs first": (lambda: Conv1D(10, 20), (5, 4, 20)),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, 2, 1), (2, 6, 9, 8)),
    "valid, dilated": (
        lambda: nn.Conv2d(6, 8, (3, 5), (2, 1), "valid", dilation=(1, 2)),
        (2, 6, 12, 14),
    ),
    "same, circular": (
        lambda: nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"),
        (2, 6, 9, 8),
    ),
    "in one dimension": (lambda: nn.Conv1d(6, 8, 3), (2, 6, 9)),
    "in three dimensions": (lambda: nn.Conv3d(3, 8, 3, padding=1), (2, 3, 5, 6, 4)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Projections.


@pytest.mark.parametrize("form", ["channels", "separable"])
@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (4, 40, 1, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_nearest_of_its_rank(rank: int, shape: Any, form: str) -> None:
    weight = random(*shape)
    code = Truncate(rank, form=form).encode(weight)
    assert isinstance(code, Factors)
    projected = code.decode()
    values = torch.linalg.svdvals(matrix(weight, form))
    left_out = values[rank:].square().sum()
    torch.testing.assert_close((weight - projected).square().sum(), left_out)
    assert torch.linalg.matrix_rank(matrix(projected, form), rtol=1e-5) == rank
    again = Truncate(rank, form=form).project(projected)
    torch.testing.assert_close(again, projected)
    # Neither factor is larger than the other.
    left, right = code.left.decode(), code.right.decode()
    torch.testing.assert_close(left.T @ left, right @ right.T)


def test_energy_takes_as_few_values_as_hold_it() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    for energy, rank in ((0.5, 1), (9 / 14 + 0.01, 2), (0.93, 3), (1.0, 3)):
        code = Truncate(energy=energy).encode(weight)
        assert isinstance(code, Factors)
        assert code.rank == rank


def test_few_of_many_values_are_found_by_random_projections() -> None:
    left, right = random(1100, 6), random(6, 1200, seed=1)
    weight = left @ right + 1e-3 * random(1100, 1200, seed=2)
    state = torch.get_rng_state()
    projected = Truncate(rank=6).project(weight)
    assert torch.equal(torch.get_rng_state(), state)
    error = (weight - projected).square().sum()
    exact = torch.linalg.svdvals(weight.double())[6:].square().sum()
    assert error <= 1.001 * exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes a rank or an energy"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, r"fraction in \(0, 1\]"),
        ({"rank": 1, "form": "rows"}, "unknown form 'rows'"),
    ],
)
def test_mistakes_in_a_truncation(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncate(**arguments)


def test_what_has_no_rank() -> None:
    with pytest.raises(ValueError, match="no matrix"):
        Truncate(rank=1).project(torch.ones(3))
    with pytest.raises(ValueError, match="separable for convolutions"):
        Truncate(rank=1, form="separable").project(torch.ones(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        Truncate(rank=1).project(torch.full((3, 3), float("nan")))
    net = nn.Sequential(nn.Linear(3, 3))
    nn.init.constant_(net[0].weight, float("inf"))
    with pytest.raises(ValueError, match=r"0\.weight: a weight holds NaN or infinity"):
        factorize(net, {"0.weight": Rank("channels", 1)})


def test_eigenvalues_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    weight = random(6, 9)
    expected = Truncate(rank=2).project(weight)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    torch.testing.assert_close(Truncate(rank=2).project(weight), expected)


@pytest.mark.parametrize("other", [Truncate(rank=2), KMeans(4)], ids=str)
def test_a_sum_is_nearer_than_either_part(other: Any) -> None:
    weight = random(12, 10) + 5 * (random(12, 10, seed=1) > 1.5)
    pair = other + TopK(0.9)
    code = pair.encode(weight)
    assert isinstance(code, Sum)
    assert code.second.decode().count_nonzero() <= 12
    torch.testing.assert_close(other.project(code.first.decode()), code.first.decode())

    def error(projection: Any) -> float:
        return float((weight - projection.project(weight)).norm())

    assert error(pair) < min(error(other), error(TopK(0.9)))


# Factors.


@every_layer
def test_two_layers_compute_what_one_did(make: Any, shape: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(make(), nn.ReLU()).double().eval()
    images = random(*shape).double()
    assert "channels" in forms(plain[0])
    for form in forms(plain[0]):
        net = copy.deepcopy(plain)
        full = min(matrix(net[0].weight, form).shape)
        factorize(net, {"0.weight": Rank(form, full)})
        assert isinstance(net[0], Factored)
        assert not net[0].training
        torch.testing.assert_close(net(images), plain(images))
        torch.testing.assert_close(net[0].weight, plain[0].weight)
        assert net[0].bias is net[0].expand.bias
        (row,) = changes(layout_of(net.state_dict()))
        factors = sum(p.nbytes for p in net.parameters() if p.dim() > 1)
        dense = plain[0].weight.nbytes
        assert (row.layer, row.bytes, row.bytes_before) == ("0", factors + 1, dense)
        for name in ("in_features", "in_channels", "stride", "kernel_size", "nf", "nx"):
            assert getattr(net[0], name, None) == getattr(plain[0], name, None)
        restored = nn.Sequential(make(), nn.ReLU()).double().eval()
        replay(restored, layout_of(net.state_dict()))
        restored.load_state_dict(net.state_dict())
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), restored):
            assert torch.equal(copied(images), net(images))


def test_hooks_go_over_to_the_two() -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    seen = []
    handle = net[0].register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    factorize(net, {"0.weight": Rank("channels", 2)})
    net(torch.ones(3, 6))
    handle.remove()
    net(torch.ones(3, 6))
    assert seen == [torch.Size([3, 5])]


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        if how == "alias":
            self.b = self.a
        elif how == "weight":
            self.b.weight = self.a.weight
        else:
            self.layers = [self.a]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("alias", "a.weight cannot be factored, leave it out: layer a is also b"),
        ("weight", "weight a.weight is tied to b.weight"),
        ("list", "layer a is also held by attribute layers"),
    ],
)
def test_layers_that_others_hold_are_refused(how: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(Tied(how), {"a.weight": Rank("channels", 2)})


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, self.weight - self.weight.mean(), self.bias)


def test_what_cannot_be_factored_is_left_out_with_a_reason() -> None:
    class Mixed(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 6)
            self.grouped = nn.Conv1d(6, 6, 3, groups=2)
            self.standardized = Standardized(6, 6, 3)
            self.attention = nn.MultiheadAttention(6, 2)
            self.single = nn.Linear(6, 1)
            self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
            self.linear = nn.Linear(6, 6)
            self.tied, self.quantized = nn.Linear(6, 6), nn.Linear(6, 6)
            self.other = nn.Linear(6, 6)
            self.other.weight = self.tied.weight
            attach_quantizer(self.quantized, bits=8).active = True

    callback = RankLearning(keep_size=0.5)
    callback.attach(Mixed())
    assert list(callback.selection.chosen) == ["linear.weight"]
    for name, reason in {
        "embedding.weight": "no Linear, Conv1D or convolution layer that can be factored",
        "grouped.weight": "no convolution with groups can be factored",
        "standardized.weight": "Standardized computes with it in a forward of its own",
        "attention.in_proj_weight": "nn.MultiheadAttention multiplies by it",
        "attention.out_proj.weight": "nn.MultiheadAttention multiplies by it",
        "single.weight": "its rank is 1 already",
        "normed.parametrizations.weight.original1": "its weight is computed from another, as under",
        "tied.weight": "weight tied.weight is tied to other.weight",
        "quantized.weight": "its inputs are quantized",
    }.items():
        assert callback.selection.skipped[name].startswith(reason)
    with pytest.raises(ValueError, match="itself the layer to be factored"):
        callback.attach(nn.Linear(6, 6))


# Training.


class Wide(Net):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = nn.Sequential(nn.Linear(64, 60), nn.BatchNorm1d(60), nn.ReLU())
        self.head = nn.Linear(60, 10)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def test_training_ends_in_factors_that_a_file_restores(tmp_path: Path) -> None:
    ranks, file = RankLearning(keep_size=0.4), CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, ranks, CompressionMonitor(), file, module=Wide(), max_epochs=8).eval()
    assert isinstance(module.body[0], Factored)
    found = sum(p.numel() for p in module.parameters())
    total = sum(p.numel() for p in Wide().parameters())
    assert 0.3 * total < found <= 0.4 * total
    assert ranks.left["size"] == pytest.approx(found / total)
    assert (module(IMAGES[:640]).argmax(1) == LABELS[:640]).float().mean() > 0.95
    assert file.path is not None
    restored = restore(Wide(), file.path).eval()
    assert torch.equal(restored(IMAGES), module(IMAGES))
    assert file.report is not None
    assert file.report.bytes_dense == 4 * total + 2 * 60 * 4 + 8  # and batch-norm's averages
    metrics = module.trainer.callback_metrics
    assert metrics["compression/rank/body.0.weight"] == ranks.ranks["body.0.weight"].rank
    assert metrics["compression/ratio"] > 2
    assert metrics["compression/size"] <= 0.4


def test_nothing_jumps_when_layers_become_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Tensor] = []
    apply = Factorization.apply

    def watched(self: Factorization, module: nn.Module, *args: Any) -> dict[str, bool]:
        module.eval()
        outputs.append(module(IMAGES).detach())
        done = apply(self, module, *args)
        outputs.append(module(IMAGES).detach())
        module.train()
        return done

    monkeypatch.setattr(Factorization, "apply", watched)
    fit(tmp_path, RankLearning(keep_size=0.4, stop_step=20), module=Wide())
    before, after = outputs
    assert not torch.equal(before, after)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "inputs_first"),
    [("SGD", False), ("Adam", False), ("AdamW", False), ("Adam", True)],
)
def test_moments_go_over(optimizer: str, inputs_first: bool) -> None:
    """The average gradient of a factor is that of the product, times the other factor."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(6, 8) if inputs_first else nn.Linear(8, 6))
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    opt = getattr(torch.optim, optimizer)(net.named_parameters(), lr=0.1, **options)
    for _ in range(3):
        opt.zero_grad()
        net(torch.randn(5, 8)).square().sum().backward()
        opt.step()
    state = copy.deepcopy(opt.state[net[0].weight])
    surgery = Factorization({"0.weight": Rank("channels", 2)})
    assert surgery.apply(net, [opt]) == {"0.weight": True}
    assert [len(group["params"]) for group in opt.param_groups] == [3]
    assert opt.param_groups[0]["param_names"] == ["0.reduce.weight", "0.expand.weight", "0.bias"]
    key = "momentum_buffer" if optimizer == "SGD" else "exp_avg"
    left, right = net[0].left, net[0].right
    moment = state[key].T if inputs_first else state[key]
    torch.testing.assert_close(opt.state[net[0].expand.weight][key], moment @ right.T)
    torch.testing.assert_close(opt.state[net[0].reduce.weight][key], left.T @ moment)
    opt.zero_grad()
    net(torch.randn(5, 8)).square().sum().backward()
    opt.step()


def test_weight_decay_acts_on_the_product() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False)).double()
    factorize(net, {"0.weight": Rank("separable", 3)})
    pair = net[0]
    sgd = torch.optim.SGD(pair.parameters(), lr=1.0, weight_decay=0.01)
    expected = torch.autograd.grad(
        0.01 * (pair.left @ pair.right).square().sum() / 2, list(pair.parameters())
    )
    before = [p.detach().clone() for p in pair.parameters()]
    for parameter in pair.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decay_products_(sgd, [pair])
    sgd.step()
    for parameter, old, gradient in zip(pair.parameters(), before, expected, strict=True):
        torch.testing.assert_close(old - parameter, gradient)
        parameter.data.copy_(old)
        parameter.grad = torch.zeros_like(parameter)
    # Shrinking by the optimizer itself comes after it, and is the same to first order.
    adam = torch.optim.AdamW(pair.parameters(), lr=1e-3, weight_decay=0.01)
    decay_products_(adam, [pair])
    adam.step()
    for parameter, old, gradient in zip(pair.parameters(), before, expected, strict=True):
        torch.testing.assert_close(old - parameter, 1e-3 * gradient, atol=1e-9, rtol=1e-3)


class Renamed(torch.optim.Adam):
    """A user's own class, which adds decay to the gradient as Adam does."""


class Own(torch.optim.AdamW):
    """A user's own class, with a constructor of its own, which shrinks weights as AdamW does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda net: torch.optim.SGD(net.parameters(), momentum=0.9), False),
        (lambda net: torch.optim.Adam(net.parameters()), False),
        (lambda net: Renamed(net.parameters()), False),
        (lambda net: torch.optim.RAdam(net.parameters()), False),
        (lambda net: torch.optim.NAdam(net.parameters()), False),
        (lambda net: torch.optim.Adagrad(net.parameters()), False),
        (lambda net: torch.optim.Adamax(net.parameters()), False),
        (lambda net: torch.optim.RMSprop(net.parameters()), False),
        (lambda net: torch.optim.Adadelta(net.parameters()), False),
        (lambda net: torch.optim.AdamW(net.parameters()), True),
        (lambda net: torch.optim.AdamW(net.parameters(), amsgrad=True, fused=True), True),
        (lambda net: torch.optim.Adam(net.parameters(), decoupled_weight_decay=True), True),
        (lambda net: torch.optim.RAdam(net.parameters(), decoupled_weight_decay=True), True),
        (lambda net: torch.optim.NAdam(net.parameters(), decoupled_weight_decay=True), True),
        (lambda net: Own(net), True),
        (lambda net: Lion(net.parameters()), True),
    ],
)
def test_the_kind_of_decay_is_found_by_behaviour(make: Any, expected: bool) -> None:
    net = nn.Linear(3, 2)
    optimizer = make(net)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # it wraps the step
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook of the real optimizer"))
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    assert decays_weights_directly(optimizer, optimizer.param_groups[0]) is expected
    assert not list(differences(before, (net.state_dict(), optimizer.state_dict())))


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_resuming_is_exact(make: Any, tmp_path: Path) -> None:
    def run(folder: Path, path: Path | None = None) -> Wide:
        pl.seed_everything(0)
        module = Wide(optimizer=make)
        saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
        data = resumable()
        callbacks = [
            RankLearning(keep_size=0.4, stop=0.5),
            GradualPruning(0.5, start=0.6, stop=0.8),
            RandomState(),
            saver,
        ]
        trainer(folder, *callbacks, enable_checkpointing=True).fit(module, data, ckpt_path=path)
        return module

    expected = run(tmp_path).state_dict()
    for step in (7, 14, 21, 28, 35):
        found = run(tmp_path / "again", tmp_path / f"step={step}.ckpt").state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (step, name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_precisions_and_accumulation(precision: Any, accumulate: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))}
    ranks = RankLearning(keep_size=0.4)
    module = Wide()
    module = module.double() if precision == "64-true" else module
    images = IMAGES.double() if precision == "64-true" else IMAGES
    data = torch.utils.data.DataLoader(TensorDataset(images[:640], LABELS[:640]), 64)
    runner = trainer(tmp_path, ranks, max_epochs=9, accumulate_grad_batches=accumulate, **options)
    pl.seed_everything(0)
    runner.fit(module, data)
    module.eval()
    assert isinstance(module.body[0], Factored)
    assert (module(images[:640]).argmax(1) == LABELS[:640]).float().mean() > 0.9


def test_a_compiled_network(tmp_path: Path) -> None:
    module = Wide()
    module.body.compile(backend="eager")
    ranks = RankLearning(keep_flops=0.4)
    fit(tmp_path, ranks, module=module)
    assert isinstance(module.body[0], Factored)
    assert ranks.left["flops"] <= 0.4


def test_later_methods_act_on_the_factors(tmp_path: Path) -> None:
    methods = [
        RankLearning(keep_size=0.5, stop=0.3),
        GradualPruning(0.5, start=0.3, stop=0.5),
        WeightSharing(8, start=0.5, stop=0.7, exclude="head"),
        QuantizationAwareTraining(4, 8, include="head", start=0.5, stop=0.8),
    ]
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, *methods, file, module=Wide(), max_epochs=8).eval()
    weight = module.body[0].expand.weight
    assert weight[weight != 0].unique().numel() <= 8
    zeros = sum(int((p == 0).sum()) for n, p in module.named_parameters() if n.endswith("t"))
    assert zeros > 400
    assert file.path is not None
    restored = restore(Wide(), file.path).eval()
    assert torch.equal(restored(IMAGES), module(IMAGES))
    plan = plan_of(module.trainer)
    assert plan is not None
    assert "body.0.reduce.weight" in plan.names.values()


def test_inputs_are_quantized_once_layers_are_factors(tmp_path: Path) -> None:
    ranks = RankLearning(keep_size=0.3, stop=0.4)
    quantization = QuantizationAwareTraining(8, 8, start=0.6)
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, ranks, quantization, file, module=Wide()).eval()
    rounding = {name for name, buffer in module.named_buffers() if name.endswith("rounding")}
    assert rounding == {
        f"{layer}.{part}.input_quantizer.rounding"
        for layer in ("body.0", "head")
        for part in ("reduce", "expand")
    }
    assert all(module.get_buffer(name) for name in rounding)
    assert file.path is not None
    assert torch.equal(restore(Wide(), file.path).eval()(IMAGES), module(IMAGES))


def test_patterns_of_weights_are_those_of_their_factors(tmp_path: Path) -> None:
    """Patterns are matched again after surgery, when the weights have other names."""
    ranks = RankLearning(keep_size=0.3, stop=0.4, include=["body.0.weight", "head.weight"])
    pruning = GradualPruning(
        0.9,
        start=0.5,
        allocation="uniform",
        exclude="head.weight",
        overrides={"body.0.weight": 0.8},
    )
    module = fit(tmp_path, ranks, pruning, module=Wide())
    for part, expected in ((module.body[0], 0.8), (module.head, 0.0)):
        for layer in (part.reduce, part.expand):
            zeros = float((layer.weight == 0).float().mean())
            assert zeros == pytest.approx(expected, abs=0.01)


class Gated(nn.Module):
    """A branch that is 0 at first, so that its layer has no gradient: ``b(x) + g a(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 30), nn.Linear(30, 30)
        self.g = nn.Parameter(torch.zeros(()))
        self.unused, self.head = nn.Linear(30, 9), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.b(x) + self.g * self.a(x)).relu())


class ByKeyword(nn.Module):
    """Layers that are initialised lazily, and called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.conv = nn.LazyLinear(64), nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        images = self.wide(input=x).view(-1, 1, 8, 8)
        return self.head(input=self.conv(input=images).relu().flatten(1))


class Small(nn.Module):
    """Two layers of equal costs, so that whole ranks are far apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def train(net: nn.Module, *stages: Stage, loss_factor: float = 1.0, steps: int = 30) -> float:
    """Train on random digits of two pixels, and return the loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    plan = Plan(stages, net)
    plan.hook([optimizer])
    plan.begin(horizon=steps)
    for _ in range(steps):
        inputs = torch.randn(64, 30)
        plan.open()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), inputs[:, :10].argmax(1))
        (loss * loss_factor).backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
    plan.finish()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("make", "keep", "loss_factor"),
    [(Gated, 0.5, 1.0), (Gated, 0.5, 1e22), (ByKeyword, 0.4, 1.0)],
)
@pytest.mark.filterwarnings("ignore:.*no gradients and no inputs")
def test_networks_of_others_meet_their_budget(
    make: Callable[[], nn.Module], keep: float, loss_factor: float
) -> None:
    torch.manual_seed(0)
    net, plain = make(), make()
    ranks = training.RankLearning(keep_flops=keep, stop=0.6)
    with torch.no_grad():
        plain(torch.zeros(1, 30))  # lazy layers
    before = multiply_adds(plain)
    assert train(net, ranks, loss_factor=loss_factor, steps=60) < 2.3
    after = multiply_adds(net)
    assert ranks.left["flops"] == pytest.approx(after / before)
    assert keep - 0.06 < after / before <= keep
    assert "unused.weight" not in ranks.ranks


def multiply_adds(net: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 30))
    return counter.get_total_flops()


@pytest.mark.parametrize("keep", ["keep_flops", "keep_size"])
@pytest.mark.filterwarnings("ignore:.*is missed")
def test_two_parts_of_a_network_have_ranks_of_their_own(keep: str) -> None:
    """One after the other, and again with a second network."""

    def stage(part: str, fraction: float, **window: float) -> training.RankLearning:
        return training.RankLearning(**{keep: fraction}, include=part, **window)

    stages = stage("a", 0.85, stop=0.3), stage("b", 0.85, start=0.2, stop=0.8)
    for net in (Small(), Small()):
        train(net, *stages)
        assert is_factor(net, "a.reduce.weight")
        assert is_factor(net, "b.reduce.weight")


def test_a_budget_that_whole_ranks_miss_is_named() -> None:
    ranks = training.RankLearning(keep_size=0.6)
    with pytest.warns(match=r"keep_size=0\.6 is missed, 0\.\d+ is what can be had"):
        train(Small(), ranks)
    assert ranks.left["size"] < 0.58


def test_a_second_fit_keeps_the_factors(tmp_path: Path) -> None:
    module = fit(tmp_path, RankLearning(keep_size=0.4), module=Wide())
    expected = shapes(module)
    fit(tmp_path, RankLearning(keep_size=0.4), module=module)
    assert shapes(module) == expected


# Mistakes.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankLearning(), "give one of keep_flops, keep_size and price, and got none"),
        (lambda: RankLearning(keep_flops=0.5, price=1.0), "got keep_flops, price"),
        (lambda: RankLearning(keep_flops=1.5), r"keep_flops is a fraction in \(0, 1\), got 1.5"),
        (lambda: RankLearning(keep_size=40), r"keep_size is a fraction in \(0, 1\), got 40"),
        (lambda: RankLearning(price=0.0), "a price is above 0"),
        (lambda: RankLearning(price=1.0, cost="time"), "unknown cost 'time'"),  # type: ignore[arg-type]
        (lambda: LearningCompression(0.9), "projection is a Projection"),  # type: ignore[arg-type]
        (lambda: LearningCompression({}), "projection is a Projection"),
    ],
)
def test_mistakes_in_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_budget_beyond_reach_says_what_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a rank of 1 in every layer leaves 0\.0"):
        fit(tmp_path, RankLearning(keep_flops=0.01), module=Wide())
    with pytest.raises(ValueError, match=r"a rank of 1 in every layer leaves 0\.2"):
        Plan([training.RankLearning(keep_size=0.01, start=0.4)], Small(), horizon=10)


def test_a_price_too_high_leaves_rank_1_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(match=r"body\.0\.weight, head\.weight keep a rank of 1, the lowest"):
        module = fit(tmp_path, RankLearning(price=1e6), module=Wide())
    assert module.body[0].reduce.weight.shape == (1, 64)


def test_methods_that_begin_too_early_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with start_step=20, or leave"):
        fit(tmp_path, RankLearning(keep_size=0.4), GradualPruning(0.5), module=Wide())
    for method in (GradualPruning(0.5, start=0.9), QuantizationAwareTraining(start=0.6)):
        with pytest.raises(ValueError, match="list RankLearning first"):
            fit(tmp_path, method, RankLearning(keep_size=0.4), module=Wide())
    with pytest.raises(MisconfigurationException, match="whose layers RankLearning replaces"):
        fit(tmp_path, RankLearning(keep_size=0.4), EMA(decay=0.9), module=Wide())


def test_divergence_is_named(tmp_path: Path) -> None:
    class Diverging(Wide):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return super().training_step(batch, index) * float("nan")

    with pytest.raises(FloatingPointError, match=r"body\.0\.weight holds NaN"):
        fit(tmp_path, RankLearning(keep_size=0.4), module=Diverging())


def test_patterns_give_projections_their_own_weights(tmp_path: Path) -> None:
    callback = LearningCompression({"head": TopK(0.5), "body.0": Truncate(4)}, stop=0.8)
    module = fit(tmp_path, callback, module=Wide())
    assert float((module.head.weight == 0).float().mean()) == pytest.approx(0.5)
    assert torch.linalg.matrix_rank(module.body[0].weight, rtol=1e-5) == 4
