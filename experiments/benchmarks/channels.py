"""Speed of a network without a part of its channels, against the whole one: in each engine, and in
training.

    python -m fitsmall.experiments.benchmarks.channels [--keep 0.5] [--model resnet18] [--batch 8]

Channels go by the magnitudes of the initial weights, within a fraction of the multiply-adds, with
widths rounded to several multiples: speed depends on shapes only. A step of training is a forward
and a backward pass and an update of SGD with momentum. See
:mod:`fitsmall.experiments.benchmarks.speed`.
"""

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from rich import print
from torch import Tensor, nn

from fitsmall.compressors.training import ChannelPruning, Plan
from fitsmall.experiments.benchmarks.speed import Turns, multiply_adds, speed_table
from fitsmall.experiments.models.networks import ResNet, ResNet18

__all__ = ["main"]

MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "resnet20": ResNet}


def narrowed(network: nn.Module, keep: float, round_to: int) -> nn.Module:
    """Return a copy of a network without channels, after two steps of training.

    Args:
        network: The network.
        keep: Fraction of the multiply-adds that is left.
        round_to: Widths become multiples of this number.
    """
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    stage = ChannelPruning(keep_flops=keep, criterion="magnitude", round_to=round_to, stop_step=2)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the multiply-adds")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--engines", nargs="+", default=["eager", "onnxruntime", "OpenVINO"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense, images = MODELS[options.model]().eval(), torch.randn(options.batch, 3, 32, 32)
    networks = {"dense": dense}
    for multiple in options.round_to:
        name = f"channels in multiples of {multiple}"
        networks[name] = narrowed(dense, options.keep, multiple)
    title = f"{options.model}, batch: {options.batch}, threads: {options.threads}"
    print(speed_table(title, networks, images, options.threads, options.rounds, options.engines))
    turns = Turns({n: trainer_of(own, images) for n, own in networks.items()}, options.rounds)
    for name, network in networks.items():
        times = [1 / ratio for ratio in turns.faster(name, "dense")]
        left = multiply_adds(network, images) / multiply_adds(dense, images)
        print(
            f"a step of training, {name}: {statistics.median(times):.3f} of the time "
            f"({min(times):.3f} to {max(times):.3f}), with {left:.3f} of the multiply-adds"
        )


if __name__ == "__main__":
    main()
