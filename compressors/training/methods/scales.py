"""Learned scales: the logarithms of quantizers' scales, trained by Adam next to the weights.

They are not parameters of the module, since DistributedDataParallel expects every parameter in the
graph, and not in a group of the user's optimizer, since that breaks learning-rate schedulers.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam

from fitsmall.compressors.surgery.quantizers import ActivationQuantizer
from fitsmall.compressors.training.sharding import processes

__all__ = ["INPUT_SUFFIX", "ScaleLearning"]

# Adam's learning rate for logarithms of scales: the fraction by which a scale moves in a step.
_LEARNING_RATE = 3e-3

# The key of the scale of a layer's input is the name of the layer's weight with this suffix.
INPUT_SUFFIX = ":input"


class ScaleLearning:
    """An optimizer of the scales of weights and of inputs: Adam on their logarithms.

    Attributes:
        log_scales: Logarithms of the scales of weights, by name.
        gradients: Gradients of these logarithms, staged for the next step.
    """

    def __init__(self) -> None:
        self.log_scales: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        # Adam's two averages and its count of steps.
        self._moments: dict[str, list[Tensor]] = {}

    def step(
        self,
        names: Collection[str],
        scales: Mapping[str, Tensor],
        quantizers: Mapping[str, ActivationQuantizer],
        learning_rate: float,
        loss_scale: float,
    ) -> list[str]:
        """Update all scales that have gradients.

        Args:
            names: Names of the parameters that the user's optimizer is about to update.
            scales: Scales of weights, at which their logarithms start.
            quantizers: Quantizers of inputs, by the names of the layers' weights.
            learning_rate: The optimizer's, as a fraction of the largest that its schedule has.
            loss_scale: Factor by which the gradients of inputs' scales are still scaled.

        Returns:
            Names of the weights whose scales changed.
        """
        moved = [name for name in self.gradients if name in names]
        for name in moved:
            self.log_scales.setdefault(name, scales[name].float().log())
        parameters = {name: self.log_scales[name] for name in moved}
        gradients = [self.gradients[name] for name in moved]
        for name, quantizer in quantizers.items():
            scale = quantizer.log_scale
            if scale.requires_grad:  # on every process, also on one that has not used the layer
                parameters[f"{name}{INPUT_SUFFIX}"] = scale.detach()
                gradient = torch.zeros_like(scale) if scale.grad is None else scale.grad
                gradients.append(gradient if loss_scale == 1.0 else gradient / loss_scale)
        _average_(gradients)
        if parameters:
            # A gradient scaler checks only the gradients of the user's optimizer.
            finite = [gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients]
            self._adam(parameters, finite, learning_rate)
        return moved

    def _adam(
        self, parameters: Mapping[str, Tensor], gradients: list[Tensor], learning_rate: float
    ) -> None:
        for key, parameter in parameters.items():
            if key not in self._moments:
                zeros = torch.zeros_like(parameter)
                self._moments[key] = [zeros, zeros.clone(), torch.zeros(())]
        first, second, count = zip(*(self._moments[key] for key in parameters), strict=True)
        with torch.no_grad():
            adam(
                list(parameters.values()),
                gradients,
                list(first),
                list(second),
                [],
                list(count),
                foreach=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=_LEARNING_RATE * learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def discard(self, names: Collection[str]) -> None:
        """Drop the staged gradients of these weights."""
        self.gradients = {name: g for name, g in self.gradients.items() if name not in names}

    def forget(self, name: str) -> None:
        """Forget the logarithms and moments of a weight's scales."""
        self.log_scales.pop(name, None)
        self._moments.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return logarithms of scales, and their moments."""
        return {"log_scales": self.log_scales, "moments": self._moments}

    def load_state_dict(
        self, state: Mapping[str, Any], device: Callable[[str], torch.device]
    ) -> None:
        """Take over the state that :meth:`state_dict` returned.

        Args:
            state: The state.
            device: Function from the key of a scale to its device.
        """
        self.gradients = {}
        self.log_scales = {name: log.to(device(name)) for name, log in state["log_scales"].items()}
        self._moments = {
            key: [first.to(device(key)), second.to(device(key)), count]
            for key, (first, second, count) in state["moments"].items()
        }


def _average_(gradients: list[Tensor]) -> None:
    """Average gradients over all processes, in place."""
    _, world = processes()
    if world == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
