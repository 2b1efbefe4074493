"""Mistakes get an answer: what, where, and the remedy."""

import os
import resource
import signal
import warnings
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import Case, each_coupling
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from fitsmall.callbacks import (
    EMA,
    AccuracyGuard,
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    ModelCheckpointOnceCompressed,
    ParetoCheckpoint,
    Plan,
    QuantizationAwareTraining,
    RankLearning,
    ResumableLoader,
    WeightSharing,
)
from fitsmall.compressors import TopK, compress, load, restore, same_bits, save
from fitsmall.compressors.training import Stage
from training import IMAGES, Net, fit, loader, trainer, validation

SETTINGS: list[tuple[Callable[[], Any], str]] = [
    (lambda: GradualPruning(95), r"fraction in \[0, 1\], got 95: for 95 % write 0.95"),
    (lambda: GradualPruning(-0.1), r"a sparsity is a fraction in \[0, 1\], got -0.1"),
    (lambda: GradualPruning(overrides={"fc": 80}), "got 80: for 80 % write 0.8"),
    (lambda: GradualPruning(overrides="fc=0.8"), "overrides maps patterns of names to values"),  # type: ignore[arg-type]
    (lambda: GradualPruning(criterion="size"), "unknown criterion 'size'.*magnitude"),
    (lambda: GradualPruning(allocation="fair"), "unknown allocation 'fair'.*lamp"),
    (lambda: GradualPruning(coupling="soft"), "unknown coupling 'soft'.*hard"),  # type: ignore[arg-type]
    (lambda: GradualPruning(start=500), "for optimizer steps write start_step=500"),
    (lambda: GradualPruning(stop=70), "stop=70 is no fraction of training"),
    (lambda: GradualPruning(every=0), "every=0 is no number of optimizer steps"),
    (lambda: GradualPruning(stop_step=-3), "stop_step=-3 is no number of optimizer steps"),
    (lambda: WeightSharing(0), "whole number of clusters from 1"),
    (
        lambda: WeightSharing(16.0),
        "a whole number of clusters from 1 to 4,096, and got clusters=16.0",
    ),  # type: ignore[arg-type]
    (lambda: WeightSharing(overrides={"fc": "9"}), "got clusters='9'"),  # type: ignore[dict-item]
    (lambda: GradualPruning("0.9"), r"a fraction in \[0, 1\], got '0.9'"),  # type: ignore[arg-type]
    (lambda: GradualPruning(start=None), "start=None is no fraction"),  # type: ignore[arg-type]
    (lambda: GradualPruning(every="9"), "every=9 is no number of optimizer steps"),  # type: ignore[arg-type]
    (lambda: GradualPruning(schedule="cubic"), "as Cubic.. is, got 'cubic'"),  # type: ignore[arg-type]
    (lambda: WeightSharing(init="random"), "unknown init 'random', choose linear or optimal"),  # type: ignore[arg-type]
    (lambda: WeightSharing(codebook_dtype="int8"), "codebook_dtype is one of float32"),
    (lambda: WeightSharing(overrides=[("fc", 3)]), "overrides maps patterns"),  # type: ignore[arg-type]
    (lambda: CompressedCheckpoint(weights="first"), "'last' or 'best', got 'first'"),  # type: ignore[arg-type]
    (lambda: CompressionMonitor(0), "every_n_epochs is at least 1, got 0"),
    (lambda: AccuracyGuard("val/acc"), "of 'val/acc', more is usually better.*give mode='max'"),
    (lambda: AccuracyGuard("BinaryAUROC"), "as of every auroc: give mode='max'"),
    (lambda: ParetoCheckpoint("x", "val_top1"), "as of every top1: give mode='max'"),
    (lambda: AccuracyGuard(tolerance=-1), "a tolerance is a number of at least 0, .*got -1"),
    (lambda: restore(Net, "x.fitsmall"), r"as in restore\(MyModule\(\), path\), and got <class"),  # type: ignore[type-var]
    (lambda: AccuracyGuard(tolerance="2%"), "a number of at least 0, .*got '2%'"),  # type: ignore[arg-type]
    (lambda: RankLearning(keep_size="1MB"), r"keep_size is a fraction in \(0, 1\), got '1MB'"),  # type: ignore[arg-type]
    (
        lambda: QuantizationAwareTraining("auto", max_bytes="9 KB"),  # type: ignore[arg-type]
        "max_bytes='9 KB' is no number",
    ),
    (lambda: Plan(Net(), [GradualPruning()]), "a list of stages and a module, and got a Net"),  # type: ignore[arg-type]
    (lambda: Plan(GradualPruning(), Net()), "takes a list of stages.*got a GradualPruning"),  # type: ignore[arg-type]
    (lambda: Plan([EMA()], Net()), "EMA is no stage of compression: leave it out"),  # type: ignore[list-item]
    (lambda: Plan([WeightSharing], Net()), r"WeightSharing is no stage.*write WeightSharing\("),  # type: ignore[list-item]
    (lambda: compress(Net(), GradualPruning()), r"takes a Projection, such as TopK\(0.9\)"),  # type: ignore[arg-type]
    (lambda: TopK(0.5) | WeightSharing(), "unsupported operand.*'TopK' and 'WeightSharing'"),  # type: ignore[operator]
    (lambda: save("x.fitsmall", Net()), r"such as module.state_dict\(\), and got a Net"),  # type: ignore[arg-type]
    (lambda: AccuracyGuard(mode="least"), "the mode of 'val/error' is min or max, got 'least'"),  # type: ignore[arg-type]
    (
        lambda: ParetoCheckpoint("x", mode="least"),
        "the mode of 'val/error' is min or max, got 'least'",
    ),  # type: ignore[arg-type]
    (lambda: ResumableLoader(iter([])), "has no length.*use a DataLoader"),
    (lambda: ResumableLoader([1], generator=None), "sets the order itself: use shuffle and seed"),
]


