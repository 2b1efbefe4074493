"""Weight sharing: few distinct values per tensor, trained by their gradients."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.schedules import LinearRamp, Schedule
from fitsmall.compressors.projections.cluster import KMeans, assign, linear
from fitsmall.compressors.training.methods.shared_values import ZERO, SharedValues
from fitsmall.compressors.training.stage import Stage

__all__ = ["WeightSharing"]

# Weights assigned to clusters at a time.
_BLOCK = 2**20


class WeightSharing(SharedValues):
    r"""Let the non-zero weights of each tensor share ``k`` values, trained by their gradients.

    Deep Compression's trained quantization (Han et al., 2016). Every weight keeps a latent value
    ``u_i``, the forward pass sees its centroid ``c_{a_i}``, and the centroid is the mean of its
    cluster's latents. An SGD step of the latents therefore moves a centroid by the *mean* of its
    members' gradients. The paper moves it by their *sum*, the gradient of a parameter that stands
    in many places: that scales with the cluster's size, needs a learning rate of its own, and
    enlarges the gradient norm that clipping sees. The mean keeps the optimizer, its learning rate
    and clipping as they are.

    Weights move to their centroids gradually, ``w = u + s (c - u)`` with the strength ``s`` on the
    schedule, full at the end of the window; ``schedule=OneShot()`` clusters at once, as the paper
    does; a LeNet-300-100 on MNIST recovers from that as well. Every ``every`` steps of the window
    the latents are assigned again. Zeros stay zero and are no cluster, so pruning comes first.
    First and last layers share too, as in the paper, which uses 32 to 256 clusters;
    ``overrides={"conv1": 64}`` gives a layer its own number.

    Args:
        clusters: Number ``k`` of distinct non-zero values per tensor; it need not be a power of
            two, since the file codes indexes with fractions of bits.
        init: ``"linear"``: the first centroids are evenly spaced over the weights' range, the
            paper's choice, which is good for the few large weights; later assignments start from
            the trained centroids. ``"optimal"``: exact k-means of the latents at every assignment.
        codebook_dtype: Float type that centroids are rounded to, as in
            :class:`~fitsmall.compressors.KMeans`.
        schedule: Strength as a function of progress through the window.
        start: Fraction of training after which sharing begins.
        stop: Fraction of training after which weights equal their centroids and assignments stay
            fixed, while centroids go on training.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between assignments; by default the window has 100.
        include: Patterns of parameter names that replace the default, all weights: see
            :func:`~fitsmall.compressors.select`. ``include="*.bias"`` in a second instance shares
            the biases too.
        exclude: Patterns of parameter names to leave out.
        overrides: Numbers of clusters by pattern of parameter names.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import GradualPruning, Plan
        >>> net = nn.Sequential(nn.Linear(20, 10))
        >>> print(Plan([GradualPruning(0.9), WeightSharing(8)], net, horizon=1000))
        Compression plan of 210 parameters
          GradualPruning: sparsity 0.9 (global gradient), hard, steps 0 to 700
            acts on 95.2 %:
              0.weight  200  95.2 %
          WeightSharing: 8 clusters (linear start), straight-through, steps 700 to 850
            acts on 95.2 %: as GradualPruning
          left out (a bias or a norm): 0.bias; 4.8 %, 40 bytes
    """

    followed = frozenset({"schedule", "every"})

    def __init__(
        self,
        clusters: int = 16,
        init: Literal["linear", "optimal"] = "linear",
        codebook_dtype: str = "float32",
        schedule: Schedule | None = None,
        start: float = 0.7,
        stop: float = 0.85,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        if init not in ("linear", "optimal"):
            raise ValueError(f"WeightSharing: unknown init {init!r}, choose linear or optimal")
        self.clusters, self.init, self.codebook_dtype = clusters, init, codebook_dtype
        self.schedule = self._schedule(schedule, LinearRamp())
        self.overrides = self._overrides(overrides)
        for count in (clusters, *self.overrides.values()):
            KMeans(count, codebook_dtype)  # checks both
        self.reset()

    def describe(self) -> str:
        own = f", {len(self.overrides)} overrides" if self.overrides else ""
        return f"{self.clusters} clusters ({self.init} start{own})"

    def strength(self, progress: float) -> float:
        return self.schedule(progress)

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        chosen = self.selection.chosen
        own = self.selection.match(self.overrides)
        self._counts = dict.fromkeys(chosen, self.clusters) | own
        self.selection = self.selection.without(
            {
                name: f"{parameter.numel()} weights are too few for {self._counts[name]} clusters"
                for name, parameter in chosen.items()
                if parameter.numel() <= self._counts[name]
            }
        )

    def check(self, others: Sequence[Stage]) -> None:
        for name in self.selection.chosen.keys() - self.projected_before:
            if self._counts[name] == 1:
                raise ValueError(
                    f"WeightSharing: with one cluster all weights of {name} would be equal, and "
                    "its layer useless: give it 2 clusters or more, or prune it before"
                )

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        for name in weights:
            flat = weights[name].flatten()
            blocks = flat.split(_BLOCK)
            kmeans = KMeans(self._counts[name], self.codebook_dtype)
            if self.init == "optimal":
                codebook = kmeans.centroids(flat[flat != 0])
            elif name in self.clusterings:
                codebook = self.clusterings[name]["codebook"].sort().values
            else:
                kept = (block[block != 0] for block in blocks)
                bounds = [bound for block in kept if block.numel() for bound in block.aminmax()]
                codebook = linear(torch.stack(bounds), kmeans.clusters) if bounds else flat[:0]
            index = flat.new_empty(flat.shape, dtype=torch.int16)
            for block, clusters in zip(blocks, index.split(_BLOCK), strict=True):
                clusters.copy_(assign(block, codebook).masked_fill_(block == 0, ZERO))
            self.share(name, index, codebook)
