"""Half of the units of all kinds of networks leave, and what is left is checked.

    pip install -e '.[zoo]'
    python -m fitsmall.experiments.benchmarks.units [--networks NAME ...] [--zoo]

Of each network, which has random weights: the groups of units that can be removed, the share of
parameters that goes with every second unit of each of them, the groups that are refused, the
seconds to find all this, and the largest difference between the outputs of the smaller network and
those of the one with zeros, as a fraction of the largest output, in float64 where its kernels can.
Vectors that are constant at first, as those of norms and biases, are random for this comparison: a
factor of zero would hide mistakes. Then a step of AdamW, the cut, and another step: *alive* is the
share of parameters that the optimizer holds with gradients and moments of their own shape.
``--zoo`` does the same with all networks of the zoo; those that cannot be traced are named.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich import print
from rich.table import Table
from torch import Tensor, nn

from fitsmall.compressors.torch_internals import map_tensors, tensors_in
from fitsmall.compressors.units import Cut, find_cut, removable
from fitsmall.compressors.units.removal import awake, largest_difference, masked
from fitsmall.compressors.units.tracer import seeded_outputs
from fitsmall.compressors.weights import twin_of
from fitsmall.experiments.models.networks import VGG, ResNet, ResNet18
from fitsmall.experiments.zoo.networks import NETWORKS, Entry, hugging_face, timm_network, tokens

__all__ = ["KINDS", "Result", "difference", "main", "run"]


class Generator(nn.Module):
    """A generator of images by transposed convolutions (DCGAN)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(8, 4 * width * 16)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        images: Tensor = self.layers(self.first(x).unflatten(1, (-1, 4, 4)))
        return images


def _images() -> Mapping[str, Any]:
    return {"images": torch.randn(4, 3, 32, 32)}


def _timm(name: str, size: int, **settings: Any) -> Entry:
    return Entry(name, timm_network(name, **settings), lambda: {"x": torch.randn(4, 3, size, size)})


def _llama() -> Entry:
    settings: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return Entry("Llama", hugging_face("LlamaForCausalLM", **settings), tokens())


KINDS: dict[str, Entry] = {
    "ResNet-20 (padded shortcuts)": Entry("", ResNet, _images),
    "ResNet-18 (convolutions)": Entry("", lambda: ResNet18(16), _images),
    "VGG": Entry("", lambda: VGG(32), _images),
    "DenseNet-121": _timm("densenet121", 64),
    "MobileNetV2": _timm("mobilenetv2_035", 64),
    "EfficientNet": NETWORKS["test_efficientnet"],
    "U-Net": NETWORKS["UNet"],
    "ViT": NETWORKS["test_vit"],
    "BERT": NETWORKS["BertForSequenceClassification"],
    "GPT-2": NETWORKS["GPT2LMHeadModel"],
    "Llama (shared keys, tied)": _llama(),
    "T5": NETWORKS["T5ForConditionalGeneration"],
    "LSTM": NETWORKS["LSTM"],
    "MLP-Mixer": _timm("mixer_s16_224", 64, img_size=64),
    "ConvNeXt": NETWORKS["test_convnext"],
    "Swin": NETWORKS["swin_tiny_patch4_window7_224"],
    "GAN generator": Entry("", Generator, lambda: {"x": torch.randn(4, 8)}),
    "RegNet": NETWORKS["regnetx_002"],
    "GRU": NETWORKS["GRU"],
    "weight norm": NETWORKS["WeightNormed"],
}


class Result(NamedTuple):
    """The outcome of the removal from a network.

    Args:
        groups: Number of groups that can be removed.
        refused: Groups that cannot be, and why.
        removed: Share of parameters that went.
        seconds: To find the groups.
        difference: Largest relative difference of outputs.
        alive: Share of parameters that are trained after the cut.
    """

    groups: int
    refused: Mapping[str, str]
    removed: float
    seconds: float
    difference: float
    alive: float


def run(entry: Entry) -> Result:
    """Remove every second unit of a network in the middle of its training."""
    torch.manual_seed(0)
    module, batch = entry.make(), dict(entry.batch())
    start = time.perf_counter()
    units = removable(module, kwargs=batch)
    seconds = time.perf_counter() - start
    cut = find_cut(module, [unit for group in units.groups for unit in group[1::2]], (), batch)
    apart = difference(module, cut, batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    _step(module, optimizer, batch)
    parameters = [*module.parameters()]
    before = sum(parameter.numel() for parameter in parameters)
    trained = [parameter.grad is not None for parameter in parameters]
    cut.apply(module, [optimizer])
    _step(module, optimizer, batch)
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    alive = [
        id(now) in held and now is parameter and _has_own_moments(now, optimizer)
        for parameter, now, needed in zip(parameters, module.parameters(), trained, strict=True)
        if needed
    ]
    after = sum(parameter.numel() for parameter in module.parameters())
    share = sum(alive) / len(alive)
    return Result(len(units.groups), units.refused, 1 - after / before, seconds, apart, share)


def difference(module: nn.Module, cut: Cut, batch: Mapping[str, Any]) -> float:
    """Return how far a network without units is from the one with zeros in their place.

    Args:
        module: The network.
        cut: The cut that removes the units.
        batch: Named arguments of its forward pass.
    """
    try:
        return _difference(awake(module).double(), cut, map_tensors(_double, dict(batch)))
    except RuntimeError:  # kernels of experts have no float64
        return _difference(awake(module), cut, batch)


def _difference(whole: nn.Module, cut: Cut, batch: Mapping[str, Any]) -> float:
    small = twin_of(whole)
    cut.apply(small)
    expected, found = (seeded_outputs(each, (), batch) for each in (masked(whole, cut.kept), small))
    return largest_difference(expected, found)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> None:
    module.train()
    optimizer.zero_grad()
    outputs: Any = module(**batch)
    found = tensors_in(dict(outputs) if hasattr(outputs, "keys") else outputs)
    losses = [output.float().square().mean() for output in found if output.requires_grad]
    torch.stack(losses).sum().backward()
    optimizer.step()


def _has_own_moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    moments = [optimizer.state[parameter].get(name) for name in ("exp_avg", "exp_avg_sq")]
    tensors = [parameter.grad, *moments]
    return all(each is not None and each.shape == parameter.shape for each in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", help="names of networks, by default all")
    parser.add_argument("--zoo", action="store_true", help="all networks of the zoo")
    options = parser.parse_args()
    among = NETWORKS if options.zoo else KINDS
    names: Sequence[str] = options.networks or [*among]
    table = Table(show_edge=False)
    for column in ("network", "groups", "refused", "removed", "s", "difference", "alive"):
        table.add_column(column, justify="left" if column == "network" else "right")
    reasons, good = [], 0
    for name in names:
        try:
            result = run(among[name])
        except ValueError as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        good += result.difference <= 1e-5 and result.alive == 1
        reasons += [f"{name}, {group}: {why}" for group, why in result.refused.items()]
        table.add_row(
            name,
            str(result.groups),
            str(len(result.refused)),
            f"{result.removed:.0%}",
            f"{result.seconds:.1f}",
            f"{result.difference:.0e}",
            f"{result.alive:.0%}",
        )
    print(table)
    print(f"\n{good} of {len(names)} are the network with zeros, and train on whole.\n")
    print(*reasons, sep="\n")


if __name__ == "__main__":
    main()
