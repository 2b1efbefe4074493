"""Channel pruning in training: the pull, the cut, and what comes after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from fitsmall.callbacks import (
    EMA,
    ChannelPruning,
    Compress,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    QuantizationAwareTraining,
    RandomState,
    RankLearning,
)
from fitsmall.compressors import Factored, load, restore, to_plain
from fitsmall.compressors.choices.width_choice import Term, WidthCosts, choose_units
from fitsmall.compressors.export.latency import LatencyRatio, forward_of
from fitsmall.compressors.surgery.narrowing import Narrowing
from fitsmall.compressors.training.channels import latency_target
from fitsmall.compressors.training.channels.network_calls import NetworkCalls
from training import IMAGES, LABELS, ModelCheckpointAt, Net, fit, resumable, trainer


class Block(nn.Module):
    """A residual block with attention on positions, all of its sizes written down."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.shrink(self.grow(x).relu())


class Vision(Net):
    """Convolutions with a shortcut, then attention: the network is a part of the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.Flatten(2),
            nn.Unflatten(2, (16,)),
        )
        self.block = Block(16)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.body(images).transpose(1, 2)).mean(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def multiply_adds(module: Net) -> int:
    """Multiply-adds of products with weights for one image."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return sum(layer.weight.numel() * (1 if n == "head" else 16) for n, layer in layers.items())


class Observer(pl.Callback):
    """The outputs before and after the step in which units leave."""

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.gaps: list[float] = []
        apply = Narrowing.apply

        def watched(surgery: Narrowing, module: Any, optimizers: Any = ()) -> dict[str, bool]:
            outputs = []
            module.eval()
            for _ in range(2):
                outputs.append(module(IMAGES).detach())
                done = {} if len(outputs) > 1 else apply(surgery, module, optimizers)
            module.train()
            self.gaps.append(float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max()))
            return done

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Narrowing, "apply", watched)

    def on_fit_end(self, *args: Any) -> None:
        self.patch.undo()


def test_units_leave_in_training_and_the_file_makes_a_plain_module_fit(tmp_path: Path) -> None:
    channels, file, observer = (
        ChannelPruning(keep_flops=0.5, cuts=2, stop=0.6, overrides={"block.qkv": 0.5}),
        CompressedCheckpoint(tmp_path),
        Observer(),
    )
    module = fit(
        tmp_path, channels, CompressionMonitor(), file, observer, module=Vision(), max_epochs=10
    )
    assert len(observer.gaps) == 2
    assert max(observer.gaps) < 1e-5
    kept = multiply_adds(module) / multiply_adds(Vision())
    assert 0.4 < kept <= 0.5
    assert channels.left["flops"] == pytest.approx(kept)
    assert {name for name, (before, now) in channels.history.counts.items() if now < before} >= {
        "block.qkv",
        "block.grow",
    }
    assert module.block.heads == channels.history.counts["block.qkv"][1] == 2
    assert (module.eval()(IMAGES[:640]).argmax(1) == LABELS[:640]).float().mean() > 0.7

    (optimizer,) = module.trainer.optimizers
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(module.parameters())
    for parameter in held:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert int(optimizer.state[parameter]["step"]) == 100

    assert file.path is not None
    plain = restore(Vision(), file.path).eval()
    assert shapes(plain) == shapes(module)
    assert torch.equal(plain(IMAGES), module(IMAGES))
    assert plain.block.heads == module.block.heads
    assert file.report is not None
    dense = sum(t.numel() * t.element_size() for t in Vision().state_dict().values())
    assert file.report.bytes_dense == dense
    assert "block.qkv" in file.report.table()
    metrics = module.trainer.callback_metrics
    assert metrics["compression/units/block.qkv"] == module.block.heads
    assert not any("narrowed" in name or "resized" in name for name in to_plain(module))


class Follower(pl.Callback):
    """The size and the heads without the chosen units, after each step."""

    def __init__(self, channels: ChannelPruning) -> None:
        self.channels = channels
        self.kept: list[float] = []
        self.heads: list[float] = []
        self.chosen: list[Tensor] = []

    def on_train_batch_end(self, *args: Any) -> None:
        own = self.channels
        if own.units is not None and own.going:
            self.kept.append(own.widths.left(own.units, own.parameters, "size", own.going))
            self.heads.append(own.metrics()["units/block.qkv"])
            self.chosen.append(torch.cat([*own.going.values()]))


