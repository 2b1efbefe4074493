"""The callbacks in real Trainers, on the digits that scikit-learn bundles."""

import copy
import pickle
from csv import DictReader
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from fitsmall.callbacks import (
    CompressedCheckpoint,
    CompressionMonitor,
    GradualPruning,
    Plan,
    WeightSharing,
    plan_of,
)
from fitsmall.compressors import CRITERIA, Iterative, OneShot, inspect, load, restore, same_bits
from training import (
    IMAGES,
    LABELS,
    WEIGHTS,
    Idle,
    Net,
    Recorder,
    fit,
    loader,
    sparsity,
    trainer,
    validation,
)


def test_a_run_ends_in_a_small_file_that_restores_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, GradualPruning(0.9), WeightSharing(8), checkpoint, max_epochs=8)
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.9, abs=1e-3)
    for name in WEIGHTS:
        weight = module.get_parameter(name)
        assert weight[weight != 0].unique().numel() <= 8
    assert checkpoint.path is not None
    assert checkpoint.report is not None
    plain = restore(Net(), checkpoint.path)
    for name, tensor in module.state_dict().items():
        assert same_bits(plain.state_dict()[name], tensor), name
    module.eval(), plain.eval()
    assert same_bits(plain(IMAGES), module(IMAGES))
    assert checkpoint.report.total == checkpoint.path.stat().st_size
    printed = capsys.readouterr().out
    assert checkpoint.report.table() in printed
    assert "predictions on 64 examples are identical" in printed


def test_the_module_stays_the_users_own(tmp_path: Path) -> None:
    module = fit(tmp_path, GradualPruning(0.5), WeightSharing(4, start=0.2))
    assert type(module.head) is nn.Linear
    assert list(module.state_dict()) == list(Net().state_dict())
    assert not module.head._forward_pre_hooks
    assert torch.equal(pickle.loads(pickle.dumps(module)).head.weight, module.head.weight)
    assert torch.equal(copy.deepcopy(module).head.weight, module.head.weight)


def test_biases_and_norms_are_left_alone(tmp_path: Path) -> None:
    module = fit(tmp_path, GradualPruning(1.0, schedule=OneShot()), max_epochs=1)
    assert sparsity(module, *WEIGHTS) == 1.0
    for name in ("body.1.weight", "body.0.bias", "head.bias"):
        assert module.get_parameter(name).count_nonzero() > 0


def test_sparsity_follows_the_schedule_exactly(tmp_path: Path) -> None:
    recorder = Recorder()
    pruning = GradualPruning(0.8, start_step=10, stop_step=30, every=5, allocation="uniform")
    fit(tmp_path, pruning, recorder)
    numel = 64 * 40
    expected = [0.0] * 40
    for step in range(11, 41):
        chosen = min(30, 11 + 5 * ((step - 11) // 5)) if step < 30 else 30
        progress = (chosen - 10) / 20
        kept = round((1 - 0.8 * (1 - (1 - progress) ** 3)) * numel)
        expected[step - 1] = 1 - kept / numel
    assert recorder.sparsities() == pytest.approx(expected)


def test_iterative_pruning_stands_still_between_rounds(tmp_path: Path) -> None:
    recorder = Recorder()
    pruning = GradualPruning(0.9, schedule=Iterative(3), stop=0.75, allocation="uniform", every=1)
    fit(tmp_path, pruning, recorder)
    levels = sorted(set(recorder.sparsities()))
    assert levels == pytest.approx([0.3, 0.6, 0.9], abs=1e-3)


def test_overrides_follow_the_schedule_too(tmp_path: Path) -> None:
    recorder = Recorder("head.weight")
    pruning = GradualPruning(
        0.5, schedule=Iterative(3), stop=0.75, overrides={"head": 0.9}, every=1
    )
    fit(tmp_path, pruning, recorder)
    levels = sorted(set(recorder.sparsities()))
    assert levels == pytest.approx([0.3, 0.6, 0.9], abs=1e-3)


def test_hard_pruning_never_lets_a_weight_return(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, GradualPruning(0.9), recorder)
    for before, after in zip(recorder.seen, recorder.seen[1:], strict=False):
        assert not ((before == 0) & (after != 0)).any()


def test_straight_through_pruning_lets_weights_return(tmp_path: Path) -> None:
    recorder = Recorder()
    pruning = GradualPruning(0.9, coupling="straight_through", schedule=OneShot(), every=1)
    module = fit(tmp_path, pruning, recorder)
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.9, abs=1e-3)
    assert any(
        ((before == 0) & (after != 0)).any()
        for before, after in zip(recorder.seen, recorder.seen[1:], strict=False)
    )


def test_straight_through_equals_the_written_out_loop(tmp_path: Path) -> None:
    """Gradients at the mask, updates of the latent: the same bits as a loop by hand."""

    class Written(nn.Module):
        def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
            super().__init__()
            self.linear, self.mask = linear, mask

        def forward(self, x: Tensor) -> Tensor:
            weight = self.linear.weight
            masked = weight + (weight * self.mask - weight).detach()
            return nn.functional.linear(x, masked, self.linear.bias)

    pruning = GradualPruning(
        0.5, coupling="straight_through", schedule=OneShot(), stop_step=1, include="head.weight"
    )
    module = fit(tmp_path, pruning)
    pl.seed_everything(0)
    manual = Net()
    optimizer = manual.configure_optimizers()
    head: nn.Module = manual.head
    for step in range(40):
        images, labels = IMAGES[:640].split(64)[step % 10], LABELS[:640].split(64)[step % 10]
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(manual.body(images)), labels).backward()
        optimizer.step()
        if step == 0:
            mask = pruning.masks["head.weight"] != 0
            head = Written(manual.head, mask)
    assert same_bits(module.head.weight, manual.head.weight * mask + 0.0)