@pytest.mark.parametrize(("make", "message"), SETTINGS)
def test_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError, TypeError), match=message):
        make()


PLANS: list[tuple[list[Stage], str]] = [
    ([WeightSharing(), GradualPruning()], "second undoes the first: list GradualPruning first"),
    ([GradualPruning(), GradualPruning(exclude="head")], "both act on body.0.weight: leave it out"),
    (
        [WeightSharing(), WeightSharing(include="head.weight")],
        "both act on head.weight: leave it out of one of them with exclude='head.weight'",
    ),
    (
        [GradualPruning(include="body.0.wieght")],
        r"GradualPruning: pattern 'body.0.wieght' matches no parameter of Net; did you mean body.0",
    ),
    ([WeightSharing(exclude="haed")], r"'haed' matches no parameter of Net; did you mean head"),
    (
        [GradualPruning(overrides={"had.weight": 0.5})],
        "override 'had.weight' matches none of the selected parameters; did you mean head.weight",
    ),
    (
        [GradualPruning(criterion="activation", include="body.1.weight")],
        "exclude body.1.weight, or choose another criterion than activation: inputs of BatchNorm",
    ),
    (
        [GradualPruning(0.96, allocation="uniform", include=["head.weight", "head.bias"])],
        "a sparsity of 0.96 leaves none of the 10 weights of head.bias: lower it, exclude",
    ),
    ([GradualPruning(0.9999)], "a sparsity of 0.9999 leaves none of the 2,560 weights of body"),
    ([GradualPruning(overrides={"head": 0.9999})], "leaves none of the 400 weights of head.weight"),
    (
        [WeightSharing(16, include="*.bias", exclude="body")],
        "WeightSharing: name other parameters.* nothing to compress: .*head.bias: 10 weights are",
    ),
    ([GradualPruning(start=0.8, stop=0.5)], "its window ends at step 20, before it starts at step"),
]


@pytest.mark.parametrize(("methods", "message"), PLANS)
def test_plans(methods: list[Stage], message: str, tmp_path: Path) -> None:
    """Said before training starts."""

    class Untouched(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise AssertionError("training has started")

    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, *methods, Untouched())


def test_layers_too_small_are_listed() -> None:
    text = str(Plan([WeightSharing(16, include=["head"])], Net(), horizon=100))
    assert "left out (10 weights are too few for 16 clusters): head.bias" in text
    sharing = WeightSharing(4, include=["head"], overrides={"*.bias": 12})
    assert "(10 weights are too few for 12 clusters): head.bias" in str(Plan([sharing], Net(), 100))


@pytest.mark.filterwarnings("ignore:compress. nothing makes up")
def test_frozen_modules_are_not_compressed_afterwards() -> None:
    frozen = nn.Linear(3, 3).requires_grad_(False)
    remedy = r"make weights trainable.*nothing to compress.*frozen: requires_grad is False"
    with pytest.raises(ValueError, match=remedy):
        compress(frozen, TopK(0.5))
    with pytest.warns(UserWarning, match=r"0\.weight are frozen and stay as they are: make them"):
        assert list(compress(nn.Sequential(frozen, nn.Linear(3, 3)), TopK(0.5))) == ["1.weight"]


@each_coupling
def test_a_schedule_that_ends_after_training(case: Case, tmp_path: Path) -> None:
    methods = case.make()
    for method in methods:
        method.start_step, method.stop_step = 0, 1000
    with pytest.warns(
        UserWarning, match="its window ends at step 1,000, after training does at step"
    ):
        fit(tmp_path, *methods, max_epochs=1)


