"""What every method guarantees in every Trainer; `docs/guarantees.md` lists it."""

import copy
import csv
import io
import pickle
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import BY_CRITERION, CASES, Case, each_coupling, every_case, every_criterion
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from fitsmall.callbacks import (
    EMA,
    AccuracyGuard,
    CompressedCheckpoint,
    CompressionMonitor,
    ParetoCheckpoint,
    RandomState,
    plan_of,
    stages_of,
)
from fitsmall.compressors import restore
from fitsmall.compressors.training import Stage
from fitsmall.experiments.benchmarks.resume import draw_schedule, resume_points
from fitsmall.experiments.benchmarks.soak import differences, outcome
from training import (
    IMAGES,
    LABELS,
    WEIGHTS,
    Adversaries,
    ModelCheckpointAt,
    Net,
    Recorder,
    fit,
    loader,
    resumable,
    trainer,
    validation,
)

# The eight failures of Lightning's ModelPruning.


class Copier(pl.Callback):
    """Copies of the module in the middle of training, and what it answers there."""

    copies: tuple[Net, ...] = ()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == 25:
            buffer = io.BytesIO()
            pickle.dump(module, buffer)
            buffer.seek(0)
            self.copies = (copy.deepcopy(module).eval(), pickle.load(buffer).eval())
            module.eval()
            self.expected = module(IMAGES)
            module.train()


@dataclass
class Trained:
    case: Case
    methods: list[Stage]
    module: Net
    copier: Copier
    file: CompressedCheckpoint
    checkpoint: Path


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One training of each case, for all tests that look at what comes of it."""
    root, case = tmp_path_factory.mktemp("trained"), request.param
    methods, copier, file = case.make(), Copier(), CompressedCheckpoint(root)
    saver = ModelCheckpoint(root, "last")
    module = fit(root, *methods, copier, file, saver, enable_checkpointing=True)
    return Trained(case, methods, module, copier, file, root / "last.ckpt")


one_worker = pytest.mark.xdist_group("trained")


@one_worker
def test_norms_and_names_are_left_alone(trained: Trained) -> None:
    module = trained.module
    trained.case.check(module)
    assert list(module.state_dict()) == list(Net().state_dict())
    assert module.body[1].weight.unique().numel() > 30
    assert not any(hasattr(layer, "parametrizations") for layer in module.modules())


@one_worker
def test_copies_in_the_middle_of_training(trained: Trained) -> None:
    for made in trained.copier.copies:
        assert torch.equal(made(IMAGES), trained.copier.expected)
    assert len(trained.copier.copies) == 2
    for method, copied in zip(trained.methods, copy.deepcopy(trained.methods), strict=True):
        assert not list(differences(method.choices(), copied.choices()))


@one_worker
def test_the_file_is_smaller_and_restores_the_plain_class(trained: Trained, tmp_path: Path) -> None:
    module, path = trained.module, trained.file.path
    assert path is not None
    torch.save(module.state_dict(), tmp_path / "dense.pt")
    ratio = (tmp_path / "dense.pt").stat().st_size / path.stat().st_size
    assert ratio > 3
    plain = restore(Net(), path)
    assert not list(differences(dict(module.state_dict()), dict(plain.state_dict())))


@one_worker
def test_checkpoints_load_into_the_plain_class(trained: Trained) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    plain = Net()
    plain.load_state_dict(checkpoint["state_dict"])
    trained.case.check(plain)
    again = Net.load_from_checkpoint(trained.checkpoint, weights_only=True)
    assert not list(differences(dict(again.state_dict()), dict(trained.module.state_dict())))


@every_case
def test_training_is_not_undone(case: Case, tmp_path: Path) -> None:
    pl.seed_everything(0)
    initial = Net()
    module = fit(tmp_path, *case.make(), max_epochs=8).eval()
    assert (module(IMAGES[:640]).argmax(1) == LABELS[:640]).float().mean() > 0.9
    kept = module.head.weight != 0
    assert not (module.head.weight == initial.head.weight)[kept].any()


@every_case
def test_a_second_fit_goes_on(case: Case, tmp_path: Path) -> None:
    """It begins as compressed as the first one ended, and stays so in every step."""

    class Check(pl.Callback):
        checked = 0

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step > 40:
                case.check(module)
                self.checked += 1

    pl.seed_everything(0)
    check, module = Check(), Net()
    runner = trainer(tmp_path, *case.make(), check)
    runner.fit(module, loader())
    runner.fit_loop.max_epochs = 6
    runner.fit(module, loader())
    case.check(module)
    assert check.checked == 20


@each_coupling
def test_a_second_fit_of_another_module_starts_again(case: Case, tmp_path: Path) -> None:
    """With windows in the rest of training, and no choice, best or average of the first module."""
    guard, average = AccuracyGuard(tolerance=10.0), EMA(decay=0.5)
    runner = trainer(tmp_path, *case.make(), guard, average)
    runner.fit(Net(), loader(), validation())
    runner.fit_loop.max_epochs = 6
    module = Net()
    guard.best = -1.0
    runner.fit(module, loader(), validation())
    case.check(module)
    assert guard.best >= 0
    plan = plan_of(runner)
    assert plan is not None
    assert plan.clock.steps == 20
    assert plan.complete


# Resume.

ALL = CASES | BY_CRITERION


class Noisy(Net):
    """A network that draws random numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.1, self.training))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.log("train/loss", loss)
        return loss