def test_centroids_are_the_means_of_their_latents(tmp_path: Path) -> None:
    sharing = WeightSharing(4, start=0.0, stop=0.5)

    class Check(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            plan = plan_of(trainer)
            assert plan is not None
            latent = plan.latents()["head.weight"].flatten()
            index = sharing.clusterings["head.weight"]["index"].flatten()
            for cluster in range(4):
                mine = pl_module.get_parameter("head.weight").detach().flatten()[index == cluster]
                assert mine.unique().numel() <= 1
                if mine.numel():
                    assert float(mine[0]) == pytest.approx(
                        float(latent.detach()[index == cluster].mean())
                    )

    fit(tmp_path, sharing, Check())


@pytest.mark.parametrize("init", ["linear", "optimal"])
def test_sharing_reaches_its_strength_gradually(init: Any, tmp_path: Path) -> None:
    recorder = Recorder("head.weight")
    fit(tmp_path, WeightSharing(6, init=init, start=0.25, stop=0.75), recorder)
    levels = [weight.unique().numel() for weight in recorder.seen]
    assert min(levels[:29]) > 300  # relaxed: still close to the latents
    assert max(levels[29:]) <= 6


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=lambda o: o.__name__)
def test_every_criterion_prunes_in_training(criterion: str, optimizer: Any, tmp_path: Path) -> None:
    pruning = GradualPruning(0.8, criterion=criterion)
    module = fit(tmp_path, pruning, module=Net(optimizer))
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.8, abs=1e-3)
    collected = {key for mine in pruning.choices()["statistics"].values() for key in mine}
    needed = set(CRITERIA[criterion].statistics) - {"uniform"}  # it is drawn, not collected
    if optimizer is torch.optim.Adam:
        needed -= {"squared_gradient"}  # Adam's own is used
    assert collected == needed
    assert not module.head._forward_pre_hooks


def test_input_norms_are_what_the_layer_saw(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, criterion="activation", include="body.0.weight")
    fit(tmp_path, pruning, max_steps=1)
    norm = pruning.choices()["statistics"]["body.0.weight"]["input_norm"][0]
    assert torch.allclose(norm.squeeze(), IMAGES[:64].square().sum(0).sqrt())


def test_overrides_take_their_own_sparsity_and_clusters(tmp_path: Path) -> None:
    pruning = GradualPruning(0.5, overrides={"head": 0.9}, allocation="uniform")
    sharing = WeightSharing(4, overrides={"body*": 9})
    module = fit(tmp_path, pruning, sharing)
    assert sparsity(module, "head.weight") == pytest.approx(0.9)
    assert sparsity(module, "body.0.weight") == pytest.approx(0.5)
    assert module.head.weight.unique().numel() <= 4 + 1
    assert 5 < module.body[0].weight.unique().numel() <= 9 + 1


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    pruning = GradualPruning(0.8, start_step=0, stop_step=10)
    recorder = Recorder()
    fit(tmp_path, pruning, recorder, accumulate_grad_batches=2)
    assert pruning.clock.steps == 20
    assert recorder.sparsities()[17] < recorder.sparsities()[19] == recorder.sparsities()[-1]


def test_a_second_fit_goes_on_and_a_new_trainer_starts_anew(tmp_path: Path) -> None:
    pruning = GradualPruning(0.9, stop_step=20)
    pl.seed_everything(0)
    module, first = Net(), trainer(tmp_path, pruning, max_epochs=1)
    first.fit(module, loader())
    part = sparsity(module, *WEIGHTS)
    assert 0 < part < 0.9
    first.fit_loop.max_epochs = 3
    first.fit(module, loader())
    assert pruning.clock.steps == 30
    assert sparsity(module, *WEIGHTS) == pytest.approx(0.9, abs=1e-3)
    fresh = Net()
    trainer(tmp_path, pruning, max_epochs=1).fit(fresh, loader())
    assert sparsity(fresh, *WEIGHTS) == pytest.approx(part, abs=1e-3)