def test_a_window_after_training(tmp_path: Path) -> None:
    pruning = GradualPruning(start_step=1000, stop_step=2000)
    with pytest.warns(UserWarning, match="begins at step 1,000, and training ends at step 10: it"):
        fit(tmp_path, pruning, max_epochs=1)


@each_coupling
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(case: Case, value: float, tmp_path: Path) -> None:
    class Diverge(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 21:
                module.head.weight.data[3, 4] = value

    methods = case.make()
    for method in methods:
        method.start, method.stop, method.every = 0.0, 1.0, 1
    message = r"weight holds NaN or infinity at step 22.*lower the learning rate, or clip"
    with pytest.raises(FloatingPointError, match=message):
        fit(tmp_path, Diverge(), *methods, module=Net(torch.optim.SGD))


@each_coupling
def test_weights_that_are_no_numbers_at_the_end(case: Case, tmp_path: Path) -> None:
    class Diverge(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 36:  # after all windows
                module.body[1].bias.data.fill_(float("nan"))

    checkpoint = CompressedCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match="training diverged") as warned:
        fit(tmp_path, *case.make(), Diverge(), checkpoint)
    messages = " ".join(str(warning.message) for warning in warned)
    assert "head.weight holds NaN or infinity: training diverged; lower" in messages
    assert "CompressedCheckpoint: body.0.weight, " in messages


@pytest.mark.parametrize("kind", [CompressedCheckpoint, ParetoCheckpoint])
def test_a_folder_that_cannot_be_written_into(kind: Any, tmp_path: Path) -> None:
    """Said before ten hours of training, not after them."""
    (tmp_path / "file").write_text("")
    message = r"file/folder.* cannot be written to .*: name another folder with dirpath"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, GradualPruning(), kind(tmp_path / "file" / "folder"))


def test_tensors_that_no_file_can_hold_are_told_before_training(tmp_path: Path) -> None:
    """Conjugate and negative views can be held: they are resolved."""

    class Holder(Net):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("table", tensor)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized and CSR tensors are deprecated, or a prototype
        kinds = {
            "a sparse_coo tensor: register a dense one": torch.eye(3).to_sparse(),
            "a sparse_csr tensor: register a dense one": torch.eye(3).to_sparse_csr(),
            "torch.quint8, which no file": torch.quantize_per_tensor(
                IMAGES[0], 0.1, 0, torch.quint8
            ),
            "a nested tensor": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        }
    for message, tensor in kinds.items():
        for callback in (CompressedCheckpoint(tmp_path), ParetoCheckpoint(tmp_path)):
            module = Holder(tensor)
            match = f"{type(callback).__name__}: .*'table' is {message}.*persistent=False"
            with pytest.raises(MisconfigurationException, match=match):
                trainer(tmp_path, callback).fit(module, loader(), validation())
    with pytest.raises(TypeError, match="'table' is on the meta device"):
        save(tmp_path / "meta", {"table": torch.empty(3, device="meta")})
    complex_ = torch.complex(IMAGES[0], IMAGES[1])
    views = {"whole": complex_, "conjugate": complex_.conj(), "negative": complex_.conj().imag}
    save(tmp_path / "views", views)
    loaded = load(tmp_path / "views")
    assert all(same_bits(loaded[name], view) for name, view in views.items())