def test_more_units_are_chosen_until_the_budget_is_met(tmp_path: Path) -> None:
    """Before the cut the choice stands."""
    channels = ChannelPruning(
        keep_size=0.5, start=0, stop_step=40, round_to=1, every=1, overrides={"block.qkv": 0.5}
    )
    follower = Follower(channels)
    fit(tmp_path, channels, follower, module=Vision())
    kept = torch.tensor(follower.kept)
    assert len(kept) == 39
    assert kept[::4].tolist() == pytest.approx(
        [max(0.5, 1 - 0.5 * step / 32) for step in range(1, 40, 4)], abs=0.04
    )
    assert all(torch.equal(own, follower.chosen[-1]) for own in follower.chosen[31:])
    assert follower.heads[::8] == [4, 3, 3, 2, 2]


@pytest.mark.parametrize("steps", [(8, 20), (24, 25, 39)], ids=["before", "at and after"])
def test_resuming_is_exact(steps: tuple[int, ...], tmp_path: Path) -> None:
    """The module ends as an average, which became narrower with it."""

    def run(resume: Path | None = None) -> Vision:
        pl.seed_everything(1)
        module, saver = Vision(), ModelCheckpointAt(tmp_path, *steps)
        channels = ChannelPruning(keep_size=0.6, stop=0.6)
        callbacks = [channels, EMA(decay=0.8), RandomState(), saver]
        training = trainer(tmp_path, *callbacks, enable_checkpointing=True)
        training.fit(module, resumable(), ckpt_path=resume)
        return module

    expected = run().state_dict()
    for step in steps:
        found = run(tmp_path / f"step={step}.ckpt").state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], own) for name, own in expected.items())


class Own(nn.Linear):
    """A layer that says itself what it saves, as those of PyG."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            own = getattr(self, name)
            destination[f"{prefix}{name}"] = own if keep_vars else own.detach()


class Saving(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Own(64, 40), nn.ReLU())
        self.head = Own(40, 10)


def test_layers_that_save_no_buffers(tmp_path: Path) -> None:
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, ChannelPruning(keep_size=0.5), file, module=Saving()).eval()
    assert module.head.in_features < 20
    assert file.path is not None
    assert torch.equal(restore(Saving(), file.path).eval()(IMAGES), module(IMAGES))


class Twofold(Net):
    """Two networks that share nothing, called one after the other, under mixed precision.

    The module holds a layer of one of them as well, by a name that comes first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 40)
        self.encoder = nn.Sequential(self.first, nn.ReLU(), nn.Linear(40, 16))
        self.decoder = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 10))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])


def test_every_network_of_a_module_is_traced_by_its_own_calls(tmp_path: Path) -> None:
    module = fit(tmp_path, ChannelPruning(keep_size=0.6), module=Twofold(), precision="bf16-mixed")
    widths = module.encoder[0].out_features, module.decoder[0].out_features
    assert all(width < 40 for width in widths)
    assert module.encoder[2].out_features == 16  # where one ends and the other begins


class Varying(Net):
    """Reads texts of 8 tokens in the first step, and of one token later."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 40), nn.ReLU())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        length = 1 if self.global_step else 8
        logits = self(batch[0][:, None].expand(-1, length, -1)).mean(1)
        return nn.functional.cross_entropy(logits, batch[1])


def test_costs_are_those_of_the_first_call(tmp_path: Path) -> None:
    channels = ChannelPruning(keep_flops=0.5, cuts=2)
    module = fit(tmp_path, channels, module=Varying())
    assert module.head.in_features == 20
    assert channels.left["flops"] == pytest.approx(0.5)


def test_other_methods_act_on_the_narrower_network(tmp_path: Path) -> None:
    file = CompressedCheckpoint(tmp_path)
    module = fit(
        tmp_path,
        ChannelPruning(keep_size=0.7, stop=0.3),
        RankLearning(keep_size=0.8, start=0.3, stop=0.6, include="block.*"),
        GradualPruning(0.5, start=0.6, stop=0.8, include="block.*"),
        QuantizationAwareTraining(8, 8, start=0.6, stop=0.8, include="body"),
        file,
        module=Vision(),
        max_epochs=6,
    )
    assert module.body[1].out_channels < 16
    assert any(isinstance(layer, Factored) for layer in module.block.children())
    assert file.path is not None
    plain = restore(Vision(), file.path)
    assert torch.equal(plain.eval()(IMAGES), module.eval()(IMAGES))
    assert file.report is not None
    told = {row.description.split()[0] for row in file.report.changed if row.layer == "block.grow"}
    assert {"32", "rank"} <= told


def test_patterns_say_what_may_leave(tmp_path: Path) -> None:
    channels = ChannelPruning(keep_size=0.9, exclude="block.qkv", overrides={"block.grow": 0.25})
    module = fit(tmp_path, channels, module=Vision())
    assert module.block.grow.out_features == 8
    assert module.block.heads == 4
    assert "block.qkv" not in channels.history.counts


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose time grows with the hidden units alone, plus a constant; integers take half
    of it."""

    def forward(
        engine: str, network: Any, args: Any, kwargs: Any, integers: Any
    ) -> Callable[[], object]:
        assert set(integers) <= {name for name, _ in network.named_parameters()}
        network(*args, **kwargs)
        units = network.block.grow.out_features / 32 + network.body[1].out_channels / 16
        return lambda: (0.2 + units) / (1 + bool(integers))

    def measured(one: Any, other: Any, **_: Any) -> LatencyRatio:
        return LatencyRatio(sum(one()) / sum(other()), 0.0)

    monkeypatch.setattr(latency_target, "forward_of", forward)
    monkeypatch.setattr(latency_target, "latency_ratio", measured)