def test_an_exception_leaves_projected_weights(tmp_path: Path) -> None:
    class Failing(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
            pass

        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 30:
                raise RuntimeError("power cut")

    module = Net()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, WeightSharing(4, start=0.0, stop=0.5), Failing(), module=module)
    assert module.head.weight.unique().numel() <= 4


def test_monitor_logs_curves_that_end_at_the_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    checkpoint = CompressedCheckpoint(tmp_path)
    pl.seed_everything(0)
    callbacks = [GradualPruning(0.9), WeightSharing(8), CompressionMonitor(), checkpoint]
    runner = trainer(tmp_path, *callbacks, logger=logger, max_epochs=5)
    runner.fit(Net(), loader(), validation())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        table = [
            {key: float(cell) for key, cell in row.items() if cell} for row in DictReader(file)
        ]
    rows = [row for row in table if "compression/bytes" in row]
    sizes = [row["compression/bytes"] for row in rows]
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert checkpoint.report is not None
    assert sizes[-1] == pytest.approx(checkpoint.report.total, rel=0.01)
    last = rows[-1]
    assert last["compression/sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert last["compression/clusters/head.weight"] <= 8
    assert 0 < last["compression/distance"] < 1
    assert last["compression/ratio"] == pytest.approx(
        checkpoint.report.bytes_dense / sizes[-1], rel=0.01
    )


def test_the_best_weights_can_be_the_ones_in_the_file(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/error", save_top_k=1)
    checkpoint = CompressedCheckpoint(tmp_path, weights="best")
    pl.seed_everything(0)
    runner = trainer(
        tmp_path, GradualPruning(0.9, stop=0.2), best, checkpoint, enable_checkpointing=True
    )
    runner.fit(Net(), loader(), validation())
    expected = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert checkpoint.path is not None
    for name, tensor in load(checkpoint.path).items():
        assert same_bits(tensor, expected[name])


def test_best_weights_from_before_full_strength_are_pointed_out(tmp_path: Path) -> None:
    early = ModelCheckpoint(tmp_path, monitor="step", mode="min", every_n_train_steps=5)
    checkpoint = CompressedCheckpoint(tmp_path, weights="best")
    with pytest.warns(UserWarning, match="before GradualPruning reached its full strength"):
        fit(tmp_path, GradualPruning(0.9), early, checkpoint, enable_checkpointing=True)


def test_training_that_ends_early_is_pointed_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="GradualPruning: training ended at step 3, before"):
        fit(tmp_path, GradualPruning(0.9, stop_step=30), max_steps=3)


def test_the_plan_prints_itself_without_training() -> None:
    pruning = GradualPruning(0.9, exclude="head")
    text = str(Plan([pruning, WeightSharing(8, start_step=700)], Net(), horizon=1000))
    assert "GradualPruning: sparsity 0.9 (global gradient), hard, steps 0 to 700" in text
    assert "WeightSharing: 8 clusters (linear start), straight-through, steps 700 to 850" in text
    assert "  body.0.weight  2,560 " in text
    assert "left out (a bias or a norm)" in text
    assert "from 0 of training to 0.7 of training" in str(Plan([GradualPruning()], Net()))


def test_a_parameter_without_gradient_is_no_obstacle(tmp_path: Path) -> None:
    """Adam must not find a latent where it expects an empty state."""

    module = fit(tmp_path, WeightSharing(4, start=0.0, stop=0.5), module=Idle())
    assert module.spare.weight.unique().numel() <= 4


def test_channels_last_weights_are_shared_too(tmp_path: Path) -> None:
    class Convolutional(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3), nn.Flatten()
            )
            self.head = nn.Linear(64, 10)
            self.to(memory_format=torch.channels_last)

    module = fit(tmp_path, GradualPruning(0.5), WeightSharing(4, start=0.2), module=Convolutional())
    assert not module.body[2].weight.is_contiguous()
    assert module.body[2].weight.unique().numel() <= 4 + 1
    assert sparsity(module, "body.1.weight", "body.2.weight", "head.weight") == pytest.approx(
        0.5, abs=1e-3
    )


def test_a_network_without_compression_has_a_file_too(tmp_path: Path) -> None:
    file = CompressedCheckpoint(tmp_path)
    module = fit(tmp_path, file, max_steps=1)
    assert file.path is not None
    restored = restore(Net(), file.path)
    assert torch.equal(restored.head.weight, module.head.weight)


def test_report_of_the_file_equals_a_later_inspection(tmp_path: Path) -> None:
    checkpoint = CompressedCheckpoint(tmp_path, "net.fitsmall", coder="huffman")
    fit(tmp_path, GradualPruning(0.9), checkpoint)
    assert inspect(tmp_path / "net.fitsmall") == checkpoint.report
    assert checkpoint.report is not None
    assert checkpoint.report.coder == "huffman"