def noisy_run(
    folder: Path, callbacks: list[pl.Callback], path: Path | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Train to the end, from a checkpoint or from the start, and tell all that comes of it."""
    pl.seed_everything(0)
    data = resumable()
    callbacks = [*callbacks, CompressionMonitor(), RandomState()]
    runner = trainer(folder, *callbacks, logger=CSVLogger(folder), log_every_n_steps=1, **kwargs)
    runner.fit(Noisy(), data, validation(), ckpt_path=path, weights_only=True)
    runner.save_checkpoint(folder / "final.ckpt")
    return outcome(folder)


def resumed_equals_whole(
    root: Path, case: Case, steps: list[int], *more: Any, **kwargs: Any
) -> None:
    """Resume from a checkpoint of each of these steps."""
    saver = ModelCheckpointAt(root, *steps)
    callbacks = [*case.make(), *(make() for make in more)]
    whole = noisy_run(root / "whole", [*callbacks, saver], enable_checkpointing=True, **kwargs)
    for step in steps:
        callbacks = [*case.make(), *(make() for make in more)]
        resumed = noisy_run(root / f"{step}", callbacks, root / f"step={step}.ckpt", **kwargs)
        # Only what came after the checkpoint was logged again.
        resumed["curves"] = joined(whole["curves"], resumed["curves"])
        assert list(differences(whole, resumed)) == [], step


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Curves of two runs, by step; of what both logged the second's."""
    return {step: first.get(step, {}) | second.get(step, {}) for step in first | second}


@every_case
def test_a_resumed_run_equals_the_uninterrupted_one(case: Case, tmp_path: Path) -> None:
    """Before, in and after the windows, at the ends and in the middle of epochs."""
    resumed_equals_whole(tmp_path, case, [10, 17, 25, 31, 39])


@every_criterion
def test_statistics_of_every_criterion_are_resumed(case: Case, tmp_path: Path) -> None:
    resumed_equals_whole(tmp_path, case, [17])


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_step_can_be_resumed_from(
    case: Case, averaged: bool, precision: str, tmp_path: Path
) -> None:
    more = [lambda: EMA(decay=0.9)] if averaged else []
    resumed_equals_whole(tmp_path, case, list(range(1, 40)), *more, precision=precision)


def test_resumes_of_resumes(tmp_path: Path) -> None:
    """From the ends of epochs and from their middle, with windows of accumulation across them."""
    make, kwargs = CASES["pruning, sharing"].make, {"accumulate_grad_batches": 3, "max_epochs": 9}
    whole = noisy_run(tmp_path / "whole", make(), **kwargs)
    path = None
    curves: dict[str, Any] = {}
    for step in (4, 10, 12, 21, 28):
        folder = tmp_path / f"{step}"
        saver = ModelCheckpointAt(folder, step)
        part = noisy_run(folder, [*make(), saver], path, enable_checkpointing=True, **kwargs)
        curves = joined(curves, part["curves"])
        path = folder / f"step={step}.ckpt"
    part = noisy_run(tmp_path / "last", make(), path, **kwargs)
    part["curves"] = joined(curves, part["curves"])
    assert list(differences(whole, part)) == []


def test_accumulated_gradients_begin_at_the_last_step(tmp_path: Path) -> None:
    case = CASES["pruning, sharing"]
    resumed_equals_whole(tmp_path, case, [3, 8, 12], accumulate_grad_batches=2)


@pytest.mark.parametrize("name", ["pruning, sharing", "learned pruning and sharing"])
def test_validations_that_were_due_are_made_up_for(name: str, tmp_path: Path) -> None:
    """A checkpoint of an epoch's last step is written before the epoch is validated."""

    for settings, steps in (({}, [9, 20]), ({"val_check_interval": 5}, [5, 20])):
        folder = tmp_path / f"{len(settings)}"
        watchers = [lambda: AccuracyGuard(tolerance=0.0), lambda: ParetoCheckpoint(tmp_path)]
        resumed_equals_whole(folder, CASES[name], steps, *watchers, **settings)


def test_every_point_of_a_training_with_rare_validations_can_be_resumed_from() -> None:
    """With augmentation in the training process, before whose numbers a validation is made up."""
    schedule = draw_schedule(random.Random(0)) | {
        "max_epochs": 3,
        "check_val_every_n_epoch": 2,
        "val_check_interval": 5,
        "accumulate_grad_batches": 3,
        "limit_val_batches": 2,
    }
    found = resume_points(schedule)
    assert len(found) == 7
    assert {point: names for point, names in found.items() if names} == {}


@every_case
def test_a_trainer_goes_back_to_an_earlier_checkpoint(case: Case, tmp_path: Path) -> None:
    saver = ModelCheckpointAt(tmp_path, 2, 17)
    runner = trainer(tmp_path, *case.make(), RandomState(), saver, enable_checkpointing=True)
    pl.seed_everything(0)
    module, data = Net(), resumable(shuffle=False)
    runner.fit(module, data)
    whole = copy.deepcopy(dict(module.state_dict()))
    for step in saver.steps:
        runner.fit(module, data, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert not list(differences(whole, dict(module.state_dict()))), step


def test_curves_of_steps_by_hand_keep_their_axis(tmp_path: Path) -> None:
    class EverySecond(Noisy):
        """Accumulates by hand."""

        automatic_optimization = False

        def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, index))
            if index % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    def run(folder: Path, path: Path | None, *more: pl.Callback) -> list[str]:
        pl.seed_everything(0)
        runner = trainer(
            tmp_path,
            *CASES["sharing"].make(),
            RandomState(),
            *more,
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=bool(more),
        )
        runner.fit(EverySecond(), loader(), ckpt_path=path)
        with open(Path(runner.logger.log_dir) / "metrics.csv") as file:
            return [row["step"] for row in csv.DictReader(file) if row["train/loss"]]

    saver = ModelCheckpointAt(tmp_path, 8)
    whole = run(tmp_path / "whole", None, saver)
    assert run(tmp_path / "again", tmp_path / "step=8.ckpt") == whole[16:]


