"""One target for the whole network: a size, multiply-adds, a latency, or a metric to keep."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from fitsmall.callbacks.accuracy_floor import AccuracyFloor
from fitsmall.callbacks.driver import StageCallback, StageGroup, plan_of
from fitsmall.callbacks.monitored import MonitoredMetric
from fitsmall.callbacks.outcomes import Outcome
from fitsmall.callbacks.stages import (
    ChannelPruning,
    QuantizationAwareTraining,
    RankLearning,
    SizeTarget,
)
from fitsmall.compressors.export.latency import LATENCY_ENGINES
from fitsmall.compressors.naming import lookup

__all__ = ["Compress"]

_INTEGER_ENGINES = [name for name, file in LATENCY_ENGINES.items() if file]

# Part of the window in which layers become smaller, where the file has a target as well.
_LAYERS = 0.5
# Latency varies from one measurement to the next.
_LATENCY_TOLERANCE = 0.05


class Compress(StageGroup):
    """Compress a network to a target, and find the rest.

    ::

        Trainer(callbacks=[Compress(size=1/20), CompressedCheckpoint()])
        Trainer(callbacks=[Compress(flops=0.5)])
        Trainer(callbacks=[Compress(size="40 KB", latency=0.7, engine="openvino")])
        Trainer(callbacks=[Compress(max_drop=0.005, monitor="val/error")])

    A size is reached by :class:`~fitsmall.compressors.training.SizeTarget`: zeros, levels and bits
    of all parameters at one price of a bit. Multiply-adds and latencies are reached by
    :class:`~fitsmall.compressors.training.ChannelPruning`: channels, heads and hidden units leave;
    multiply-adds also by :class:`~fitsmall.compressors.training.RankLearning`: layers become two.
    With both, layers become smaller in the first half of the window, and the file in the other.
    With ``max_drop`` the size is the smallest one that keeps a metric of held-out data
    (:mod:`~fitsmall.callbacks.accuracy_floor`).

    Args:
        size: Most bytes of the file: a fraction of those of the module's state dict, such as
            ``1/20``, or text with a unit, such as ``"40 KB"``.
        flops: Fraction of the multiply-adds that are left, in (0, 1).
        latency: Fraction of the time of a forward pass that is left, in (0, 1).
        engine: Engine that latency is measured in, see
            :class:`~fitsmall.compressors.training.ChannelPruning`; by default ``"torch"``.
        max_drop: Largest difference of a metric from the dense network's, in the metric's units:
            0.005 is half a percentage point of an error rate in [0, 1].
        monitor: Name of the metric, which validations log.
        mode: ``"min"`` if it is an error, the default, or ``"max"`` if it is an accuracy.
        methods: Methods that may be used, one list for all targets:

            - for ``size`` and ``max_drop``: ``["prune", "quantize"]``, the default, or
              ``"quantize"`` without zeros;
            - for ``flops``: ``"channels"``, the default, or ``"ranks"``;
            - for ``latency``: ``"channels"``, the default, or ``["channels", "quantize"]`` for
              weights and inputs of 8 bits in an engine that has kernels for them. Next to a size,
              ``"quantize"`` means its levels.
        dense: The dense network's metric. By default it is the best one before ``start``, which is
            right for a network that is trained already.
        start: Fraction of training after which compression begins.
        stop: Fraction of training at which the target is reached; the rest makes up for it.
        exclude: Patterns of names of parameters to leave as they are.

    Raises:
        ValueError: There is no target, or two that contradict each other; or the methods are not
            those of the targets.
        MisconfigurationException: Of the metric more is usually better, and ``mode`` is missing.

    Example:
        >>> [type(stage).__name__ for stage in Compress(size="40 KB", flops=0.5).stages]
        ['ChannelPruning', 'SizeTarget']
        >>> Compress(flops=0.5, methods="ranks").stages[0].keep_flops
        0.5
    """

    def __init__(
        self,
        size: float | str | None = None,
        flops: float | None = None,
        latency: float | None = None,
        engine: str | None = None,
        max_drop: float | None = None,
        methods: str | Sequence[str] | None = None,
        monitor: str = "val/error",
        mode: Literal["min", "max"] | None = None,
        dense: float | None = None,
        start: float = 0.05,
        stop: float = 0.85,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        if all(target is None for target in (size, flops, latency, max_drop)):
            raise ValueError(
                "Compress has no target: give it size=1/20, flops=0.5, latency=0.5 or "
                "max_drop=0.005"
            )
        if size is not None and max_drop is not None:
            raise ValueError(
                "Compress: size and max_drop both say how small the file becomes: give one of them"
            )
        if dense is not None and max_drop is None:
            raise ValueError("Compress: dense is what max_drop is compared with, and none is given")
        if flops is not None and latency is not None:
            raise ValueError(
                "Compress: flops and latency are two targets for the same units: give one of them"
            )
        if engine is not None and latency is None:
            raise ValueError(f"Compress: engine={engine!r} measures a latency, and none is given")
        small, narrow = size is not None or max_drop is not None, flops is not None
        chosen = _methods(methods, small, narrow, latency is not None)
        integers = not small and "quantize" in chosen
        if integers and engine not in _INTEGER_ENGINES:
            raise ValueError(
                f"Compress: 'quantize' lowers the latency of engine={' or '.join(_INTEGER_ENGINES)}"
                f", and engine is {engine}"
            )
        middle = start + _LAYERS * (stop - start) if small or integers else stop
        window: dict[str, Any] = {"start": start, "stop": middle, "exclude": exclude}
        self.stages = []
        if "ranks" in chosen:
            self.stages.append(RankLearning(keep_flops=flops, **window))
        elif "channels" in chosen:
            measured: dict[str, Any] = {} if engine is None else {"engine": engine}
            self.stages.append(
                ChannelPruning(
                    keep_flops=flops, keep_latency=latency, integers=integers, **measured, **window
                )
            )
        if integers:
            self.stages.append(QuantizationAwareTraining(start=middle, stop=stop, exclude=exclude))
        self.floor: AccuracyFloor | None = None
        self._fitting = True
        if small:
            begin = middle if self.stages else start
            zeros = "prune" in chosen
            target = SizeTarget(size, start=begin, stop=stop, exclude=exclude, zeros=zeros)
            self.stages.append(target)
            if max_drop is not None:
                self.floor = AccuracyFloor(target, MonitoredMetric(monitor, mode), max_drop, dense)

    def outcome(self, size: int) -> list[Outcome]:
        """Return what became of each target, after training.

        Args:
            size: Bytes of the file.
        """
        outcomes = []
        for stage in self.stages:
            if isinstance(stage, ChannelPruning | RankLearning):
                latency = getattr(stage, "keep_latency", None)
                for name, most in (("flops", stage.keep_flops), ("latency", latency)):
                    if most is not None:
                        left = stage.left.get(name, 1.0)
                        slack = _LATENCY_TOLERANCE if name == "latency" else 0.0
                        met = stage.is_final and left <= most * (1 + slack)
                        outcomes.append(Outcome(name, f"at most {most:g}", f"{left:.3f}", met))
            elif isinstance(stage, SizeTarget):
                free = stage.size is None
                most_bytes = "the fewest bytes" if free else f"at most {stage.target:,} bytes"
                met = stage.clock.now >= stage.window.last and (free or size <= stage.target)
                outcomes.append(Outcome("file", most_bytes, f"{size:,} bytes", met))
        if self.floor is not None:
            outcomes.append(self.floor.outcome())
        return outcomes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for each in self.stages:
            if isinstance(each, StageCallback):
                each.setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"
        # An earlier fit of the same module goes on.
        if self.floor is not None and self._fitting and plan_of(trainer) is None:
            self.floor.reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.floor is not None:
            self.floor.begin(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.floor is not None:
            self.floor.end_window(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.floor is not None and trainer.state.fn == "fit":
            self.floor.show_levels_(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.floor is not None and trainer.state.fn == "fit":
            self.floor.show_floats_()
            self.floor.judge(trainer, pl_module.device)

    def on_exception(self, *args: Any) -> None:
        if self.floor is not None:
            self.floor.show_floats_()

    def on_train_end(self, *args: Any) -> None:
        if self.floor is not None:
            self.floor.report()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.floor is None else self.floor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.floor is not None and state_dict and self._fitting:
            self.floor.load_state_dict(state_dict)


def _methods(
    methods: str | Sequence[str] | None, small: bool, narrow: bool, fast: bool
) -> Sequence[str]:
    """Return the methods for a smaller file, fewer multiply-adds or a lower latency.

    Raises:
        ValueError: The targets need others.
    """
    serves = {
        "quantize": small or fast,
        "prune": small,
        "channels": narrow or fast,
        "ranks": narrow,
    }
    if methods is None:
        small_ones = ["quantize", "prune"] if small else []
        return [*small_ones, *(["channels"] if narrow or fast else [])]
    chosen = [methods] if isinstance(methods, str) else list(methods)
    for name in chosen:
        if not lookup("method", name, serves):
            targets = {
                "channels": "flops or latency",
                "ranks": "flops",
                "quantize": "size, max_drop or latency",
                "prune": "size or max_drop",
            }
            raise ValueError(
                f"Compress: methods has {name!r}, which serves {targets[name]}, and none is given"
            )
    if small and "quantize" not in chosen:
        raise ValueError(
            "Compress: a file becomes small by zeros and few levels together: add 'quantize' to "
            "methods; for zeros alone use GradualPruning"
        )
    if (narrow or fast) and len({"channels", "ranks"} & {*chosen}) != 1:
        raise ValueError(
            "Compress: flops and latency need one of 'channels' and 'ranks' in methods, next to "
            f"those of a size; methods is {chosen}"
        )
    return chosen
