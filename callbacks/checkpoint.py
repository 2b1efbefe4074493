"""The compressed file at the end of training, with a proof that it restores the module."""

import copy
import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from fitsmall.callbacks.best import ModelCheckpointOnceCompressed
from fitsmall.callbacks.driver import Driver, plan_of, stages_of
from fitsmall.compressors.codes.dtypes import CODED, same_bits
from fitsmall.compressors.file.reader import load
from fitsmall.compressors.file.report import Report, inspect
from fitsmall.compressors.file.writer import check_storable, save
from fitsmall.compressors.oneshot import restore
from fitsmall.compressors.torch_internals import map_tensors, require, tensors_in
from fitsmall.compressors.training.clock import NEVER, Clock
from fitsmall.compressors.training.messages import warn
from fitsmall.compressors.training.sharding import whole
from fitsmall.compressors.weights import detach_computed_

__all__ = ["CompressedCheckpoint", "check_module", "check_writable"]


class CompressedCheckpoint(pl.Callback):
    """A callback that writes and verifies the compressed file when training ends.

    The file is read back and compared twice: every tensor of the state dict bit for bit, and the
    predictions of a restored copy of the module on the first batch of the last epoch.

    Args:
        dirpath: Folder of the file; by default the logger's, or ``default_root_dir`` without one.
        filename: Name of the file.
        weights: ``"last"``, or ``"best"``: those of the Trainer's ``ModelCheckpointOnceCompressed``
            with a monitor, or without one of its first ``ModelCheckpoint`` with a monitor.
        coder: Coder of the index streams: ``context``, ``ans`` or ``huffman``.

    Attributes:
        path: The file; None before training ends.
        report: Its report, as :func:`~fitsmall.compressors.inspect` returns it.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "model.fitsmall",
        weights: Literal["last", "best"] = "last",
        coder: str = "context",
    ) -> None:
        super().__init__()
        if weights not in ("last", "best"):
            raise MisconfigurationException(
                f"CompressedCheckpoint: weights are 'last' or 'best', got {weights!r}"
            )
        self.dirpath, self.filename = dirpath, filename
        self.weights, self.coder = weights, coder
        self.path: Path | None = None
        self.report: Report | None = None
        self._recorders: dict[str, _Recorder] = {}
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            require("CompressedCheckpoint")
        if stage != "fit" or self.weights != "best":
            return
        if _monitored(trainer) is None:
            raise MisconfigurationException(
                "CompressedCheckpoint: the best weights need a ModelCheckpoint with a monitor in "
                "the Trainer: add one, or use weights='last'"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "CompressedCheckpoint: a sharded training saves its best weights in several "
                "files: use weights='last'"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            check_writable(folder, self)
        check_module(pl_module, self)
        if self.weights == "best":
            for owner in (pl_module, getattr(trainer, "datamodule", None)):
                _check_hyperparameters(owner)
        # Once for the whole training: torch.compile compiles again after a change of hooks.
        for name, module in [("", pl_module), *pl_module.named_children()]:
            if any(True for _ in module.parameters()):
                recorder = self._recorders[name] = _Recorder()
                self._hooks.append(module.register_forward_pre_hook(recorder, with_kwargs=True))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            for recorder in self._recorders.values():
                recorder.listening, recorder.call = True, None

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        for recorder in self._recorders.values():
            recorder.listening = False

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._unhook()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._unhook()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self._unhook()  # also of a fit without steps

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Both are collective operations.
        folder = self._folder(trainer)
        tensors = {name: whole(tensor) for name, tensor in pl_module.state_dict().items()}
        if trainer.is_global_zero:
            if self.weights == "best":
                tensors = self._best(trainer) or tensors
            plan = plan_of(trainer)
            tensors = plan.stored(tensors) if plan is not None else tensors
            _warn_of_nan(tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            self.path = self._save(folder, tensors, trainer)
            _verify(self.path, tensors, size)
            with trainer.precision_plugin.forward_context():
                compared = self._compare(pl_module, tensors)
            self.report = inspect(self.path, size)
            print(f"\n{self.report.table()}")
            print(f"{self.path} restores every tensor bit for bit; {compared}")
        self.path = trainer.strategy.broadcast(self.path)

    def _folder(self, trainer: pl.Trainer) -> Path:
        """Return the folder of the file; a collective operation, as the first process decides."""
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        return trainer.strategy.broadcast(folder)

    def _save(self, folder: Path, tensors: dict[str, Tensor], trainer: pl.Trainer) -> Path:
        """Write the file and return its path.

        If the folder cannot be written to, try that of the checkpoints and others: a full disk must
        not cost a long training.
        """
        checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
        others = [checkpoints, trainer.default_root_dir, Path.cwd(), tempfile.gettempdir()]
        problems = []
        for candidate in dict.fromkeys([folder, *(Path(other) for other in others if other)]):
            try:
                candidate.mkdir(parents=True, exist_ok=True)
                save(candidate / self.filename, tensors, self.coder)
            except OSError as error:
                problems.append(f"{candidate} cannot be written to ({error})")
                continue
            if problems:
                warn(
                    f"CompressedCheckpoint: {'; '.join(problems)}: the file is "
                    f"{candidate / self.filename}"
                )
            return candidate / self.filename
        raise OSError(f"CompressedCheckpoint: {'; '.join(problems)}: free some space")

    def _best(self, trainer: pl.Trainer) -> dict[str, Tensor] | None:
        """Return the state dict of the best weights; None, with a warning, if none were saved."""
        path = getattr(_monitored(trainer), "best_model_path", "")
        if not path:
            warn(
                "CompressedCheckpoint: no best weights were saved, since compression never reached "
                "full strength or nothing was validated: the file holds the last weights"
            )
            return None
        try:  # a resumed checkpoint may have named the file
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            warn(
                f"CompressedCheckpoint: {path} holds more than tensors and numbers, and is not "
                f"read ({str(error).splitlines()[0]}): the file holds the last weights"
            )
            return None
        if state := checkpoint.get("callbacks", {}).get(Driver.STATE_KEY):
            clock = Clock()
            clock.load_state_dict(state["clock"])
            for stage in stages_of(trainer):
                window = clock.windows.get(stage.key, NEVER)
                if clock.now < window.last:
                    warn(
                        f"the best weights are from before {type(stage).__name__} reached its "
                        "full strength: use ModelCheckpointOnceCompressed"
                    )
        tensors: dict[str, Tensor] = checkpoint["state_dict"]
        return tensors

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _compare(self, pl_module: pl.LightningModule, tensors: dict[str, Tensor]) -> str:
        """Compare the trained module's predictions with those of one restored from the file."""
        assert self.path is not None
        calls = {name: recorder.call for name, recorder in self._recorders.items()}
        self._recorders = {}
        examples = 0
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            return "predictions were not compared, since no process has the whole module"
        try:
            detach_computed_(pl_module)
            trained, restored = copy.deepcopy(pl_module).eval(), copy.deepcopy(pl_module).eval()
            trained.load_state_dict(tensors)
            for parameter in restored.parameters():
                parameter.data.zero_()
            restore(restored, self.path)
            for name, call in calls.items():
                if call is None:
                    continue
                expected = _replay(trained.get_submodule(name), call)
                found = _replay(restored.get_submodule(name), call)
                if not all(same_bits(a, b) for a, b in zip(expected, found, strict=True)):
                    return (
                        f"but the predictions of {name or 'the module'} differ: does it depend on "
                        "state outside of its state_dict?"
                    )
                examples = max([examples, *(len(a) for a in expected if a.dim())])
        except Exception as error:  # noqa: BLE001  user code, which may need its training loop
            return f"predictions were not compared ({type(error).__name__}: {error})"
        return f"predictions on {examples} examples are identical" if examples else "no batch seen"