# Precision.


def half(scale: float = 2.0**40) -> MixedPrecision:
    """Half precision with a scaler, as Lightning has it on GPUs alone; the first steps overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@every_case
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_ends_compressed(case: Case, precision: str, tmp_path: Path) -> None:
    module = fit(tmp_path, *case.make(), precision=precision)
    case.check(module)
    kinds = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert module.head.weight.dtype == kinds.get(precision, torch.float32)


@every_case
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=lambda o: o.__name__)
def test_steps_that_the_gradient_scaler_skips(case: Case, optimizer: Any, tmp_path: Path) -> None:
    class Statistics(pl.Callback):
        first: Any = None

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if self.first is None:
                self.first = copy.deepcopy([m.choices() for m in stages_of(trainer)])

    recorder, statistics, methods = Recorder(), Statistics(), case.make()
    precision = half()
    module = fit(
        tmp_path,
        *methods,
        recorder,
        statistics,
        module=Net(optimizer),
        plugins=[precision],
    )
    assert precision.scaler is not None
    assert precision.scaler.get_scale() < 2.0**30
    assert torch.equal(recorder.seen[0], recorder.seen[1])
    # The skipped first step left nothing behind.
    assert not any(tensors for choices in statistics.first for tensors in choices.values())
    case.check(module)
    assert methods[0].clock.steps == 40
    assert module.head.weight.dtype == torch.float32


@pytest.mark.parametrize("criterion", ["gradient", "hessian"])
def test_fused_optimizers_unscale_by_themselves(criterion: str, tmp_path: Path) -> None:
    """Statistics are those of the unscaled gradients all the same."""

    def statistics(fused: bool) -> dict[str, Tensor]:
        pl.seed_everything(0)
        (pruning,) = methods = BY_CRITERION[f"pruning by {criterion}"].make()
        module = Net(lambda p, lr: torch.optim.SGD(p, lr, fused=fused))
        fit(tmp_path, *methods, module=module, max_steps=3, plugins=[half(2.0**8)])
        return pruning.choices()["statistics"]["head.weight"]

    for key, tensor in statistics(fused=False).items():
        torch.testing.assert_close(statistics(fused=True)[key], tensor, rtol=1e-3, atol=1e-7)


# Averaging.


@every_case
@pytest.mark.parametrize("first", [True, False])
def test_averages_are_compressed_wherever_they_are_seen(
    case: Case, first: bool, tmp_path: Path
) -> None:
    class Validated(pl.Callback):
        seen: tuple[Tensor, ...] = ()

        def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            self.seen = (*self.seen, module.head.weight.detach().clone())
            if trainer.current_epoch == 3:
                case.check(module)

    validated, average = Validated(), EMA(decay=0.9)
    saver = ModelCheckpoint(tmp_path, "last")
    callbacks = [average, *case.make()] if first else [*case.make(), average]
    pl.seed_everything(0)
    recorder, module = Recorder("head.weight"), Net()
    runner = trainer(tmp_path, *callbacks, recorder, validated, saver, enable_checkpointing=True)
    runner.fit(module, loader(), validation())
    case.check(module)
    # What was validated is the average, not the weights.
    assert not torch.equal(validated.seen[-1], recorder.seen[-1])
    assert torch.equal(validated.seen[-1], module.head.weight)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = Net()
    plain.load_state_dict(checkpoint["state_dict"])
    case.check(plain)
    # And training went on with the weights.
    plain.load_state_dict(checkpoint["current_model_state"])
    assert torch.equal(plain.head.weight, recorder.seen[-1])


def test_the_average_is_that_of_the_latents(tmp_path: Path) -> None:
    class Manual(pl.Callback):
        average: Tensor | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            plan = plan_of(trainer)
            assert plan is not None
            latent = plan.latents().get("head.weight", module.head.weight).detach().clone()
            self.average = latent if self.average is None else self.average.lerp(latent, 0.1)

    manual, average = Manual(), EMA(decay=0.9)

    class Keep(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            self.model = average._average_model

    keep = Keep()
    fit(tmp_path, *CASES["sharing"].make(), keep, average, manual)
    assert keep.model is not None
    torch.testing.assert_close(keep.model.module.head.weight, manual.average)


@every_case
def test_averaged_runs_resume(case: Case, tmp_path: Path) -> None:
    resumed_equals_whole(tmp_path, case, [17, 35], lambda: EMA(decay=0.9))


def test_an_average_begins_anew_in_another_training(tmp_path: Path) -> None:
    average = EMA(decay=0.9)
    first, second = (fit(tmp_path, *CASES["sharing"].make(), average) for _ in range(2))
    assert not list(differences(dict(first.state_dict()), dict(second.state_dict())))


def test_an_exception_in_a_validation_saves_the_weights_and_the_average(tmp_path: Path) -> None:
    class Failing(Net):
        def validation_step(self, batch: list[Tensor], _: int) -> None:
            if self.current_epoch == 3:
                raise RuntimeError("out of memory")

    case, module = CASES["sharing"], Failing()
    saver = ModelCheckpoint(tmp_path, "saved", save_on_exception=True, save_top_k=0)
    runner = trainer(tmp_path, *case.make(), EMA(decay=0.9), saver, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        runner.fit(module, loader(), validation())
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    current = checkpoint["current_model_state"]
    assert not list(differences(dict(module.state_dict()), dict(current)))
    assert not torch.equal(current["head.weight"], checkpoint["state_dict"]["head.weight"])


def test_without_methods_it_is_lightning_s_own(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    ours, theirs = fit(tmp_path, EMA(0.9)), fit(tmp_path, EMAWeightAveraging(decay=0.9))
    # But for a count of batches, of which Lightning's takes the average.
    assert list(differences(dict(ours.state_dict()), dict(theirs.state_dict()))) == [
        "/body.1.num_batches_tracked"
    ]


def test_what_is_constant_or_integer_is_not_averaged(tmp_path: Path) -> None:
    class Positions(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("position_ids", torch.arange(512), persistent=False)  # BERT's
            self.register_buffer("rates", 1e4 ** -torch.linspace(0, 1, 40), persistent=False)
            self.count = nn.Parameter(torch.tensor([7, 9]), requires_grad=False)
            self.seen: dict[str, Tensor] = {}

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            own = dict(self.named_buffers()) | dict(self.named_parameters())
            self.seen = {name: tensor.detach().clone() for name, tensor in own.items()}

    module, plain = Positions(), Positions()
    runner = trainer(tmp_path, EMA(0.9))
    runner.fit(module, loader(), validation())
    plain.load_state_dict(module.state_dict())
    restored = dict(plain.named_buffers()) | dict(plain.named_parameters())
    assert not list(differences(module.seen, restored))
    assert int(plain.body[1].num_batches_tracked) == 40
    with pytest.raises(MisconfigurationException, match="got 'cpu'; name a device"):
        EMA("cpu")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_modules_that_lightning_cannot_average_are_averaged(tmp_path: Path) -> None:
    """ConViT keeps a table of distances, as large as its last inputs. Others register one when they
    are first called, and lazy layers make their weights then. One value may stand in many places of
    a buffer. The old weight norm holds a weight that was computed."""

    class Growing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(1), persistent=False)
            self.register_buffer("cache", None, persistent=False)
            self.register_buffer("ones", torch.ones(1).expand(3), persistent=False)
            self.normed = weight_norm(nn.Linear(3, 2))
            self.lazy = nn.LazyLinear(4)

        def forward(self, images: Tensor) -> Tensor:
            self.table = torch.arange(float(len(images)))
            if self.cache is None:
                self.cache = torch.ones(2, 3)
                self.body.register_buffer("late", torch.ones(5), persistent=False)
            added = self.normed(self.ones).mean() + self.lazy(images.flatten(1)).mean()
            return super().forward(images) + added

    module = Growing()
    trainer(tmp_path, EMA(0.9), max_epochs=1).fit(module, loader(), validation())
    assert len(module.table) > 1
    assert torch.equal(module.body.late, torch.ones(5))
    module.norm = nn.LazyBatchNorm1d()
    with pytest.raises(MisconfigurationException, match=r"lazy buffers.*norm\.running_mean: call"):
        trainer(tmp_path, EMA(0.9)).fit(module, loader())


def test_validation_after_training_does_not_bring_the_average_back(tmp_path: Path) -> None:
    pl.seed_everything(0)
    runner = trainer(tmp_path, *CASES["sharing"].make(), EMA(decay=0.9))
    runner.fit(Net(), loader(), validation())
    other = Net()
    before = copy.deepcopy(other.state_dict())
    runner.validate(other, validation(), verbose=False)
    assert not list(differences(dict(before), dict(other.state_dict())))


# Optimizers and loops.


def lion(parameters: Any, lr: float) -> torch.optim.Optimizer:
    lion_pytorch = pytest.importorskip("lion_pytorch")
    made: torch.optim.Optimizer = lion_pytorch.Lion(parameters, lr=lr / 10)
    return made


OPTIMIZERS: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "SGD with momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
    "SGD fused": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, fused=True),
    "Adam foreach": lambda p, lr: torch.optim.Adam(p, lr, foreach=True),
    "Adam amsgrad": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True),
    "AdamW": torch.optim.AdamW,
    "AdamW foreach": lambda p, lr: torch.optim.AdamW(p, lr, foreach=True),
    "AdamW fused": lambda p, lr: torch.optim.AdamW(p, lr, fused=True),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Rprop": torch.optim.Rprop,
    "NAdam": torch.optim.NAdam,
    "Adafactor": torch.optim.Adafactor,
    "Lion, of another package": lion,
}


@each_coupling
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_ends_compressed(case: Case, optimizer: Any, tmp_path: Path) -> None:
    case.check(fit(tmp_path, *case.make(), module=Net(optimizer), max_epochs=2))


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer as some packages do, without torch's own set-up."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner = torch.optim.SGD(parameters, lr)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults: dict[str, Any] = {}


class Replaced(torch.optim.SGD):
    """Puts a step of its own into the instance."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.step = self.bare  # type: ignore[assignment]

    def bare(self, closure: Any = None) -> Any:
        closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=0.01)


