"""What Lightning has around a training: command lines, limits, loops, tuners, other callbacks."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import pytest
import torch
import yaml
from cases import Case, each_coupling, every_case
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import fitsmall.callbacks
from fitsmall.callbacks import (
    EMA,
    AccuracyGuard,
    CompressedCheckpoint,
    EarlyStoppingOnceCompressed,
    GradualPruning,
    ModelCheckpointOnceCompressed,
    ParetoCheckpoint,
    RandomState,
    WeightSharing,
    plan_of,
)
from fitsmall.compressors import restore
from fitsmall.experiments.benchmarks.soak import differences
from training import (
    WEIGHTS,
    ModelCheckpointAt,
    Net,
    Recorder,
    loader,
    sparsity,
    trainer,
    validation,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "GradualPruning": {
        "sparsity": 0.8,
        "criterion": "adam",
        "overrides": {"head": 0.5},
        "exclude": ["*.bias"],
        "schedule": {"class_path": "fitsmall.compressors.Iterative", "init_args": {"rounds": 3}},
    },
    "QuantizationAwareTraining": {"include": "head.weight", "overrides": {"head": [4, 8]}},
    "LearningCompression": {
        "projection": {
            "class_path": "fitsmall.compressors.TopK",
            "init_args": {"sparsity": 0.5},
        },
        "include": "body.1.weight",
    },
    "ChannelPruning": {"keep_size": 0.7, "stop": 0.2},
    "RankLearning": {"keep_size": 0.9, "include": "body.0", "stop": 0.4},
    "SizeTarget": {"size": "2 KB", "exclude": ["*.bias"]},
    "Compress": {"size": "2 KB", "flops": 0.6, "stop": 0.8},
    "WeightSharing": {"clusters": 6, "init": "optimal", "start": 0.5, "exclude": "head"},
    "EMA": {"decay": 0.9},
    "AccuracyGuard": {"monitor": "val/error", "tolerance": 0.5},
    "CompressedCheckpoint": {"dirpath": "files", "coder": "ans"},
    "CompressionMonitor": {"every_n_epochs": 2},
    "ModelCheckpointOnceCompressed": {"dirpath": "best", "monitor": "val/error"},
    "EarlyStoppingOnceCompressed": {"monitor": "val/error", "patience": 9},
    "ParetoCheckpoint": {"dirpath": "pareto"},
    "RandomState": {},
}


def test_no_callback_is_left_out_of_the_settings() -> None:
    callbacks = {
        name
        for name in fitsmall.callbacks.__all__
        if isinstance(kind := getattr(fitsmall.callbacks, name), type)
        and issubclass(kind, pl.Callback)
    }
    assert callbacks == SETTINGS.keys()


class Plain(Net):
    """A module that a command line can build."""

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return validation()


def test_lightning_cli_builds_every_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [
        {"class_path": f"fitsmall.callbacks.{name}", "init_args": settings}
        for name, settings in SETTINGS.items()
        # These change layers, and come before the others; and a target has them all by itself.
        if name not in ("ChannelPruning", "RankLearning", "SizeTarget", "Compress")
    ]
    config: dict[str, Any] = {
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": callbacks,
        }
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(Plain, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    assert sparsity(cli.model, "head.weight") == pytest.approx(0.5, abs=2e-3)
    assert cli.model.body[0].weight.unique().numel() <= 7
    assert all(row.unique().numel() <= 16 for row in cli.model.head.weight)
    assert cli.model.head.input_quantizer.active
    assert Path("files/model.fitsmall").exists()
    assert Path("pareto/pareto.json").exists()
    config["trainer"]["callbacks"] = [
        {"class_path": f"fitsmall.callbacks.{name}", "init_args": {"keep_size": 0.8, **window}}
        for name, window in (("ChannelPruning", {"stop": 0.3}), ("RankLearning", {"start": 0.3}))
    ]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(Plain, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    assert sum(p.numel() for p in cli.model.parameters()) <= 0.8**2 * 3090
    config["trainer"]["callbacks"] = [
        {"class_path": f"fitsmall.callbacks.{name}", "init_args": settings}
        for name, settings in SETTINGS.items()
        if name in ("Compress", "CompressedCheckpoint")
    ]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    LightningCLI(Plain, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    assert Path("files/model.fitsmall").stat().st_size <= 2000


@pytest.mark.parametrize("name", SETTINGS)
def test_hydra_builds_every_callback(name: str) -> None:
    settings = dict(SETTINGS[name])
    for key in ("schedule", "projection"):  # LightningCLI's way to name a class, and Hydra's
        if key in settings:
            named = settings[key]
            settings[key] = {"_target_": named["class_path"], **named["init_args"]}
    made = hydra.utils.instantiate({"_target_": f"fitsmall.callbacks.{name}", **settings})
    assert type(made).__name__ == name


@every_case
def test_fast_dev_run(case: Case, tmp_path: Path) -> None:
    """One batch of everything, and no complaint."""
    runner = trainer(tmp_path, *case.make(), CompressedCheckpoint(tmp_path), fast_dev_run=True)
    runner.fit(Net(), loader(), validation())


LIMITS: dict[str, dict[str, Any]] = {
    "overfit_batches": {"overfit_batches": 2, "max_epochs": 20},
    "limit_train_batches": {"limit_train_batches": 3, "max_epochs": 14, "limit_val_batches": 0},
    "max_steps": {"max_steps": 33, "max_epochs": -1, "num_sanity_val_steps": 0},
    "max_steps and max_epochs": {"max_steps": 33, "max_epochs": 9, "inference_mode": False},
    "max_time": {"max_time": "00:01:00:00", "detect_anomaly": True},
    "val_check_interval": {"val_check_interval": 3},
}


@each_coupling
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_limits(case: Case, limits: dict[str, Any], tmp_path: Path) -> None:
    pl.seed_everything(0)
    module, recorder = Net(), Recorder()
    runner = trainer(tmp_path, *case.make(), recorder, **limits)
    runner.fit(module, loader(), validation())
    case.check(module)
    # Sanity-check validation, and every other, left the weights as they were.
    assert torch.equal(recorder.seen[-1], module.body[0].weight)


class Stream(IterableDataset[Any]):
    """Batches without number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader())


