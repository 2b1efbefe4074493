"""Quantization: projections, activation quantizers, and the callback in training."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import Case
from lightning.pytorch.callbacks import ModelCheckpoint
from test_guarantees import half, resumed_equals_whole
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from fitsmall.callbacks import (
    EMA,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    Plan,
    QuantizationAwareTraining,
)
from fitsmall.compressors import (
    ActivationQuantizer,
    Quantize,
    TopK,
    load,
    restore,
    same_bits,
    save,
)
from fitsmall.compressors.codes.lattice import blocked, lattice
from fitsmall.compressors.projections.quantize import bounds, quantize_, scales_of
from fitsmall.compressors.surgery.quantizers import attach_quantizer
from fitsmall.compressors.weights import Matrices
from fitsmall.experiments.benchmarks.soak import differences
from training import IMAGES, LABELS, Adversaries, Net, Recorder, fit, loader, trainer, validation

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


# Projections.


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "granularity", "axis"),
    [
        ((16, 40), "channel", 0),
        ((16, 40), "tensor", 0),
        ((16, 40), 10, 0),
        ((8, 6, 5, 5), "channel", 0),
        ((8, 6, 5, 5), "channel", 1),
    ],
)
def test_steps_are_as_good_as_a_fine_search(
    bits: int, shape: tuple[int, ...], granularity: Any, axis: int
) -> None:
    weight = normal(*shape)
    blocks = Matrices("", axis, 1 - axis).scale_shape(shape, granularity)
    rows = blocked(weight, blocks)
    low, high = bounds(bits)
    least = torch.full((len(rows), 1), torch.inf)
    for clip in torch.linspace(0.1, 1.05, 500):
        steps = rows.abs().amax(1, keepdim=True) / high * clip
        error = (rows / steps).round().clamp(low, high).mul(steps).sub(rows).square()
        least = torch.minimum(least, error.sum(1, keepdim=True))
    found = Quantize(bits, granularity, axis).project(weight)
    # Eight digits of a step are 0.2 %, which counts where integers are large.
    worse = 1.02 if bits <= 5 else 1.1
    assert float((found - weight).square().sum()) <= worse * float(least.sum())


def test_zeros_stay_zero_and_negative_zeros_do_not_arise() -> None:
    weight = normal(20, 30)
    weight[0] = 0
    found = (TopK(0.8) | Quantize(4)).project(weight)
    assert int((found != 0).sum()) <= 120
    quantized = quantize_(weight.clone(), scales_of(weight, 4, (20, 1)), 4)
    assert not quantized[0].any()
    assert not (torch.signbit(quantized) & (quantized == 0)).any()


def test_integers_can_be_negated_where_batch_norm_is_folded() -> None:
    integers = Quantize(8).encode(-normal(50, 50).abs()).integers  # type: ignore[attr-defined]
    assert int(integers.min()) == -127


# Activation quantizers.


def calibrated(quantizer: ActivationQuantizer, x: Tensor) -> ActivationQuantizer:
    quantizer.observing = True
    quantizer(x)
    quantizer.commit()
    quantizer.observing, quantizer.active = False, True
    return quantizer


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_lsq(bits: int, signed: bool) -> None:
    x = normal(400) if signed else normal(400).abs()
    quantizer = calibrated(ActivationQuantizer(bits, learned=True), x)
    step = quantizer.log_scale.exp().clone().requires_grad_()
    quantizer.log_scale.requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    gradient = normal(400)
    y = quantizer(mine)
    y.backward(gradient)
    learnable = torch._fake_quantize_learnable_per_tensor_affine
    zero = quantizer.zero_point.clone().view(1)
    expected = learnable(theirs, step.view(1), zero, 0, 2**bits - 1, 1.0)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(quantizer.log_scale.grad, step.grad * step.detach())
    assert y.unique().numel() <= 2**bits


def test_ranges_move_when_a_step_is_taken_and_not_before() -> None:
    quantizer = ActivationQuantizer(8)
    quantizer.observing = True
    quantizer(torch.tensor([1.0, 3.0]))
    quantizer.drop()  # the step was skipped
    quantizer.commit()
    assert quantizer.seen.tolist() == [0, 0, -1]
    for _ in range(2):  # a forward pass that is run again
        quantizer(torch.tensor([-1.0, 2.0], requires_grad=True))
    quantizer.commit()
    assert quantizer.seen.tolist() == [-1, 2, 1.5]
    quantizer.eval()
    quantizer(torch.tensor([50.0]))
    with torch.no_grad():
        quantizer.train()(torch.tensor([50.0]))
    assert quantizer.staged[2] == -1


def test_steps_of_data_are_not_learned(tmp_path: Path) -> None:
    """A gradient of theirs would need one of the data, a matrix product for nothing else."""

    class Watch(pl.Callback):
        learns: tuple[bool, ...] = ()

        def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
            layers = module.body[0], module.head
            self.learns = tuple(x.input_quantizer.log_scale.grad is not None for x in layers)

    watch = Watch()
    module = fit(tmp_path, watch, QuantizationAwareTraining(start=0.3, stop=1.0))
    assert watch.learns == (False, True)
    first = module.body[0].input_quantizer
    assert float(first.log_scale.exp()) == pytest.approx(float(IMAGES.max()) / 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_arithmetic_is_in_float32(dtype: torch.dtype) -> None:
    x = normal(1000).abs()
    quantizer = calibrated(ActivationQuantizer(8), x)
    narrow = quantizer(x.to(dtype))
    assert narrow.dtype == dtype
    assert torch.equal(narrow, quantizer(x.to(dtype).float()).to(dtype))
    assert quantizer.to(dtype).log_scale.dtype == torch.float32


def test_quantizers_are_copied_saved_and_attached_once() -> None:
    layer = nn.Linear(4, 3)
    quantizer = calibrated(attach_quantizer(layer, 4), normal(5, 4))
    assert attach_quantizer(layer, 4) is quantizer
    x = normal(7, 4)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), layer(x))
        assert len(made._forward_pre_hooks) == 1
    fresh = nn.Linear(4, 3)
    attach_quantizer(fresh, 8)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


# In training.


def methods(scale: str = "mse", inputs: str = "learned", **kwargs: Any) -> list[Any]:
    quantization = QuantizationAwareTraining(
        4, 4, scale, inputs, start=0.3, stop=0.8, observe_steps=5, **kwargs
    )
    return [GradualPruning(0.8, stop=0.5), quantization]


EVERY = [("mse", "learned"), ("mse", "range"), ("learned", "learned")]
every_scale = pytest.mark.parametrize(("scale", "inputs"), EVERY)


def error(module: Net) -> float:
    module.eval()
    return float((module(IMAGES[640:]).argmax(1) != LABELS[640:]).float().mean())


def check(module: Net, bits: int = 4) -> None:
    for name in ("body.0", "head"):
        layer = module.get_submodule(name)
        found = lattice(layer.weight.detach().float())
        assert found is not None
        assert int(found[1].abs().max()) <= 2 ** (bits - 1)
        assert layer.input_quantizer.active
        assert layer.input_quantizer(IMAGES[:, : layer.in_features]).unique().numel() <= 2**bits


@cache
def dense_error(root: Path) -> float:
    return error(fit(root, max_epochs=10))


@every_scale
def test_pruned_and_quantized_in_one_fit(scale: str, inputs: str, tmp_path: Path) -> None:
    checkpoint, monitor = CompressedCheckpoint(tmp_path), CompressionMonitor()
    module = fit(tmp_path, *methods(scale, inputs), monitor, checkpoint, max_epochs=10)
    assert module.trainer.callback_metrics["compression/bits/head.weight"] == 4
    check(module)
    zeros = sum(int((module.get_submodule(n).weight == 0).sum()) for n in ("body.0", "head"))
    assert zeros >= 0.8 * 2960 - 1
    assert error(module) < dense_error(tmp_path.parent) + 0.03
    assert checkpoint.path is not None
    # The plain class gets its quantizers with its weights.
    plain = restore(Net(), checkpoint.path).eval()
    assert not list(differences(dict(module.state_dict()), dict(plain.state_dict())))
    assert torch.equal(plain(IMAGES), module.eval()(IMAGES))


@every_scale
def test_resumes_are_exact(scale: str, inputs: str, tmp_path: Path) -> None:
    """In the float, the observing, the quantized and the frozen phase."""
    case = Case(lambda: methods(scale, inputs, freeze_norms=0.9))
    steps = [4, 9, 20, 33, 37]
    resumed_equals_whole(tmp_path, case, steps, lambda: EMA(decay=0.9), precision="bf16-mixed")


@pytest.mark.parametrize(("scale", "inputs"), EVERY[1:])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true", "16-mixed"])
def test_every_precision(scale: str, inputs: str, precision: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"plugins": [half()]} if precision == "16-mixed" else {}
    kwargs = kwargs or {"precision": precision}
    epochs = 8 if precision == "16-mixed" else 4  # the first steps overflow
    module = fit(tmp_path, *methods(scale, inputs), max_epochs=epochs, **kwargs)
    for name in ("body.0", "head"):
        layer = module.get_submodule(name)
        assert lattice(layer.weight.detach().float()) is not None
        assert layer.input_quantizer.log_scale.dtype == torch.float32
        assert layer.input_quantizer.active


class Scheduled(Net):
    """A learning rate that changes in every step."""

    def __init__(self, schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


@pytest.mark.parametrize(
    "schedule",
    [lambda o: LambdaLR(o, lambda step: 0.5), lambda o: OneCycleLR(o, 0.02, 40, pct_start=0.6)],
    ids=["half", "cycle"],
)
def test_learned_scales_follow_the_schedule_of_the_learning_rate(
    schedule: Any, tmp_path: Path
) -> None:
    """The first step of Adam is as long as its rate, 0.003 of a scale where the schedule peaks."""

    class Watch(pl.Callback):
        fraction = 0.0
        scales: tuple[Tensor, ...] = ()

        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 12:  # the first with a gradient of scales
                (group,) = trainer.optimizers[0].param_groups
                self.fraction = group["lr"] / group.get("max_lr", group["initial_lr"])

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            self.scales += (module.head.input_quantizer.log_scale.detach().clone(),)

    watch = Watch()
    quantization = QuantizationAwareTraining(4, 4, "learned", start=0.3, stop=1.0)
    fit(tmp_path, quantization, watch, module=Scheduled(schedule))
    moved = float((watch.scales[12] - watch.scales[11]).abs())
    assert 0.1 < watch.fraction < 0.9
    assert moved == pytest.approx(0.003 * watch.fraction, rel=1e-3)


def test_a_learning_rate_of_zero_moves_neither_weights_nor_scales(tmp_path: Path) -> None:
    recorder, module = Recorder(), Scheduled(lambda o: LambdaLR(o, lambda step: step < 20))
    fit(tmp_path, QuantizationAwareTraining(4, 4, "learned", stop=1.0), recorder, module=module)
    still = [torch.equal(before, after) for before, after in pairwise(recorder.seen)]
    assert still == [False] * 19 + [True] * 20


def test_a_skipped_step_leaves_no_trace(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        seen: Any = None

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if self.seen is None:
                self.seen = module.head.input_quantizer.seen.tolist()

    watch, (_, quantization) = Watch(), methods()
    quantization.observe_steps = 100
    fit(tmp_path, quantization, watch, plugins=[half()])
    assert watch.seen == [0, 0, -1]


@every_scale
def test_averages_are_quantized(scale: str, inputs: str, tmp_path: Path) -> None:
    class Signed(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images - 0.3)

    averaged = EMA(decay=0.77)
    module = fit(tmp_path, *methods(scale, inputs), averaged, module=Signed(), max_epochs=8)
    check(module)
    grid = module.body[0].input_quantizer
    assert int(grid.bits) == 4
    assert 0 < grid.zero_point < 15
    assert grid.zero_point == grid.zero_point.round()
    # It may also be listed first.
    check(fit(tmp_path, EMA(decay=0.77), *methods(scale, inputs), module=Signed(), max_epochs=8))


def test_compiled_modules_are_compiled_once_a_phase(tmp_path: Path) -> None:
    pl.seed_everything(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = Net()
    compiled = torch.compile(module, backend="aot_eager")
    trainer(tmp_path, *methods(freeze_norms=0.9), max_epochs=4).fit(compiled, loader())
    check(module)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # Float, observing, quantized, frozen steps, frozen norms.
    assert 2 < counters["stats"]["unique_graphs"] <= 5


def test_checkpoints_are_evaluated_as_they_were_trained(tmp_path: Path) -> None:
    runner = trainer(tmp_path, *methods(), max_epochs=8)
    pl.seed_everything(0)
    runner.fit(Net(), loader(), validation())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    expected = runner.callback_metrics["val/error"]
    fresh = trainer(tmp_path, *methods())
    (found,) = fresh.validate(
        Net(), validation(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    assert found["val/error"] == float(expected)


def test_norms_are_frozen(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        means: tuple[Tensor, ...] = ()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            self.means += (module.body[1].running_mean.clone(),)

    watch = Watch()
    fit(tmp_path, *methods(freeze_norms=0.5), watch)
    assert not torch.equal(watch.means[18], watch.means[19])
    assert all(same_bits(watch.means[19], mean) for mean in watch.means[20:])


def test_a_second_training_begins_in_float(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        active: tuple[bool, ...] = ()

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            self.active += (module.head.input_quantizer.active,)

    module = fit(tmp_path, *methods())
    watch = Watch()
    fit(tmp_path, *methods(), watch, module=module)
    assert watch.active == (False,) * 12 + (True,) * 28


def test_other_bits_in_another_training(tmp_path: Path) -> None:
    module = fit(tmp_path, *methods())
    fit(tmp_path, QuantizationAwareTraining(8, 2, activation_scale="range"), module=module)
    assert module.head.input_quantizer.extra_repr() == "bits=2, learned=False"
    assert module.head.input_quantizer(IMAGES[:, :40]).unique().numel() <= 4
    fit(tmp_path, QuantizationAwareTraining(8, None), module=module)
    assert list(module.state_dict()) == list(Net().state_dict())
    assert not module.head._forward_pre_hooks


def test_two_optimizers_after_one_backward(tmp_path: Path) -> None:
    class Both(Adversaries):
        def training_step(self, batch: list[Tensor], _: int) -> None:  # type: ignore[override]
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    module = fit(tmp_path, *methods("learned"), module=Both(), max_epochs=8)
    check(module)


@pytest.mark.parametrize("late", [False, True])
def test_checkpoints_with_other_quantizers_are_resumed(late: bool, tmp_path: Path) -> None:
    """Of a training in float, and of one in which a layer joined later."""

    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            if late and trainer.current_epoch == 1:
                module.body.requires_grad_(True)

    def train(path: Path | None, *callbacks: pl.Callback) -> Net:
        pl.seed_everything(0)
        module = Net()
        module.body.requires_grad_(not late)
        runner = trainer(tmp_path, *callbacks, Unfreeze(), enable_checkpointing=True)
        runner.fit(module, loader(), ckpt_path=path, weights_only=True)
        runner.save_checkpoint(tmp_path / "last.ckpt")
        return module

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=20, save_top_k=-1)
    train(None, *(methods()[1:] if late else []), saver)
    module = train(tmp_path / "step=20.ckpt", methods()[1])
    assert module.head.input_quantizer.active
    # What joins once steps are frozen has seen nothing to place its grid by.
    assert late or module.body[0].input_quantizer.active


def test_gradients_that_overflow_move_no_step(tmp_path: Path) -> None:
    class Overflow(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
            if module.head.input_quantizer.log_scale.grad is not None:
                module.head.input_quantizer.log_scale.grad.fill_(float("inf"))

    module = fit(tmp_path, *methods(), Overflow())
    check(module)
    assert module.head.input_quantizer.log_scale.isfinite()


def test_layers_are_called_in_every_way() -> None:
    layer = nn.Linear(4, 3)
    quantizer = calibrated(attach_quantizer(layer, 2), normal(5, 4))
    x = normal(7, 4)
    assert torch.equal(layer(input=x), layer(x))
    quantizer.observing = True
    assert layer(x[:0]).shape == (0, 3)
    for _ in range(2000):
        quantizer(torch.zeros(3))
        quantizer.commit()
    assert quantizer(torch.zeros(3)).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "bits", "granularity"),
    [((4096, 64), 4, "channel"), ((512, 128), 2, "channel"), ((256, 480), 4, 24)],
)
def test_files_hold_integers_however_many_channels(
    shape: tuple[int, int], bits: int, granularity: Any, tmp_path: Path
) -> None:
    weight = Quantize(bits, granularity).project(normal(*shape))
    steps = math.prod(Matrices("").scale_shape(shape, granularity))
    size = save(tmp_path / "w", {"w": weight})
    assert size < (bits * weight.numel() + 16 * steps) / 8 + 200
    assert same_bits(load(tmp_path / "w")["w"], weight)


# What is quantized, and mistakes.


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4)
        self.conv = nn.Conv1d(16, 8, 3)
        self.up = nn.ConvTranspose1d(8, 4, 3)
        self.norm = nn.LayerNorm(4)


def test_what_is_quantized_is_listed() -> None:
    text = str(Plan([QuantizationAwareTraining()], Everything(), horizon=100))
    assert "inputs of 8 bits: conv, up\n" in text
    alone = "weights alone, not their inputs: embedding, attention, attention.out_proj"
    assert alone in text
    assert "left out (a bias or a norm): attention.in_proj_bias, " in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 1}, "weights are of 2 to 8 bits, or of 16, and got bits=1"),
        ({"weight_bits": 12}, "got bits=12"),
        ({"activation_bits": 16}, "activations are of 2 to 8 bits, and got bits=16"),
        ({"overrides": {"head": 9}}, "got bits=9"),
        (
            {"granularity": "row"},
            "'channel', 'tensor', or the size of a group, 8 or more, and got 'row'",
        ),
        ({"weight_scale": "max"}, "unknown weight_scale 'max', choose mse or learned"),
        ({"activation_scale": "mse"}, "unknown activation_scale 'mse', choose learned or range"),
        ({"granularity": 4}, "8 or more, and got 4"),
        ({"weight_bits": 8.0}, "got bits=8.0"),
        ({"overrides": {"head": "8"}}, "an override is a number of bits, or a pair.*got '8'"),
        ({"overrides": {"head": [8]}}, r"got \[8\]"),
        ({"overrides": {"head": None}}, "got None; to leave a layer out, exclude it"),
        ({"observe_steps": -3}, "observe_steps=-3 is no number of optimizer steps"),
        ({"freeze_norms": 90}, "freeze_norms=90 is no fraction of training"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**settings)


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="groups of 9 do not divide a weight of shape"):
        fit(tmp_path, QuantizationAwareTraining(granularity=9))


def test_inputs_that_are_no_numbers(tmp_path: Path) -> None:
    class Diverge(Net):
        def forward(self, images: Tensor) -> Tensor:
            bad = float("nan") if self.global_step == 5 else 1.0
            return self.head(self.body(images) * bad)

    with pytest.raises(FloatingPointError, match="the inputs of head hold NaN or infinity"):
        fit(tmp_path, methods()[1], module=Diverge(torch.optim.SGD))


def test_dead_ranges(tmp_path: Path) -> None:
    class Dead(Net):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.body(images) * 0)

    with pytest.warns(UserWarning, match="the inputs of head were always zero or never seen"):
        fit(tmp_path, methods()[1], module=Dead())


def test_inputs_that_were_never_seen(tmp_path: Path) -> None:
    class Functional(Net):
        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.linear(self.body(images), self.head.weight, self.head.bias)

    with pytest.warns(UserWarning, match="the inputs of head were always zero or never seen"):
        fit(tmp_path, methods()[1], module=Functional())


def test_nothing_to_quantize(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compress"):
        fit(tmp_path, QuantizationAwareTraining(exclude=["body", "head"]))
