"""The compressed file at the end of training, proved to restore what was trained."""

import copy
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from pressfit.callbacks.method import Method
from pressfit.compressors.artifact import load, save
from pressfit.compressors.codes import same_bits
from pressfit.compressors.compress import restore
from pressfit.compressors.report import Report, inspect

__all__ = ["CompressedCheckpoint"]


class CompressedCheckpoint(pl.Callback):
    """Write the compressed file when training ends, read it back, compare, and print its table.

    The file is compared twice: every tensor of the state dict bit for bit, and the predictions of
    a restored copy of the module on the first batch of the last epoch.

    Args:
        dirpath: Folder of the file; by default the logger's, else the Trainer's root.
        filename: Name of the file.
        weights: ``"last"``, or ``"best"`` by the Trainer's ``ModelCheckpoint``.
        coder: Coder of the index streams: ``context``, ``ans`` or ``huffman``.

    Attributes:
        path: The file, once training has ended.
        report: Its table, as :func:`~pressfit.compressors.inspect` returns it.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "model.pressfit",
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
        self._calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.weights == "best" and trainer.checkpoint_callback is None:
            raise MisconfigurationException(
                "CompressedCheckpoint: the best weights need a ModelCheckpoint with a monitor in "
                "the Trainer; add one, or write weights='last'"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self._record(pl_module)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop_recording()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._stop_recording()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            tensors = self._tensors(trainer, pl_module)
            self.path = folder / self.filename
            save(self.path, tensors, self.coder)
            _verify(self.path, tensors)
            compared = self._compare(pl_module, tensors)
            self.report = inspect(self.path)
            print(f"\n{self.report.table()}")
            print(f"{self.path} restores every tensor bit for bit; {compared}")
        trainer.strategy.barrier()

    def _tensors(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if self.weights == "last":
            return pl_module.state_dict()
        path = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not path:
            raise MisconfigurationException(
                "CompressedCheckpoint: ModelCheckpoint has no best weights; give it a monitor"
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for method in (c for c in trainer.callbacks if isinstance(c, Method)):  # type: ignore[attr-defined]
            last = method.plan.windows[method][1] if method.plan else 0
            if checkpoint["global_step"] < last:
                pl.utilities.rank_zero_warn(
                    f"the best weights are from step {checkpoint['global_step']:,}, before "
                    f"{type(method).__name__} reached its full strength at step {last:,}: monitor a "
                    "metric that counts only from there on"
                )
        tensors: dict[str, Tensor] = checkpoint["state_dict"]
        return tensors

    def _record(self, pl_module: pl.LightningModule) -> None:
        """Keep the inputs of the outermost modules that this batch calls."""
        self._stop_recording()
        self._calls = {}
        for name, module in [("", pl_module), *pl_module.named_children()]:
            if any(True for _ in module.parameters()):

                def keep(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    self._calls.setdefault(name, tree_map(_detached, (args, kwargs)))

                self._hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))

    def _stop_recording(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _compare(self, pl_module: pl.LightningModule, tensors: dict[str, Tensor]) -> str:
        """Predictions of the trained module and of one restored from the file."""
        assert self.path is not None
        trained, restored = copy.deepcopy(pl_module).eval(), copy.deepcopy(pl_module).eval()
        trained.load_state_dict(tensors)
        for parameter in restored.parameters():
            parameter.data.zero_()
        restore(restored, self.path)
        examples = 0
        with torch.no_grad():
            for name, (args, kwargs) in self._calls.items():
                expected = trained.get_submodule(name)(*args, **kwargs)
                found = restored.get_submodule(name)(*args, **kwargs)
                for a, b in zip(_tensors_of(expected), _tensors_of(found), strict=True):
                    if not same_bits(a, b):
                        raise RuntimeError(
                            f"{self.path} restores all weights, but {name or 'the module'} "
                            "predicts something else: does it depend on state outside of its "
                            "state_dict?"
                        )
                    examples = max(examples, len(a) if a.dim() else 1)
        self._calls = {}
        return f"predictions on {examples} examples are identical" if examples else "no batch seen"


def _verify(path: Path, tensors: dict[str, Tensor]) -> None:
    restored = load(path)
    wrong = [name for name, tensor in tensors.items() if not same_bits(restored[name], tensor)]
    if wrong:
        raise RuntimeError(f"{path} does not restore {', '.join(wrong)}: please report this")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