@pytest.mark.parametrize(
    "endless", [{"max_epochs": -1}, {"max_epochs": 4}, {"max_time": "00:00:00:05"}]
)
@pytest.mark.parametrize("method", [GradualPruning, WeightSharing])
def test_fractions_need_a_known_end_and_steps_do_not(
    method: Any, endless: dict[str, Any], tmp_path: Path
) -> None:
    def stream(*callbacks: pl.Callback, **kwargs: Any) -> Net:
        module = Net()
        runner = trainer(tmp_path, *callbacks, **({"max_epochs": -1} | kwargs))
        runner.fit(module, DataLoader(Stream(), batch_size=None))
        return module

    with pytest.raises(ValueError, match="is a fraction of a training that has no"):
        stream(method(), **endless)
    steps = {"start_step": 5, "stop_step": 20}
    module = stream(method(0.8 if method is GradualPruning else 6, **steps), max_steps=30)
    if method is GradualPruning:
        assert sparsity(module, *WEIGHTS) == pytest.approx(0.8, abs=2e-3)
    else:
        assert module.head.weight.unique().numel() <= 6


class Evaluated(Plain):
    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("test/error", (self(batch[0]).argmax(1) != batch[1]).float().mean())

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])


@every_case
def test_evaluation_changes_nothing(case: Case, tmp_path: Path) -> None:
    """Before, after, and by a Trainer that never trained."""
    methods = case.make()
    module = Evaluated()
    fresh = trainer(tmp_path, *methods)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for evaluate in (fresh.validate, fresh.test, fresh.predict):
        evaluate(module, validation())
    assert not list(differences(before, dict(module.state_dict())))
    fresh.fit(module)
    after = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for evaluate in (fresh.validate, fresh.test, fresh.predict):
        evaluate(module, validation())
    assert not list(differences(after, dict(module.state_dict())))
    case.check(module)