@pytest.mark.usefixtures("engine")
def test_latency_is_met_by_measuring(tmp_path: Path) -> None:
    channels = ChannelPruning(keep_latency=0.6, cuts=2)
    module = fit(tmp_path, channels, module=Vision())
    time = 0.2 + module.block.grow.out_features / 32 + module.body[1].out_channels / 16
    assert time / 2.2 == pytest.approx(0.6, rel=0.05)
    assert channels.left["latency"] == pytest.approx(time / 2.2)
    with pytest.raises(ValueError, match=r"keep_latency=0.05 cannot be reached, .* in torch"):
        fit(tmp_path, ChannelPruning(keep_latency=0.05), module=Vision())


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("keep", "left"), [(0.6, 0.5), (0.4, 0.4)])
def test_latency_of_integers(tmp_path: Path, keep: float, left: float) -> None:
    """Where they alone are fast enough, nothing leaves."""
    compress = Compress(latency=keep, engine="onnxruntime", methods=["channels", "quantize"])
    module = fit(tmp_path, compress, module=Vision())
    assert compress.stages[0].left["latency"] == pytest.approx(left, rel=0.05)
    assert (module.block.grow.out_features == 32) == (keep > 0.5)
    assert module.block.grow.input_quantizer.active


def test_a_chosen_latency_survives_a_checkpoint() -> None:
    """Also between the last choice and the cut."""
    target, resumed = (latency_target.LatencyTarget(0.5, "torch") for _ in range(2))
    target.reached = 0.51
    resumed.load_state_dict(target.state_dict())
    resumed.operated()
    assert resumed.left == 0.51


def test_integers_run_in_an_engine() -> None:
    pytest.importorskip("onnxruntime")
    module, images = Vision().eval(), torch.randn(2, 64)
    assert forward_of("onnxruntime", module, (images,), {}, ["body.1.weight", "head.weight"])
    assert not hasattr(module.body[1], "input_quantizer")


def test_the_cheapest_units_for_their_importance_go_first() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(12, generator=generator) for name in "abc"}
    costs = WidthCosts(
        [
            Term(4.0, (12, 3), {(0, "a"): 1}),
            Term(2.0, (12, 12), {(0, "b"): 1, (1, "a"): 1}),
            Term(1.0, (24, 12), {(0, "c"): 2, (1, "b"): 1}),
        ],
        rest=5.0,
    )
    for steps in (1, 5):
        going = choose_units(scores, costs, 300.0, dict.fromkeys("abc", steps))
        gone = {name: int(mask.sum()) for name, mask in going.items()}
        assert costs.total(gone) <= 300
        for name, mask in going.items():
            assert mask.equal(scores[name] < scores[name].sort().values[gone[name]])
            assert (12 - gone[name]) % steps == 0 or not gone[name]
    assert choose_units(scores, costs, 0.0, dict.fromkeys("abc", 1), {"b": 4})["b"].sum() == 4


class Unsaved(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 40), nn.ReLU())
        self.register_buffer("shift", torch.zeros(40), persistent=False)
        self.body[0].bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images) + self.shift)


class Unfrozen(Unsaved):
    def __init__(self) -> None:
        super().__init__()
        self.body[0].bias.requires_grad_(True)


class Pretrained(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)


HIDDEN = {
    "hidden": {
        **dict.fromkeys(("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"), 0),
        **dict.fromkeys(("body.1.running_mean", "body.1.running_var"), 0),
        "head.weight": 1,
    }
}


