"""Exponential moving average of the weights, as compressed as the weights themselves."""

import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitsmall.callbacks.driver import drive, plan_of, stages_of
from fitsmall.callbacks.lightning_internals import require
from fitsmall.callbacks.rivals import ProjectedAverage
from fitsmall.compressors.surgery.kinds import own_tensors
from fitsmall.compressors.weights import detach_computed_

__all__ = ["EMA"]


class EMA(ProjectedAverage, EMAWeightAveraging):
    r"""Average the latent weights, ``a <- d a + (1 - d) u``, and use the projection of the average.

    An average of sparse weights is not sparse, and one of shared weights is not shared. Therefore
    the *latents* ``u`` are averaged. Validation, checkpoints and the module after training use
    ``P(a)``, the average projected with the current masks and clusters of the weights.

    Parameters are averaged, and buffers that are floating-point *and* saved in the state dict, such
    as the statistics of batch-norm. All other buffers are copies of the module's: an average of
    integers is no integer, and one of a constant differs from it in the last bit.

    It is Lightning's ``EMAWeightAveraging``. Until the first update the weights themselves are
    validated and saved. Its position in the Trainer's list does not matter.

    Args:
        decay: Weight ``d`` of the average so far, in [0, 1].
        use_buffers: Whether buffers are averaged; otherwise all of them are copied.
        update_every_n_steps: Optimizer steps from one update to the next.
        update_starting_at_step: Step of the first update.
        update_starting_at_epoch: Epoch from which on its end is an update too.
        device: Device of the average; by default the module's.

    Raises:
        MisconfigurationException: The decay is no fraction.
    """

    # The averages by name, while their projections are in the module for a validation. A default,
    # since on_exception may come before setup.
    _averages: Mapping[str, Tensor] = MappingProxyType({})
    _fitting = True
    # Names of the tensors that are not averaged.
    _copied: list[str] | None = None
    # Number of surgeries that the average has undergone.
    _operations = 0

    def __init__(
        self,
        decay: float = 0.999,
        use_buffers: bool = True,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay <= 1:
            raise MisconfigurationException(
                f"EMA: decay is a fraction in [0, 1], got {decay!r}; name a device by device=..."
            )
        super().__init__(
            device=device,
            use_buffers=use_buffers,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
            update_starting_at_epoch=update_starting_at_epoch,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require("EMA")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "EMA: ModelParallelStrategy shards parameters, and Lightning's averaging needs "
                "them whole: train without EMA, or with strategy='ddp'"
            )
        if stages_of(trainer):  # they change layers, before the average becomes a copy of these
            drive(trainer, pl_module, stage)
        self._averages = {}
        self._copied, self._operations = None, 0
        self._fitting = stage == "fit"
        if self._fitting and not trainer.global_step:  # a new training
            self._latest_update_step, self._latest_update_epoch = 0, -1
        if self._fitting:
            if lazy := [name for name, buffer in pl_module.named_buffers() if is_lazy(buffer)]:
                raise MisconfigurationException(
                    f"EMA: torch cannot copy lazy buffers, such as {lazy[0]}: call the module once "
                    "before training, or give its layers their sizes"
                )
            detach_computed_(pl_module)
            _make_writable_(pl_module)
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._operate(pl_module)
        self._match_tensors(pl_module)
        super().on_train_batch_end(trainer, _Latent(pl_module), *args, **kwargs)  # type: ignore[arg-type]
        self._copy_others(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, _Latent(pl_module))  # type: ignore[arg-type]
        self._copy_others(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:
            super().load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._started:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            averages = checkpoint["state_dict"]
            for name, projection in _projections(pl_module, averages).items():
                # Lightning looks for the average here first, and then in the state dict.
                checkpoint["averaging_state"][f"module.{name}"] = averages[name]
                averages[name] = projection

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A checkpoint from before the first update, or without averaging, has only the weights.
        if self._average_model is not None and "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._averages:  # in the middle of a validation; a checkpoint may follow
            self._swap_models(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The module holds the average now: a validation must not swap them again.
        self._average_model = None

    def weights(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Return the state dict that is validated: the projection of the average."""
        if not self._started:
            return pl_module.state_dict()
        assert self._average_model is not None
        averages = self._average_model.module.state_dict()
        return {**averages, **_projections(pl_module, averages)}

    def _operate(self, pl_module: pl.LightningModule) -> None:
        """Apply to the average what surgery has done to the module."""
        plan = plan_of(pl_module.trainer)
        assert self._average_model is not None
        for surgery in plan.operations[self._operations :] if plan else ():
            surgery.apply(self._average_model.module)
            self._operations, self._copied = self._operations + 1, None

    @torch.no_grad()
    def _match_tensors(self, pl_module: pl.LightningModule) -> None:
        """Give the average the tensors that forward passes have made in the module.

        They initialise lazy layers, and register, drop and resize buffers, such as tables that
        depend on the size of the inputs.
        """
        assert self._average_model is not None
        average, device = self._average_model.module, self._average_model.n_averaged.device
        lazy: dict[str, Any] = {n: p for n, p in average.named_parameters() if is_lazy(p)}
        for name, tensor in pl_module.named_parameters() if lazy else ():
            if name in lazy and not is_lazy(tensor):
                lazy[name].materialize(tensor.shape)
                lazy[name].copy_(tensor)
        now, own = dict(pl_module.named_buffers()), dict(average.named_buffers())
        new = [n for n, b in now.items() if n not in own or own[n].shape != b.shape]
        gone = own.keys() - now.keys()
        if not new and not gone:
            return
        self._copied = None
        saved = pl_module.state_dict(keep_vars=True)
        _make_writable_(pl_module)
        for name in (*new, *gone):
            path, _, attribute = name.rpartition(".")
            buffer = now[name].detach().to(device, copy=True) if name in now else None
            average.get_submodule(path).register_buffer(attribute, buffer, name in saved)

    @torch.no_grad()
    def _copy_others(self, pl_module: pl.LightningModule) -> None:
        """Copy what is not averaged."""
        assert self._average_model is not None
        averages, tensors = _tensors_of(self._average_model.module), _tensors_of(pl_module)
        if self._copied is None:  # layers do not change under averaging, but buffers may
            saved = pl_module.state_dict(keep_vars=True).keys()
            averaged = {
                name
                for name, tensor in tensors.items()
                if isinstance(tensor, nn.Parameter) or name in saved
                if tensor.is_floating_point() or tensor.is_complex()
            }
            self._copied = [*(tensors.keys() - averaged), *own_tensors(tensors)]
        for name in self._copied:
            averages[name].copy_(tensors[name])

    @property
    def _started(self) -> bool:
        return self._average_model is not None and bool(self._average_model.n_averaged > 0)

    @torch.no_grad()
    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        if not self._started:
            return
        assert self._average_model is not None
        self._match_tensors(pl_module)
        super()._swap_models(pl_module)
        if self._averages:
            for name, average in self._averages.items():
                self._average_model.module.get_parameter(name).copy_(average)
            self._averages = {}
        else:
            self._averages = _project_(pl_module)

    def _copy_average_to_current(self, pl_module: pl.LightningModule) -> None:
        if self._started:
            super()._copy_average_to_current(pl_module)
            _project_(pl_module)


class _Latent:
    """A stand-in for a module, whose parameters are latents where there are any."""

    def __init__(self, module: pl.LightningModule) -> None:
        plan = plan_of(module.trainer)
        self.module, self.latents = module, plan.latents() if plan else {}

    def parameters(self) -> Iterator[Tensor]:
        return (self.latents.get(name, p) for name, p in self.module.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self.module.buffers()


def _make_writable_(module: nn.Module) -> None:
    """Give each entry of an expanded buffer memory of its own."""
    for layer in module.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if buffer.layout == torch.strided and 0 in buffer.stride():
                setattr(layer, name, buffer.contiguous())


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def _projections(module: pl.LightningModule, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projected averages of what stages act on, by all of its names."""
    plan = plan_of(module.trainer)
    projections = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if plan is not None and parameter in plan.names:
            projections[name] = averages[name].detach().to(parameter.device, copy=True)
            plan.project_average_(plan.names[parameter], projections[name])
    if plan is not None:
        names = dict(module.named_buffers(remove_duplicate=False)).keys() & averages.keys()
        buffers = {name: averages[name].clone() for name in names}
        plan.project_buffers_(buffers)
        changed = {name for name in names if not torch.equal(buffers[name], averages[name])}
        projections |= {name: buffers[name] for name in changed}
    return projections


@torch.no_grad()
def _project_(module: pl.LightningModule) -> dict[str, Tensor]:
    """Project the averages in a module in place, and return the averages by name."""
    plan = plan_of(module.trainer)
    averages = {}
    for name, parameter in module.named_parameters():
        if plan is not None and parameter in plan.names:
            averages[name] = parameter.detach().clone()
            plan.project_average_(name, parameter.detach())
    if plan is not None:
        plan.project_buffers_(dict(module.named_buffers()))
    return averages
