"""A target for the size of the file: is it met, and what does it cost?

FITSMALL_DATA=... python -m fitsmall.experiments.benchmarks.targets
    [--networks cnn ...] [--ratios 5 10 20 40 80] [--seeds 3]

The four networks of the benchmark ``defaults`` train for 300 steps with ``SizeTarget``. The table
shows how far the file, really coded, is below its target, and the loss on held-out training data,
as a multiple of the dense network's. No test data is used.
"""

import argparse
from collections.abc import Sequence
from statistics import mean

from rich.console import Console
from rich.table import Table

from fitsmall.compressors.file.writer import coded_size
from fitsmall.compressors.training import SizeTarget
from fitsmall.experiments.benchmarks.defaults import NETWORKS, train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[5, 10, 20, 40, 80])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    shown = Table("network", "times smaller", "target, bytes", "below it, %", "loss / dense")
    for network in options.networks:
        task = NETWORKS[network]
        data = task.data()
        seeds = range(options.seeds)
        dense = [train(task, data, seed, [])[1] for seed in seeds]
        for ratio in options.ratios:
            below, losses, target = [], [], 0
            for seed in seeds:
                stage = SizeTarget(1 / ratio)
                net, loss = train(task, data, seed, [stage])
                target = stage.target
                below.append(1 - coded_size(net.state_dict()) / target)
                losses.append(loss / dense[seed])
            row = f"{100 * min(below):.2f} to {100 * max(below):.2f}", f"{mean(losses):.3f}"
            shown.add_row(network, f"{ratio:g}", f"{target:,}", *row)
            print(network, ratio, *row, flush=True)
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
