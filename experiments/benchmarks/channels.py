"""Speed of a network without a part of its channels, against the whole one: in each engine, and in
training.

    python -m fitsmall.experiments.benchmarks.channels [--keep 0.5] [--model resnet18] [--batch 8]
    python -m fitsmall.experiments.benchmarks.channels --latency --engines torch openvino

Channels go by the magnitudes of the initial weights, within a fraction of the multiply-adds, with
widths rounded to several multiples: speed depends on shapes only. A step of training is a forward
and a backward pass and an update of SGD with momentum. See
:mod:`fitsmall.experiments.benchmarks.speed`.

With ``--latency`` the budget is a fraction of the latency in each engine, on two images, from three
seeds; what was reached is measured again afterwards.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich import print
from torch import Tensor, nn

from fitsmall.compressors.export.latency import forward_of, latency_ratio
from fitsmall.compressors.timing import interleaved
from fitsmall.compressors.training import ChannelPruning, Plan
from fitsmall.experiments.benchmarks.speed import TURN, multiply_adds, speed_table, times_as_fast
from fitsmall.experiments.models.networks import ResNet, ResNet18

__all__ = ["main"]

MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "resnet20": ResNet}


def narrowed(network: nn.Module, **settings: Any) -> nn.Module:
    """Return a copy of a network without channels, after two steps of training.

    Args:
        network: The network.
        settings: Budget and other settings of :class:`~fitsmall.callbacks.ChannelPruning`.
    """
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    stage = ChannelPruning(criterion="magnitude", stop_step=2, **settings)
    plan = Plan([stage], network)
    plan.hook([optimizer])
    plan.begin(horizon=2)
    for _ in range(2):
        plan.open()
        _loss(network, torch.randn(2, 3, 32, 32)).backward()
        plan.restore_(optimizer)
        optimizer.step()
        plan.advance()
    plan.finish()
    return network.eval()


def trainer_of(network: nn.Module, images: Tensor) -> Callable[[], object]:
    """Return a function that takes a step of training."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        _loss(network, images).backward()
        optimizer.step()

    return step


def _loss(network: nn.Module, images: Tensor) -> Tensor:
    labels = torch.arange(len(images)) % 10
    return nn.functional.cross_entropy(network(images), labels)


def meet_latency(model: str, keep: float, engines: Iterable[str], rounds: int) -> None:
    """Print the latency that networks reach, from three seeds."""
    images = torch.randn(2, 3, 32, 32)
    for engine in engines:
        for seed in range(3):
            torch.manual_seed(seed)
            dense = MODELS[model]().eval()
            small = narrowed(dense, keep_latency=keep, engine=engine)
            one, other = (forward_of(engine, own, [images], {}) for own in (small, dense))
            ratio = latency_ratio(one, other, rounds, TURN)
            left = multiply_adds(small, images) / multiply_adds(dense, images)
            print(
                f"{model}, {engine}, seed {seed}: {ratio.median:.3f} +- {ratio.spread:.3f} of the "
                f"time, asked for {keep:g}, with {left:.3f} of the multiply-adds"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the multiply-adds")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--engines", nargs="+", default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--latency", action="store_true", help="meet a target of latency")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.latency:
        meet_latency(options.model, options.keep, options.engines, options.rounds)
        return
    torch.manual_seed(0)
    dense, images = MODELS[options.model]().eval(), torch.randn(options.batch, 3, 32, 32)
    networks = {"dense": dense}
    for multiple in options.round_to:
        name = f"channels in multiples of {multiple}"
        networks[name] = narrowed(dense, keep_flops=options.keep, round_to=multiple)
    title = f"{options.model}, batch: {options.batch}, threads: {options.threads}"
    print(speed_table(title, networks, images, options.rounds, options.engines))
    steps = {name: trainer_of(own, images) for name, own in networks.items()}
    seconds = interleaved(steps, options.rounds, TURN)
    for name, network in networks.items():
        times = [1 / ratio for ratio in times_as_fast(seconds, name, "dense")]
        left = multiply_adds(network, images) / multiply_adds(dense, images)
        print(
            f"a step of training, {name}: {statistics.median(times):.3f} of the time "
            f"({min(times):.3f} to {max(times):.3f}), with {left:.3f} of the multiply-adds"
        )


if __name__ == "__main__":
    main()
