"""One target for the whole network: a size, a number of multiply-adds, or a latency."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from fitsmall.callbacks.checkpoint import CompressedCheckpoint
from fitsmall.callbacks.driver import StageGroup
from fitsmall.callbacks.stages import ChannelPruning, SizeTarget

__all__ = ["Compress"]

# Part of the window in which channels leave, where the file has a target as well.
_CHANNELS = 0.5


class Compress(StageGroup):
    """Compress a network to a target, and find the rest.

    ::

        Trainer(callbacks=[Compress(size=1/20), CompressedCheckpoint()])
        Trainer(callbacks=[Compress(flops=0.5)])
        Trainer(callbacks=[Compress(size="40 KB", latency=0.7, engine="openvino")])

    A size is reached by :class:`~fitsmall.compressors.training.SizeTarget`: zeros, levels and bits
    of all parameters at one price of a byte. Multiply-adds and latencies are reached by
    :class:`~fitsmall.compressors.training.ChannelPruning`: channels, heads and hidden units leave.
    With both, units leave in the first half of the window, and the file is made small in the other.

    Args:
        size: Most bytes of the file: a fraction of those of the module's state dict, such as
            ``1/20``, or text with a unit, such as ``"40 KB"``.
        flops: Fraction of the multiply-adds that are left, in (0, 1).
        latency: Fraction of the time of a forward pass that is left, in (0, 1).
        engine: Engine that latency is measured in, see
            :class:`~fitsmall.compressors.training.ChannelPruning`; by default ``"torch"``.
        start: Fraction of training after which compression begins.
        stop: Fraction of training at which the target is reached; the rest makes up for it.
        exclude: Patterns of names of parameters to leave as they are.

    Raises:
        ValueError: There is no target, or two that contradict each other.

    Example:
        >>> [type(stage).__name__ for stage in Compress(size="40 KB", flops=0.5).stages]
        ['ChannelPruning', 'SizeTarget']
    """

    def __init__(
        self,
        size: float | str | None = None,
        flops: float | None = None,
        latency: float | None = None,
        engine: str | None = None,
        start: float = 0.05,
        stop: float = 0.85,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        if size is None and flops is None and latency is None:
            raise ValueError(
                "Compress has no target: give it size=1/20, flops=0.5 or latency=0.5, or two of "
                "them"
            )
        if flops is not None and latency is not None:
            raise ValueError(
                "Compress: flops and latency are two targets for the same units: give one of them"
            )
        if engine is not None and latency is None:
            raise ValueError(f"Compress: engine={engine!r} measures a latency, and none is given")
        self.stages = []
        if flops is not None or latency is not None:
            middle = stop if size is None else start + _CHANNELS * (stop - start)
            measured: dict[str, Any] = {} if engine is None else {"engine": engine}
            self.stages.append(
                ChannelPruning(
                    keep_flops=flops,
                    keep_latency=latency,
                    start=start,
                    stop=middle,
                    exclude=exclude,
                    **measured,
                )
            )
            start = middle
        if size is not None:
            self.stages.append(SizeTarget(size, start=start, stop=stop, exclude=exclude))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        coders = [each.coder for each in callbacks if isinstance(each, CompressedCheckpoint)]
        for each in self.stages:
            if isinstance(each, SizeTarget) and coders:
                each.coder = coders[0]
        super().setup(trainer, pl_module, stage)