class Apart(Net):
    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body[0](batch[0])), batch[1])


class Branching(Net):
    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        return self.head(hidden if hidden.sum() > 0 else -hidden)


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (lambda: ChannelPruning(0.5, integers=True), Net, "integers=True needs keep_latency"),
        (lambda: ChannelPruning(), Net, "give one of keep_flops, keep_size and keep_latency"),
        (lambda: ChannelPruning(keep_flops=50), Net, r"keep_flops is a fraction .* got 50"),
        (lambda: ChannelPruning(0.5, criterion="norm"), Net, "unknown .*criterion 'norm'"),
        (lambda: ChannelPruning(0.5, engine="tensorrt"), Net, "unknown .*engine 'tensorrt'"),
        (lambda: ChannelPruning(0.5, cuts=0), Net, "cuts is at least 1, got 0"),
        (lambda: ChannelPruning(0.5, cuts=21), Net, "cuts=21 do not fit into 16 steps"),
        (lambda: ChannelPruning(0.5, cuts=3, every=9), Net, "chosen every 9 of them"),
        (lambda: ChannelPruning(0.5, overrides={"body*": 0}), Net, r"body\* is a fraction"),
        (lambda: ChannelPruning(keep_size=0.01), Net, r"cannot be reached, .* has 0.1"),
        (lambda: ChannelPruning(0.5, engine=None), Net, "unknown ChannelPruning engine None"),
        (lambda: ChannelPruning(0.5), Unsaved, r"body.0.bias is frozen"),
        (lambda: ChannelPruning(0.5), Unfrozen, r"shift is a buffer .* make it persistent"),
        (lambda: ChannelPruning(0.5), Pretrained, r"body.0.weight is frozen"),
        (lambda: ChannelPruning(0.5, groups={"a": {"head.bias": "0"}}), Net, "no dimension '0'"),
        (lambda: ChannelPruning(0.5), Apart, r"one module\): what body.0, head take and return"),
        (lambda: ChannelPruning(0.5, overrides={"body*": 0.9}), Net, "keep less by overrides, or"),
        (lambda: ChannelPruning(0.5), Branching, r"cannot be traced.*groups="),
        (lambda: ChannelPruning(0.5, groups=HIDDEN), Branching, "give keep_size instead"),
        (lambda: ChannelPruning(0.5, groups={"a": {"b": 0}}), Net, "no parameter or buffer 'b'"),
        (lambda: ChannelPruning(0.5, groups=["head"]), Net, "groups maps names to dimensions"),
    ],
)
def test_mistakes_are_told_before_the_first_step(
    make: Callable[[], ChannelPruning], module: type[Net], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, make(), module=module())


def test_what_cannot_be_traced_is_declared(tmp_path: Path) -> None:
    channels = ChannelPruning(keep_size=0.5, groups=HIDDEN)
    module = fit(tmp_path, channels, module=Branching())
    assert module.head.in_features == channels.history.counts["hidden"][1] < 21


def test_stages_that_cannot_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which ChannelPruning narrows until step 20"):
        fit(tmp_path, ChannelPruning(keep_size=0.6), GradualPruning(0.5))
    with pytest.raises(ValueError, match="list ChannelPruning first"):
        fit(tmp_path, RankLearning(keep_size=0.6), ChannelPruning(keep_size=0.6))


def test_a_file_of_other_widths_does_not_fit(tmp_path: Path) -> None:
    file = CompressedCheckpoint(tmp_path)
    fit(tmp_path, ChannelPruning(keep_size=0.6), file, module=Vision())
    other = Vision()
    other.block.grow = nn.Linear(16, 20)
    other.block.shrink = nn.Linear(20, 16)
    before = shapes(other)
    assert file.path is not None
    with pytest.raises(ValueError, match=r"block.grow.weight narrowed from \(32, 16\), and Vision"):
        restore(other, file.path)
    assert shapes(other) == before
    assert "block.grow.narrowed_weight" in load(file.path)


def test_compiled_networks_are_compiled_after_their_first_call() -> None:
    """Also where two stages record it, and the first of them ends first."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(inputs)
        return graph.forward

    network = torch.compile(nn.Linear(2, 2), backend=backend)
    module, both = nn.ModuleDict({"net": network}), (NetworkCalls(), NetworkCalls())
    for calls in both:
        calls.hook(module)
    network(torch.ones(3, 2))
    for calls in both:
        calls.unhook()
    assert all([*calls.found] == ["net._orig_mod"] for calls in both)
    assert not compiled
    network(torch.ones(3, 2))
    assert compiled
