"""Pairs of criterion and allocation on four kinds of networks: which default is safe?

FITSMALL_DATA=... python -m fitsmall.experiments.benchmarks.defaults
    [--networks cnn ...] [--pairs magnitude/lamp ...] [--seeds 3] [--output FILE]

A CNN and a perceptron learn MNIST, a transformer and an LSTM the bytes of Python's standard
library, for 300 steps each, of which the first 210 prune gradually. The table shows the loss on
held-out training data, mean over seeds, as a multiple of the best pair's in the same cell. No test
data is used.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors.training import GradualPruning, Plan, Stage
from fitsmall.experiments.data.sources import mnist
from fitsmall.experiments.data.text import StandardLibrary
from fitsmall.experiments.models.networks import MLP, LeNet5

__all__ = ["NETWORKS", "PAIRS", "Batch", "Task", "main", "train"]

STEPS = 300
SPARSITIES = (0.5, 0.8, 0.9)
PAIRS = [
    *(("magnitude", allocation) for allocation in ("global", "uniform", "erk", "lamp")),
    *(("adam", allocation) for allocation in ("global", "lamp")),
    ("hessian", "global"),
    ("gradient", "global"),
]

Batch = tuple[Tensor, Tensor]


class LSTM(nn.Module):
    """A language model of bytes: embedding, recurrent layer and output."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, text: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(text))[0])
        return logits


class Transformer(nn.Module):
    """A language model of bytes from torch's own layers, with their usual initial values."""

    def __init__(self, width: int = 64, depth: int = 2, length: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width))
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        x = self.blocks(self.embedding(text) + self.position, mask, is_causal=True)
        logits: Tensor = self.head(x)
        return logits


class Task(NamedTuple):
    """A network and its data.

    Args:
        make: Function that makes the network.
        data: Function that loads training and held-out examples, inputs and targets of each.
        learning_rate: Of Adam.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], tuple[Batch, Batch]]
    learning_rate: float


def _images() -> tuple[Batch, Batch]:
    images, labels = mnist()[0]
    images = images.view(-1, 1, 28, 28).float() / 255
    return (images[:50_000], labels[:50_000]), (images[50_000:], labels[50_000:])


def _texts(length: int = 64, held_out: int = 400) -> tuple[Batch, Batch]:
    library = StandardLibrary()
    library.setup("fit")
    splits = []
    for text, most in ((library.parts["train"], None), (library.parts["val"], held_out)):
        rows = text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1).long()[:most]
        splits.append((rows[:, :-1], rows[:, 1:]))
    return splits[0], splits[1]


NETWORKS = {
    "cnn": Task(LeNet5, _images, 1e-3),
    "perceptron": Task(lambda: MLP([784, 300, 100, 10]), _images, 1e-3),
    "transformer": Task(Transformer, _texts, 2e-3),
    "lstm": Task(LSTM, _texts, 5e-3),
}


def _batches(inputs: Tensor, targets: Tensor, size: int) -> Iterator[Batch]:
    while True:
        for rows in torch.randperm(len(inputs)).split(size):
            if len(rows) == size:
                yield inputs[rows], targets[rows]


def _loss(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(net(inputs).flatten(0, -2), targets.flatten())


def train(
    task: Task, data: tuple[Batch, Batch], seed: int, stages: Sequence[Stage]
) -> tuple[nn.Module, float]:
    """Train with these stages, and return the network and its held-out loss in nats."""
    torch.manual_seed(seed)
    net = task.make()
    (inputs, targets), held_out = data
    optimizer = torch.optim.Adam(net.parameters(), lr=task.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    plan = Plan(stages, net)
    plan.hook([optimizer])
    plan.begin(STEPS)
    batches = _batches(inputs, targets, 64 if inputs.dim() == 4 else 16)
    for _, batch in zip(range(STEPS), batches, strict=False):
        plan.open()
        optimizer.zero_grad()
        _loss(net, *batch).backward()
        plan.restore_(optimizer)
        optimizer.step()
        schedule.step()
        plan.advance()
    plan.finish()
    net.eval()
    with torch.no_grad():
        losses = [
            _loss(net, x, y) for x, y in zip(*(part.split(200) for part in held_out), strict=True)
        ]
    return net, float(torch.stack(losses).mean())


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Return losses as multiples of the best in each cell, with the spread over seeds."""
    pairs = list(dict.fromkeys(r["pair"] for r in results if r["pair"] != "dense"))
    cells = list(dict.fromkeys((r["network"], r["sparsity"]) for r in results if r["sparsity"]))

    def losses(network: str, sparsity: float, pair: str) -> list[float]:
        key = (network, sparsity, pair)
        return [r["loss"] for r in results if (r["network"], r["sparsity"], r["pair"]) == key]

    shown = Table("network", "zeros", "dense", "best", *pairs, "spread")
    worst = dict.fromkeys(pairs, 0.0)
    for network, sparsity in cells:
        means = {p: mean(found) for p in pairs if (found := losses(network, sparsity, p))}
        best = min(means.values())
        ratios = {p: means[p] / best if p in means else math.nan for p in pairs}
        worst = {p: max(worst[p], ratios[p]) for p in pairs}
        spreads = [stdev(found) for p in means if len(found := losses(network, sparsity, p)) > 1]
        dense = losses(network, 0.0, "dense")
        shown.add_row(
            network,
            f"{sparsity:g}",
            f"{mean(dense):.4f}" if dense else "",
            f"{best:.4f}",
            *(f"{ratios[p]:.3f}" for p in pairs),
            f"{mean(spreads) / best:.3f}" if spreads else "",
        )
    shown.add_row("worst", "", "", "", *(f"{worst[p]:.3f}" for p in pairs), "")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--pairs", nargs="+", default=["/".join(pair) for pair in PAIRS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--output", type=Path, help="file that results are added to, and kept in")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    if options.output and options.output.exists():
        results = [json.loads(line) for line in options.output.read_text().splitlines()]
    done = {(r["network"], r["seed"], r["sparsity"], r["pair"]) for r in results}
    for network in options.networks:
        task = NETWORKS[network]
        data = task.data()
        jobs = [(0.0, "dense"), *((s, pair) for s in options.sparsities for pair in options.pairs)]
        for seed in range(options.seeds):
            for sparsity, pair in jobs:
                if (network, seed, sparsity, pair) in done:
                    continue
                start = time.perf_counter()
                criterion, _, allocation = pair.partition("/")
                stages = []
                if allocation:
                    stages = [GradualPruning(sparsity, criterion, allocation, every=10)]
                _, loss = train(task, data, seed, stages)
                cell = {"network": network, "seed": seed, "sparsity": sparsity, "pair": pair}
                found = {**cell, "loss": loss}
                results.append(found)
                print(f"{found} {time.perf_counter() - start:.0f} s", flush=True)
                if options.output:
                    with options.output.open("a") as file:
                        file.write(json.dumps(found) + "\n")
    Console(width=180).print(table(results))


if __name__ == "__main__":
    main()