def test_one_cluster_without_zeros(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one cluster all weights of .* would be equal"):
        Plan([WeightSharing(1)], Net(), horizon=9)
    assert Plan([GradualPruning(0.5), WeightSharing(1)], Net(), horizon=9).stages


def test_a_set_of_files_that_cannot_be_written_any_more(tmp_path: Path) -> None:
    class Remove(pl.Callback):
        def on_train_epoch_start(self, *args: Any) -> None:
            (tmp_path / "files").rmdir()
            (tmp_path / "files").write_text("")

    pareto = ParetoCheckpoint(tmp_path / "files")
    runner = trainer(tmp_path, GradualPruning(), Remove(), pareto, max_epochs=1)
    with pytest.warns(UserWarning, match=r"ParetoCheckpoint: .* cannot be written"):
        runner.fit(Net(), loader(), validation())
    assert pareto.points == []


def test_a_folder_that_goes_away_while_training(tmp_path: Path) -> None:
    class Remove(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            (tmp_path / "files").rmdir()
            (tmp_path / "files").write_text("")

    checkpoint = CompressedCheckpoint(tmp_path / "files")
    with pytest.warns(UserWarning, match=r"files cannot be written to .*: the file is .*fitsmall"):
        module = fit(tmp_path, GradualPruning(), Remove(), checkpoint)
    assert checkpoint.path == tmp_path / "model.fitsmall"
    assert torch.equal(restore(Net(), checkpoint.path).head.weight, module.head.weight)


def train_on_a_full_disk(folder: Path, said: Connection) -> None:
    class Full(pl.Callback):
        def on_train_end(self, *args: Any) -> None:  # files may not grow any more
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    os.chdir(folder)
    try:
        fit(folder, GradualPruning(), Full(), CompressedCheckpoint())
    except OSError as error:
        said.send(str(error))


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Every folder is named, none holds half a file."""
    said, ours = Pipe(duplex=False)
    process = get_context("forkserver").Process(target=train_on_a_full_disk, args=(tmp_path, ours))
    process.start()
    process.join()
    message = said.recv()
    assert "File too large" in message
    assert "free some space" in message
    assert not list(tmp_path.glob("**/*.fitsmall*"))


def test_a_logger_that_is_absent(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the Trainer has no logger.*logger=CSVLogger"):
        fit(tmp_path, GradualPruning(), CompressionMonitor())


def test_metrics_that_are_absent(tmp_path: Path) -> None:
    """Told in the first epoch, also by callbacks that wait until everything is compressed."""
    best = ModelCheckpointOnceCompressed(tmp_path, monitor="val/loss")
    for callback in (AccuracyGuard("val/loss"), ParetoCheckpoint(tmp_path, "val/loss"), best):
        runner = trainer(tmp_path, GradualPruning(), callback, enable_checkpointing=True)
        with pytest.raises(MisconfigurationException, match="no 'val/loss' was logged, only val"):
            runner.fit(Net(), loader(), validation())
        assert runner.current_epoch == 0


def test_validations_that_are_absent(tmp_path: Path) -> None:
    for callback in (AccuracyGuard(), ParetoCheckpoint(tmp_path)):
        with pytest.warns(UserWarning, match="does nothing without a validation: give fit a"):
            fit(tmp_path, GradualPruning(), callback, max_epochs=1)


def test_steps_by_hand_that_fractions_do_not_fit(tmp_path: Path) -> None:
    class ByHand(Net):
        automatic_optimization = False

        def __init__(self, steps: Callable[[int], int]) -> None:
            super().__init__()
            self.steps = steps

        def training_step(self, batch: list[Any], index: int) -> None:  # type: ignore[override]
            for _ in range(self.steps(index)):
                self.manual_backward(super().training_step(batch, index))
                self.optimizers().step()

    for steps in (lambda index: index % 2, lambda index: 2):
        with pytest.warns(UserWarning, match=r"first epoch's 10 batches stepped.*give start_step"):
            fit(tmp_path, GradualPruning(), module=ByHand(steps))


def test_a_training_without_optimizer(tmp_path: Path) -> None:
    module = Net()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign, assignment]
    with pytest.raises(MisconfigurationException, match="Net has none: return one from configure"):
        fit(tmp_path, GradualPruning(), module=module)


def test_a_guard_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no compression to pause; add a stage"):
        fit(tmp_path, AccuracyGuard())


def test_a_layer_that_dies_is_pointed_out(tmp_path: Path) -> None:
    pruning = GradualPruning(0.9, overrides={"head": 1.0})
    with pytest.warns(UserWarning, match=r"no weight of head\.weight is left"):
        fit(tmp_path, pruning)


def test_a_layer_without_gradients_is_pointed_out(tmp_path: Path) -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(10, 10)

    with pytest.warns(UserWarning, match=r"left out spare\.weight: no gradients and no inputs"):
        fit(tmp_path, GradualPruning(0.8, "gradient"), module=Spare())


@each_coupling
@pytest.mark.parametrize("first", [True, False])
def test_stock_averages(case: Case, first: bool, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    for averaging in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)):
        callbacks = [averaging, *case.make()] if first else [*case.make(), averaging]
        with pytest.raises(MisconfigurationException, match=r"use fitsmall\.callbacks\.EMA"):
            fit(tmp_path, *callbacks)


def test_stock_pruning(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelPruning

    stock = ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(MisconfigurationException, match=r"use fitsmall\.callbacks\.GradualPruning"):
        fit(tmp_path, WeightSharing(), stock)


def test_best_weights_that_never_were(tmp_path: Path) -> None:
    saver = ModelCheckpointOnceCompressed(tmp_path / "best", monitor="val/error")
    plain = ModelCheckpoint(tmp_path / "plain", every_n_train_steps=5)
    checkpoint = CompressedCheckpoint(tmp_path, weights="best")
    pruning = GradualPruning(0.8, stop_step=10_000)
    runner = trainer(tmp_path, pruning, plain, saver, checkpoint, enable_checkpointing=True)
    module = Net()
    with pytest.warns(UserWarning, match="no best weights were saved.*the file holds the last"):
        runner.fit(module, loader(), validation())
    assert torch.equal(restore(Net(), str(checkpoint.path)).head.weight, module.head.weight)
    assert not (tmp_path / "best").exists()
