"""Compression curves: the estimated size of the file, sparsity, bits and ranks during training."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from fitsmall.callbacks.driver import plan_of, stages_of
from fitsmall.compressors.codes.code import Integer, Lookup, Sparse
from fitsmall.compressors.codes.exact import exact
from fitsmall.compressors.file.writer import estimate
from fitsmall.compressors.select import select
from fitsmall.compressors.surgery.kinds import changes
from fitsmall.compressors.surgery.protocol import TensorSpec
from fitsmall.compressors.training.sharding import whole

__all__ = ["CompressionMonitor"]


class CompressionMonitor(pl.Callback):
    """A callback that logs the estimated size of the file, sparsity, clusters, bits and more.

    ====================================  =======================================================
    ``compression/bytes``                 size of the file that the weights would make now, with
                                          ``SizeTarget`` at the levels that were chosen last
    ``compression/ratio``                 bytes of the plain state dict over that
    ``compression/sparsity``              fraction of zeros in the weights that stages act on
    ``compression/distance``              ``||u - w|| / ||u||``: latent against projected weights
    ``compression/sparsity/<parameter>``  fraction of zeros
    ``compression/clusters/<parameter>``  distinct non-zero values, once they are few
    ``compression/bits/<parameter>``      bits of its integers, once it is quantized
    ``compression/rank/<parameter>``      its rank, while ranks are learned
    ``compression/flops``                 multiply-adds that the ranks leave, as a fraction
    ``compression/size``                  parameters that the ranks leave, as a fraction
    ``compression/price``                 loss that a bit is worth, with ``SizeTarget``
    ``compression/target_bytes``          size of the file that it aims at
    ====================================  =======================================================

    They go to the Trainer's logger and to ``trainer.callback_metrics``, so that ``ModelCheckpoint``
    and learning-rate schedulers can monitor them.

    Args:
        every_n_epochs: Epochs between two estimates, which take the time to code all weights.
        monitor: Metric, such as ``val/error``, that is also logged as ``compression/<metric>``, so
            that a dashboard can draw it against the bytes.

    Raises:
        ValueError: ``every_n_epochs`` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, monitor: str | None = None) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is at least 1, got {every_n_epochs}")
        self.every_n_epochs, self.monitor = every_n_epochs, monitor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            pl.utilities.rank_zero_warn(
                "CompressionMonitor: the Trainer has no logger, and metrics are only in "
                "trainer.callback_metrics: give it one, such as logger=CSVLogger('logs')"
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            metrics = self.metrics(trainer, pl_module)
            if self.monitor in trainer.callback_metrics:
                metrics[f"compression/{self.monitor}"] = float(
                    trainer.callback_metrics[self.monitor]
                )
            pl_module.log_dict(metrics)

    @staticmethod
    def metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return the metrics of the table above for a module, by name."""
        stages, plan = stages_of(trainer), plan_of(trainer)
        state: dict[str, Tensor] = pl_module.state_dict(keep_vars=True)
        if plan is not None and any(stage.surgery() for stage in stages):
            state = plan.stored({name: whole(tensor.detach()) for name, tensor in state.items()})
        # Tied tensors share one code, and count once.
        unique = {id(tensor): exact(whole(tensor.detach())) for tensor in state.values()}
        codes = {name: unique[id(tensor)] for name, tensor in state.items()}
        size = estimate(codes)
        dense = sum(code.shape.numel() * code.dtype.itemsize for code in unique.values())
        layout = {name: TensorSpec(code.shape, code.dtype) for name, code in codes.items()}
        dense += sum(row.bytes_before - row.bytes for row in changes(layout))
        found: dict[str, Any] = {"bytes": float(size), "ratio": dense / size}
        weights = {name: p for stage in stages for name, p in stage.selection.chosen.items()}
        weights = weights if stages else _default_weights(pl_module)
        zeros = {
            name: weight.numel() - int(whole(weight.detach()).count_nonzero())
            for name, weight in weights.items()
        }
        total = sum(weight.numel() for weight in weights.values())
        found["sparsity"] = sum(zeros.values()) / max(1, total)
        if plan is not None:
            found["distance"] = plan.distance()
        for name, weight in weights.items():
            found[f"sparsity/{name}"] = zeros[name] / weight.numel()
            code = codes.get(name)  # none of a weight that the file holds as two
            code = code.values if isinstance(code, Sparse) else code
            if isinstance(code, Lookup):
                found[f"clusters/{name}"] = float(code.codebook.shape.numel())
            elif isinstance(code, Integer):
                found[f"bits/{name}"] = float(code.width)
        for stage in stages:
            found |= stage.metrics()
        return {f"compression/{name}": value for name, value in found.items()}


def _default_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that stages would select; none where there are none."""
    try:
        return dict(select(module).chosen)
    except ValueError:
        return {}