def _monitored(trainer: pl.Trainer) -> ModelCheckpoint | None:
    """Return the ModelCheckpoint with a monitor, by preference one that sees only compressed
    weights."""
    saving = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    compressed = [c for c in saving if isinstance(c, ModelCheckpointOnceCompressed)]
    return next((c for c in [*compressed, *saving] if c.monitor is not None), None)


def _warn_of_nan(tensors: dict[str, Tensor]) -> None:
    wrong = [name for name, t in tensors.items() if t.dtype in CODED and t.isnan().any()]
    if wrong:
        warn(
            f"CompressedCheckpoint: {', '.join(wrong)} hold NaN: training diverged, and the file "
            "is as useless as the module; lower the learning rate, or clip gradients"
        )


def check_module(module: nn.Module, asker: pl.Callback) -> None:
    """Check, before training starts, that a file can hold a module's state dict.

    Args:
        module: The module.
        asker: Callback that the error names.

    Raises:
        MisconfigurationException: A file cannot hold an entry.
    """
    for name, value in module.state_dict().items():
        if is_lazy(value):
            continue
        try:
            check_storable(name, value)
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"{type(asker).__name__}: of the state dict {error}; or keep it out, with "
                "register_buffer(..., persistent=False)"
            ) from error


def check_writable(folder: Path, asker: pl.Callback) -> None:
    """Make a folder and check, before training starts, that files can be written to it.

    Args:
        folder: The folder.
        asker: Callback that the error names.

    Raises:
        MisconfigurationException: The folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise MisconfigurationException(
            f"{type(asker).__name__}: {folder} cannot be written to ({error}): name another "
            "folder with dirpath=..."
        ) from error


def _check_hyperparameters(owner: Any) -> None:
    """Check that checkpoints with these hyper-parameters can be read without unpickling code."""
    file = io.BytesIO()
    try:
        torch.save(dict(getattr(owner, "hparams", {})), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise MisconfigurationException(
            f"CompressedCheckpoint: the best weights are read from a checkpoint, and the saved "
            f"hyper-parameters of {type(owner).__name__} are more than tensors and numbers: leave "
            "these out with save_hyperparameters(ignore=[...]), allow their classes with "
            "torch.serialization.add_safe_globals, or use weights='last'"
        ) from error


Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder:
    """A hook that records the inputs of the first call of a module, while it listens."""

    def __init__(self) -> None:
        self.listening = False
        self.call: Call | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        # Distributed strategies replace the module's forward for a moment to call training_step.
        if self.listening and self.call is None and "forward" not in vars(module):
            self.call = map_tensors(_copied, (args, kwargs))


def _replay(module: nn.Module, call: Call) -> list[Tensor]:
    args, kwargs = map_tensors(_copied, call)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = module(*args, **kwargs)
    return tensors_in(output)


def _verify(path: Path, tensors: dict[str, Tensor], size: int) -> None:
    restored = load(path, size)
    wrong = [name for name, tensor in tensors.items() if not same_bits(restored[name], tensor)]
    if wrong:
        raise RuntimeError(f"{path} does not restore {', '.join(wrong)}: please report this")


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
