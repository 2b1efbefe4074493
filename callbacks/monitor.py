"""Compression curves: what the network would weigh if training ended now."""

from typing import Any

import lightning.pytorch as pl

from fitsmall.callbacks.method import methods_of
from fitsmall.compressors.codes import Integer, Lookup, Sparse
from fitsmall.compressors.exact import exact
from fitsmall.compressors.file.writer import estimate
from fitsmall.compressors.select import select
from fitsmall.compressors.surgery.factors import weights_saved
from fitsmall.compressors.training.sharding import whole

__all__ = ["CompressionMonitor"]


class CompressionMonitor(pl.Callback):
    """Log estimated file size, sparsity, clusters, bits and distance through the Trainer's logger.

    ====================================  =======================================================
    ``compression/bytes``                 size of the file that the weights would make now
    ``compression/ratio``                 bytes of the plain state dict over that
    ``compression/sparsity``              fraction of zeros among what the methods act on
    ``compression/distance``              ``||u - w|| / ||u||``: latent against projected weights
    ``compression/sparsity/<parameter>``  fraction of zeros
    ``compression/clusters/<parameter>``  distinct non-zero values, once they are few
    ``compression/bits/<parameter>``      bits of its integers, once it is quantized
    ``compression/rank/<parameter>``      its rank, while ranks are learned
    ``compression/flops``                 multiply-adds that the ranks leave, as a fraction
    ``compression/size``                  parameters that the ranks leave, as a fraction
    ====================================  =======================================================

    They are also in ``trainer.callback_metrics``, so that ``ModelCheckpoint`` and schedulers can
    monitor them.

    Args:
        every_n_epochs: Epochs between two estimates; each one codes all weights.
        monitor: Metric that is logged once more, beside the bytes and as ``compression/<metric>``,
            so that a dashboard can draw the one against the other: ``val/error`` for example.
    """

    def __init__(self, every_n_epochs: int = 1, monitor: str | None = None) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is at least 1, got {every_n_epochs}")
        self.every_n_epochs, self.monitor = every_n_epochs, monitor

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.loggers:
            pl.utilities.rank_zero_warn(
                "CompressionMonitor: the Trainer has no logger, so that its curves only show in "
                "trainer.callback_metrics: give it one, logger=CSVLogger('logs') for example"
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
        """The table above, for the module as it is."""
        state = pl_module.state_dict(keep_vars=True)
        # Tied tensors share one code, and count once.
        unique = {id(tensor): exact(whole(tensor.detach())) for tensor in state.values()}
        codes = {name: unique[id(tensor)] for name, tensor in state.items()}
        size = estimate(codes)
        dense = sum(code.shape.numel() * code.dtype.itemsize for code in unique.values())
        for name, count in weights_saved({n: code.shape for n, code in codes.items()}).items():
            dense += count * codes[f"{name}.reduce.weight"].dtype.itemsize
        found: dict[str, Any] = {"bytes": float(size), "ratio": dense / size}
        methods = methods_of(trainer)
        weights = {name: p for method in methods for name, p in method.selection.chosen.items()}
        weights = weights or dict(select(pl_module).chosen)
        zeros = {
            name: weight.numel() - int(whole(weight.detach()).count_nonzero())
            for name, weight in weights.items()
        }
        found["sparsity"] = sum(zeros.values()) / sum(w.numel() for w in weights.values())
        if methods and methods[0].plan is not None:
            found["distance"] = methods[0].plan.distance()
        for name, weight in weights.items():
            found[f"sparsity/{name}"] = zeros[name] / weight.numel()
            code = codes[name]
            code = code.values if isinstance(code, Sparse) else code
            if isinstance(code, Lookup):
                found[f"clusters/{name}"] = float(code.codebook.shape.numel())
            elif isinstance(code, Integer):
                found[f"bits/{name}"] = float(code.width)
        for method in methods:
            found |= method.metrics()
        return {f"compression/{name}": value for name, value in found.items()}
