"""Time and memory of choosing ranks, against the training that it is part of.

    python -m fitsmall.experiments.benchmarks.choices [--model cnn] [--steps 500]

One process trains a network with ranks, and clocks in it what choosing costs: observing gradients
and all choices. A *step* is the median of all else in a step of the window. Times are of the
processor. Statistics are what a checkpoint would keep of gradients, over the bytes of all weights
and their gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich import print
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors.training import Plan, RankLearning
from fitsmall.experiments.models.networks import ResNet18

__all__ = ["main"]


class Language(nn.Module):
    """A small language model with a vocabulary of 32,000."""

    def __init__(self, vocabulary: int = 32_000, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)))
        return logits


def cnn() -> nn.Module:
    """A network of 0.3 million weights, for images of 32 x 32."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))


# Network, inputs, and labels, of a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "cnn": (cnn, lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))),
    "resnet18": (ResNet18, lambda: (torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))),
    "language": (
        Language,
        lambda: (torch.randint(32_000, (4, 64)), torch.randint(32_000, (256,))),
    ),
}


class Clocked(RankLearning):
    """Rank learning that clocks its own parts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.observing, self.choosing = 0.0, [0.0]

    def observe(self, *arguments: Any) -> None:
        before = time.process_time()
        super().observe(*arguments)
        self.observing += time.process_time() - before

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        before = time.process_time()
        super().choose(weights, strength)
        self.choosing.append(time.process_time() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="cnn")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--most", type=int, help="end after as many steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, batch = MODELS[options.model]
    net, stage = make(), Clocked(keep_flops=0.5)
    size = 2 * sum(parameter.nbytes for parameter in net.parameters())
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    plan = Plan([stage], net)
    plan.hook([optimizer])
    plan.begin(options.steps)
    steps: list[float] = []
    own = kept = 0.0
    start = time.process_time()
    for _ in range(options.most or options.steps):
        before = time.process_time()
        plan.open()
        inputs, labels = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs).flatten(0, -2), labels).backward()
        plan.restore_(optimizer)
        optimizer.step()
        if not stage.done:
            kept = max(kept, sum(_bytes(grams) for grams in stage.grams.values()))
        plan.advance()
        spent = stage.observing + sum(stage.choosing)
        steps.append(time.process_time() - before - (spent - own))
        own = spent
    total, step = time.process_time() - start, statistics.median(steps)
    table = Table("", "", title=f"{options.model}, {len(steps)} of {options.steps} steps")
    table.add_row("a step", f"{1000 * step:.0f} ms")
    table.add_row("longest choice", f"{max(stage.choosing) / step:.1f} steps")
    table.add_row("choices", f"{len(stage.choosing) - 1}")
    table.add_row("all choices", f"{sum(stage.choosing):.1f} s")
    table.add_row("observing gradients", f"{stage.observing:.1f} s")
    table.add_row("all of it / all else", f"{own / (total - own):.3f}")
    table.add_row("statistics / weights and gradients", f"{kept / size:.3f}")
    print(table)


def _bytes(grams: Any) -> int:
    return int(grams.outputs.nbytes + grams.inputs.nbytes)


if __name__ == "__main__":
    main()
