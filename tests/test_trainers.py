"""The callbacks in Trainers as people have them: precisions, optimizers, processes, resumes."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from fitsmall.callbacks import (
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    LearningCompression,
    Plan,
    QuantizationAwareTraining,
    RankLearning,
    WeightSharing,
    plan_of,
)
from fitsmall.compressors import CRITERIA, TopK
from fitsmall.compressors.training.settings import settings_of
from training import (
    WEIGHTS,
    Adversaries,
    Idle,
    ModelCheckpointAt,
    Net,
    Recorder,
    fit,
    loader,
    sparsity,
    trainer,
)


def test_max_steps_counts_every_optimizer_and_windows_follow(tmp_path: Path) -> None:
    pruning = GradualPruning(0.8, stop=0.5)
    fit(tmp_path, pruning, module=Adversaries(), max_steps=40, max_epochs=-1)
    assert pruning.window == (0, 10)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_layer_that_idles_at_first(criterion: str, tmp_path: Path) -> None:
    module = fit(
        tmp_path, GradualPruning(0.8, criterion=criterion, stop=0.9), max_epochs=6, module=Idle()
    )
    assert sparsity(module, *WEIGHTS, "spare.weight") == pytest.approx(0.8, abs=2e-3)


def test_movement_is_the_sum_that_it_is_said_to_be(tmp_path: Path) -> None:
    class Sum(pl.Callback):
        total: Tensor | float = 0.0

        def on_before_optimizer_step(self, _: Any, pl_module: pl.LightningModule, *a: Any) -> None:
            weight = pl_module.get_parameter("head.weight")
            assert weight.grad is not None
            self.total = self.total - weight.detach() * weight.grad

    pruning, check = GradualPruning(0.5, criterion="movement"), Sum()
    fit(tmp_path, check, pruning, module=Net(torch.optim.SGD), max_epochs=2)
    movement = pruning.choices()["statistics"]["head.weight"]["movement"]
    torch.testing.assert_close(movement, check.total)


def test_parameters_in_no_optimizer_are_named_and_not_counted(tmp_path: Path) -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.head.parameters(), lr=0.01)

    with pytest.warns(UserWarning, match=r"no optimizer holds body\.0\.weight"):
        module = fit(tmp_path, GradualPruning(0.8), module=Frozen())
    assert sparsity(module, "head.weight") == pytest.approx(0.8, abs=2e-3)
    assert sparsity(module, "body.0.weight") == 0


def test_layers_made_in_setup_and_configure_model_are_compressed(tmp_path: Path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.head

        def setup(self, stage: str) -> None:
            self.head = nn.Linear(40, 20)

        def configure_model(self) -> None:
            if not hasattr(self, "tail"):
                self.tail = nn.Linear(20, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.tail(self.head(self.body(images)))

    module = fit(tmp_path, GradualPruning(0.8), module=Late())
    assert sparsity(module, *WEIGHTS, "tail.weight") == pytest.approx(0.8, abs=2e-3)


def checkpointed(root: Path, *callbacks: pl.Callback, **kwargs: Any) -> Path:
    saver = ModelCheckpoint(root, "half")
    fit(root, *callbacks, saver, enable_checkpointing=True, **kwargs)
    return root / "half.ckpt"


def test_a_longer_training_does_not_bring_pruned_weights_back(tmp_path: Path) -> None:
    path = checkpointed(tmp_path, GradualPruning(0.8), max_epochs=4)
    recorder, module = Recorder(), Net()
    callbacks = [GradualPruning(0.8), recorder]
    trainer(tmp_path, *callbacks, max_epochs=8).fit(module, loader(), ckpt_path=path)
    assert len(recorder.seen) == 40
    assert len(set(recorder.sparsities())) == 1
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.8, abs=2e-3)


def test_settings_that_a_checkpoint_does_not_have_are_taken_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def resume(path: Path, stage: pl.Callback) -> Net:
        caplog.clear()
        module = Net()
        trainer(tmp_path, stage).fit(module, loader(), ckpt_path=path)
        return module

    def refused(path: Path, stage: pl.Callback, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            resume(path, stage)

    def saved(step: int, stage: pl.Callback) -> Path:
        saver = ModelCheckpointAt(tmp_path / type(stage).__name__, step)
        fit(tmp_path, stage, saver, enable_checkpointing=True)
        return Path(saver.dirpath or "") / f"step={step}.ckpt"

    # Pruning ends at step 28, quantization begins at 12, and ranks are final at 20, of 40 steps.
    path = saved(20, GradualPruning(0.8))
    module = resume(path, GradualPruning(0.95, every=2))
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.95, abs=2e-3)
    assert "resumed with other settings: sparsity=0.8 -> 0.95, every=None -> 2" in caplog.text
    refused(path, GradualPruning(0.8, "hessian"), "criterion=.*'hessian', and .* has begun: res")
    path = saved(30, GradualPruning(0.8))
    refused(path, GradualPruning(0.95), "sparsity=0.8 -> 0.95, and .* made its last choice: res")
    path = saved(30, WeightSharing(8))
    refused(path, WeightSharing(4), "clusters=8 -> 4, and the stage has begun")
    path = saved(5, QuantizationAwareTraining(8))
    refused(path, QuantizationAwareTraining(8, None), "activation_bits=8 -> None, .* the module")
    resume(path, QuantizationAwareTraining(4))
    assert "weight_bits=8 -> 4" in caplog.text
    path = saved(20, QuantizationAwareTraining(8))
    refused(path, QuantizationAwareTraining(4), "weight_bits=8 -> 4, and the stage has begun")
    path = saved(25, RankLearning(keep_size=0.9))
    refused(path, RankLearning(keep_size=0.5), "keep_size=0.9 -> 0.5, and .* its last choice")
    with pytest.warns(UserWarning, match=r"RankLearning\(.*\) of the checkpoint is not in"):
        resume(path, GradualPruning(0.5))


def test_checkpoints_hold_all_settings_of_every_stage() -> None:
    for stage in (
        GradualPruning(),
        WeightSharing(),
        QuantizationAwareTraining(),
        RankLearning(price=0.1),
        LearningCompression(TopK(0.5)),
    ):
        names = inspect.signature(type(stage).__init__).parameters.keys() - {"self"}
        assert settings_of(stage).keys() == names


def test_a_dense_run_is_resumed_into_compression(tmp_path: Path) -> None:
    path = checkpointed(tmp_path, max_epochs=4)
    pruning, module = GradualPruning(0.8, start=0.5, stop=0.8), Net()
    trainer(tmp_path, pruning, max_epochs=8).fit(module, loader(), ckpt_path=path)
    assert pruning.window == (40, 64)
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.8, abs=2e-3)


def test_latents_stay_when_training_ends(tmp_path: Path) -> None:
    sharing = WeightSharing(4, start=0.0, stop=0.5)

    class Latest(pl.Callback):
        weight = latent = torch.empty(0)

        def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            plan = plan_of(trainer)
            assert plan is not None
            self.weight = pl_module.get_parameter("head.weight").detach().clone()
            self.latent = plan.latents()["head.weight"].clone()

    latest = Latest()
    module = fit(tmp_path, sharing, latest)
    plan = plan_of(module.trainer)
    assert plan is not None
    assert torch.equal(plan.latents()["head.weight"], latest.latent)
    assert torch.equal(module.head.weight, latest.weight)
    assert latest.latent.unique().numel() > 300


def test_a_preview_leaves_no_trace() -> None:
    module, pruning = Net(), GradualPruning(criterion="activation", exclude="body.1")
    pruning.masks["head.weight"] = torch.ones(1)
    print(Plan([pruning], module))
    assert not module.head._forward_pre_hooks
    assert list(pruning.masks) == ["head.weight"]


def test_an_exception_removes_all_hooks(tmp_path: Path) -> None:
    class Failing(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if args[-1] == 3:
                raise RuntimeError("power cut")

    module = Net()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, GradualPruning(criterion="activation"), Failing(), module=module)
    assert not module.head._forward_pre_hooks


def test_tied_weights_answer_to_all_names_and_count_once(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Linear(40, 10)
            self.twin.weight = self.head.weight

        def forward(self, images: Tensor) -> Tensor:
            features = self.body(images)
            return self.head(features) + self.twin(features)

    checkpoint, monitor = CompressedCheckpoint(tmp_path), CompressionMonitor()
    module = Tied()
    fit(tmp_path, GradualPruning(0.5, include="twin.weight"), monitor, checkpoint, module=module)
    assert sparsity(module, "head.weight") == pytest.approx(0.5, abs=2e-3)
    assert checkpoint.report is not None
    runner = trainer(tmp_path)
    assert monitor.metrics(runner, module)["compression/bytes"] == pytest.approx(
        checkpoint.report.total, rel=0.02
    )


@pytest.mark.parametrize("kind", ["state", "noise", "inputs"])
def test_what_cannot_be_replayed_does_not_fail_a_finished_training(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(Net):
        def forward(self, images: Tensor) -> Tensor:
            if kind == "inputs":
                images.mul_(0.5)
            if kind == "noise":
                images = images + torch.rand_like(images)
            logits = super().forward(images)
            if kind == "state":
                self.latest = (row for row in logits)  # no generator can be copied
            return logits

    fit(tmp_path, GradualPruning(0.5), CompressedCheckpoint(tmp_path), module=Odd())
    printed = capsys.readouterr().out
    assert "restores every tensor bit for bit" in printed
    told = "predictions were not compared (" if kind == "state" else "examples are identical"
    assert told in printed