class Twice(torch.optim.SGD):
    """Looks at the loss twice in a step, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def schedule_free(parameters: Any, lr: float) -> torch.optim.Optimizer:
    schedulefree = pytest.importorskip("schedulefree")
    made: torch.optim.Optimizer = schedulefree.SGDScheduleFree(parameters, lr=lr)
    return made


@each_coupling
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p, lr: torch.optim.LBFGS(p, lr), "LBFGS searches along a line.*use SGD, Adam"),
        (schedule_free, "swaps the weights for averages of its own.*with fitsmall.callbacks.EMA"),
        (Twice, "Twice computes the loss more than once in a step"),
        (Lookahead, "Lookahead does not call the hooks of its step"),
        (Replaced, "Replaced does not call the hooks of its step"),
    ],
    ids=["line search", "schedule-free", "twice", "no hooks", "hooks missed"],
)
def test_optimizers_that_cannot_work_are_refused(
    case: Case, optimizer: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, *case.make(), module=Net(optimizer), max_epochs=1)


@each_coupling
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_two_optimizers_stepped_by_hand(case: Case, precision: str, tmp_path: Path) -> None:
    methods = case.make()
    plugins = [half()] if precision == "16-mixed" else None
    module = fit(tmp_path, *methods, module=Adversaries(), plugins=plugins)
    case.check(module)
    assert methods[0].clock.steps == 40  # batches, not steps of either


@every_case
def test_a_parameter_joins_while_another_optimizer_is_switched_off(
    case: Case, tmp_path: Path
) -> None:
    class Toggling(Adversaries):
        def training_step(self, batch: list[Tensor], _: int) -> None:  # type: ignore[override]
            self.head.weight.requires_grad_(self.current_epoch > 0)
            for optimizer in self.optimizers():
                self.toggle_optimizer(optimizer)
                loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.untoggle_optimizer(optimizer)

    module = Toggling()
    module.head.weight.requires_grad_(False)
    methods = case.make()
    fit(tmp_path, *methods, module=module)
    assert set(WEIGHTS) <= {name for method in methods for name in method.selection.chosen}
    case.check(module)


@each_coupling
def test_steps_behind_lightning_s_back_are_pointed_out(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"get it from self\.optimizers\(\)"):
        fit(tmp_path, *case.make(), module=Adversaries(use_pl_optimizer=False))


class Grouped(Net):
    """Parameter groups, and a learning rate that follows a schedule."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.body.parameters(), "lr": 0.02},
            {"params": [*self.head.parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "plateau":
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0)
            config = {"scheduler": plateau, "monitor": "val/error"}
        else:
            cycle = schedulers.OneCycleLR(optimizer, [0.02, 0.01], total_steps=40)
            config = {"scheduler": cycle, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}


@each_coupling
@pytest.mark.parametrize(("schedule", "clip"), [("plateau", "norm"), ("cycle", "value")])
def test_groups_schedules_clipping_and_accumulation(
    case: Case, schedule: str, clip: str, tmp_path: Path
) -> None:
    pl.seed_everything(0)
    module = Grouped(schedule)
    runner = trainer(
        tmp_path,
        *case.make(),
        gradient_clip_val=0.1,
        gradient_clip_algorithm=clip,
        accumulate_grad_batches=1 if schedule == "cycle" else 2,
        max_epochs=4,
    )
    runner.fit(module, loader(), validation())
    case.check(module)


@every_case
def test_frozen_parameters_are_listed_and_left_alone(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Net()
    module.body.requires_grad_(False)
    before = module.body[0].weight.clone()
    methods = case.make()
    with caplog.at_level("INFO"):
        fit(tmp_path, *methods, module=module)
    assert torch.equal(module.body[0].weight, before)
    case.check(module, "head.weight")
    assert "left out (frozen: requires_grad is False): body.0.weight" in caplog.text


class Unfreeze(BaseFinetuning):
    """Trains the head alone at first."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.01)


class Tunable(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=0.01)


@every_case
@pytest.mark.parametrize(
    ("epoch", "first"), [(1, True), (5, False)], ids=["within the window", "after the window"]
)
def test_parameters_that_join_the_optimizer_later(
    case: Case, epoch: int, first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    methods: list[pl.Callback] = [*case.make()]
    callbacks = [Unfreeze(epoch), *methods] if first else [*methods, Unfreeze(epoch)]
    module = Tunable()
    before = module.body[0].weight.clone()
    with caplog.at_level("INFO"):
        fit(tmp_path, *callbacks, module=module, max_epochs=6)
    case.check(module)
    assert "joined the compression plan at step" in caplog.text
    assert not torch.equal(
        module.body[0].weight[module.body[0].weight != 0], before[module.body[0].weight != 0]
    )


@every_case
def test_lazy_modules(case: Case, tmp_path: Path) -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__(torch.optim.SGD)
            self.head = nn.LazyLinear(10)  # type: ignore[assignment]

    # Initialised by the first forward pass, in the middle of fit.
    case.check(fit(tmp_path, *case.make(), module=Lazy()))


# Compilers.


class Counter:
    """A compiler's back end that counts graphs and their calls, and changes nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@dataclass
class Compiled:
    module: Any
    graphs: int
    breaks: int


def compiled(root: Path, what: str, *callbacks: pl.Callback) -> Compiled:
    """Train compiled, with validation."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = Counter()
    pl.seed_everything(0)
    module = Net()
    if what == "training_step":
        module.training_step = torch.compile(module.training_step, backend=counter)
    trained = torch.compile(module, backend=counter) if what == "module" else module
    trainer(root, *callbacks).fit(trained, loader(), validation())
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Compiled(module, counter.graphs, breaks)


@cache
def plain(root: Path, what: str) -> Compiled:
    return compiled(root, what)


@each_coupling
@pytest.mark.parametrize("what", ["module", "training_step"])
def test_compiled_modules_are_not_compiled_more_often(
    case: Case, what: str, tmp_path: Path
) -> None:
    more = EMA(decay=0.9), CompressedCheckpoint(tmp_path)
    found = compiled(tmp_path, what, *case.make(), *more)
    expected = plain(tmp_path.parent, what)
    assert (found.graphs, found.breaks) == (expected.graphs, expected.breaks)
    case.check(found.module)
