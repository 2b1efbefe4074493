"""Speed of a network with factored layers, against the dense network, in each engine.

    python -m fitsmall.experiments.benchmarks.ranks [--keep 0.5] [--model resnet18] [--batch 8]

Ranks come from the singular values of the initial weights, in one form or in the cheaper of both,
within a fraction of the multiply-adds: speed depends on shapes only. See
:mod:`fitsmall.experiments.benchmarks.speed`.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from rich import print
from torch import nn

from fitsmall.compressors.choices.rank_choice import Options, Rank, ranks_within
from fitsmall.compressors.projections.lowrank import FORMS, Spectrum, matrix
from fitsmall.compressors.surgery.factorable import places, unit_costs
from fitsmall.compressors.surgery.factors import factorize
from fitsmall.experiments.benchmarks.speed import speed_table
from fitsmall.experiments.models.networks import ResNet, ResNet18

__all__ = ["main"]

MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": ResNet18, "resnet20": ResNet}


def choose_within(net: nn.Module, keep: float, among: Sequence[str]) -> dict[str, Rank]:
    """Choose ranks of a network's convolutions within a fraction of its multiply-adds.

    Args:
        net: The network.
        keep: The fraction.
        among: Forms to choose from, see :mod:`fitsmall.compressors.projections.lowrank`.
    """
    seen: dict[str, tuple[float, float]] = {}
    layers = {n: layer for n, layer in net.named_modules() if isinstance(layer, nn.Conv2d)}
    handles = [
        layer.register_forward_hook(
            lambda layer, x, y, name=name: seen.update({name: places(layer, x[0], y)})
        )
        for name, layer in layers.items()
    ]
    net(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    options, total = {}, 0.0
    for name, layer in layers.items():
        after, between = seen[name]
        units = unit_costs(layer, after, between)
        weight = layer.weight.detach()
        spectra = {form: Spectrum(matrix(weight, form)) for form in units if form in among}
        dense = after * layer.weight.numel()
        total += dense
        if spectra:
            options[f"{name}.weight"] = Options(spectra, units, dense)
    others = total - sum(mine.costs[0] for mine in options.values())
    return ranks_within(options, keep * total - others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of the multiply-adds")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense, images = MODELS[options.model]().eval(), torch.randn(options.batch, 3, 32, 32)
    networks = {"dense": dense}
    for name, among in (*((form, (form,)) for form in FORMS), ("cheaper of both", FORMS)):
        networks[name] = copy.deepcopy(dense)
        factorize(networks[name], choose_within(dense, options.keep, among))
    title = f"{options.model}, batch: {options.batch}, threads: {options.threads}"
    print(speed_table(title, networks, images, options.rounds))


if __name__ == "__main__":
    main()