@every_case
def test_evaluating_a_checkpoint_changes_nothing(case: Case, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        pareto = ParetoCheckpoint(tmp_path / "files")
        return [*case.make(), EMA(decay=0.9), AccuracyGuard(), pareto, RandomState()]

    saver = ModelCheckpointAt(tmp_path, 7)
    runner = trainer(tmp_path, *callbacks(), saver, enable_checkpointing=True)
    pl.seed_everything(0)
    module = Evaluated()
    runner.fit(module, loader(), validation())
    end = copy.deepcopy(dict(module.state_dict()))
    before = copy.deepcopy([c.state_dict() for c in runner.callbacks[:-2]])
    early = tmp_path / "step=7.ckpt"
    for evaluate in (runner.validate, runner.test, runner.predict):
        evaluate(module, validation(), ckpt_path=early)
    assert not list(differences(before, [c.state_dict() for c in runner.callbacks[:-2]]))
    # Nor does a training that follows begin where the checkpoint was.
    fresh = trainer(tmp_path, *callbacks())
    fresh.validate(Plain(), validation(), ckpt_path=early)
    pl.seed_everything(0)
    module = Plain()
    fresh.fit(module, loader(), validation())
    assert not list(differences(end, dict(module.state_dict())))


@each_coupling
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_learning_rate_finders(case: Case, how: str, tmp_path: Path) -> None:
    class Tunable(Plain):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    pl.seed_everything(0)
    module = Tunable()
    more = [LearningRateFinder(num_training_steps=30)] if how == "callback" else []
    runner = trainer(tmp_path, *case.make(), *more, enable_checkpointing=True)
    if how == "tuner":
        Tuner(runner).lr_find(module, num_training=30)
    module.lr = 0.01
    runner.fit(module)
    case.check(module)


class Rising(Net):
    """A network whose error is best at first, as that of a dense one is."""

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        super().validation_step(batch, _)
        self.log("rising", float(self.current_epoch))


@every_case
def test_lightning_s_own_checkpoints_and_stopping(case: Case, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val/error", save_last=True, save_top_k=-1)
    stopping = EarlyStopping("rising", patience=5)
    pl.seed_everything(0)
    module = Rising()
    methods = case.make()
    for method in methods:
        method.start_step, method.stop_step = 10, 40
    runner = trainer(tmp_path, *methods, saver, stopping, max_epochs=9, enable_checkpointing=True)
    runner.fit(module, loader(), validation())
    assert runner.current_epoch == 6
    case.check(module)
    plain = Net()
    plain.load_state_dict(torch.load(saver.last_model_path, weights_only=True)["state_dict"])
    case.check(plain)


# The best weights count once they are compressed.


@each_coupling
def test_the_best_is_compressed(case: Case, tmp_path: Path) -> None:
    saver = ModelCheckpointOnceCompressed(tmp_path, monitor="rising", save_top_k=1)
    stopping = EarlyStoppingOnceCompressed("rising", patience=1)
    pl.seed_everything(0)
    runner = trainer(
        tmp_path, *case.make(), saver, stopping, max_epochs=10, enable_checkpointing=True
    )
    runner.fit(Rising(), loader(), validation())
    best = torch.load(saver.best_model_path, weights_only=True)
    assert best["epoch"] >= 4
    plain = Net()
    plain.load_state_dict(best["state_dict"])
    case.check(plain)
    # One epoch of patience after the first one that counts.
    assert runner.current_epoch == best["epoch"] + 2


@each_coupling
def test_the_pareto_set_is_kept(case: Case, tmp_path: Path) -> None:
    pareto = ParetoCheckpoint(tmp_path / "files")
    pl.seed_everything(0)
    runner = trainer(tmp_path, *case.make(), pareto, max_epochs=8)
    runner.fit(Net(), loader(), validation())
    points = pareto.points
    assert points == yaml.safe_load((tmp_path / "files" / "pareto.json").read_text())
    assert {p["path"] for p in points} == {p.name for p in (tmp_path / "files").glob("*.fitsmall")}
    # Smaller files have larger errors, and each file has the error that it is said to have.
    assert [p["metric"] for p in points] == sorted((p["metric"] for p in points), reverse=True)
    for point in points:
        path = tmp_path / "files" / point["path"]
        assert path.stat().st_size == point["bytes"]
        (found,) = trainer(tmp_path).validate(restore(Net(), path), validation(), verbose=False)
        assert found["val/error"] == pytest.approx(point["metric"])
    # Another training begins with an empty set, and what has no error is not in it.
    diverged = Net()
    diverged.validation_step = lambda *_: diverged.log("val/error", float("nan"))  # type: ignore[method-assign]
    trainer(tmp_path, *case.make(), pareto, max_epochs=1).fit(diverged, loader(), validation())
    assert pareto.points == []


def test_the_pareto_set_has_no_beaten_files(tmp_path: Path) -> None:
    class Scripted(Net):
        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("val/error", [0.125, 0.5, 0.25, 0.25][self.current_epoch])

    class Tell(pl.Callback):
        saved: Any = None

        def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.current_epoch == 2:
                self.saved = copy.deepcopy(pareto.state_dict())

    tell, pareto = Tell(), ParetoCheckpoint(tmp_path)
    runner = trainer(tmp_path, GradualPruning(0.8, stop_step=30), pareto, tell)
    runner.fit(Scripted(), loader(), validation())
    # Files shrink: the second is beaten by the third, and the fourth equals it in error.
    assert min(point["step"] for point in pareto.points) == 10
    assert [point["metric"] for point in pareto.points] == [0.25, 0.125]
    # A training that went on and was killed has removed one of these.
    (tmp_path / tell.saved["points"][0]["path"]).unlink(missing_ok=True)
    pareto.load_state_dict(tell.saved)
    assert [point["step"] for point in pareto.points] == [10]


def test_the_guard_holds_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Scripted(Net):
        """An error that is bad for two epochs."""

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("val/error", 0.5 if self.current_epoch in (2, 3) else 0.1)

    pruning, recorder = GradualPruning(0.8, stop_step=60, every=1), Recorder()
    guard = AccuracyGuard(tolerance=0.1)
    pl.seed_everything(0)
    runner = trainer(tmp_path, pruning, recorder, guard, max_epochs=10)
    with caplog.at_level("INFO"):
        runner.fit(Scripted(), loader(), validation())
    sparsities = recorder.sparsities()
    assert sparsities[28] < sparsities[29] == sparsities[30] == sparsities[49] < sparsities[50]
    assert sparsities[70] < sparsities[79] == sparsities[-1]
    plan = plan_of(runner)
    assert plan is not None
    assert (plan.clock.steps, plan.clock.paused_steps) == (100, 20)
    assert "val/error is 0.5, its best 0.1: compression is paused at step 30" in caplog.text
    assert "compression is resumed at step 50" in caplog.text
    assert runner.callback_metrics["compression/paused"] == 0


@every_case
def test_guarded_runs_resume(case: Case, tmp_path: Path) -> None:
    class Scripted(Net):
        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("val/error", 0.5 if self.current_epoch == 1 else 0.1)

    def run(folder: str, path: Path | None, *more: pl.Callback) -> dict[str, Any]:
        pl.seed_everything(0)
        module = Scripted()
        guard = AccuracyGuard(tolerance=0.1)
        callbacks = [*case.make(), guard, RandomState(), *more]
        runner = trainer(tmp_path, *callbacks, max_epochs=6, enable_checkpointing=bool(more))
        runner.fit(module, loader(), validation(), ckpt_path=path)
        return dict(module.state_dict())

    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = run("whole", None, saver)
    for epoch in (1, 2):
        assert not list(differences(whole, run("again", tmp_path / f"epoch={epoch}.ckpt"))), epoch
