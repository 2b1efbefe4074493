"""Weight sharing: few distinct values per tensor, trained by their gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fitsmall.compressors.choices.schedules import LinearRamp, Schedule
from fitsmall.compressors.projections.cluster import KMeans, assign, linear
from fitsmall.compressors.training.methods.centroids import move_, precision, sums
from fitsmall.compressors.training.sharding import gather, local, reduce_, shard
from fitsmall.compressors.training.stage import Stage

__all__ = ["WeightSharing"]

# Index of a weight that is zero and in no cluster.
_ZERO = -1
# Weights assigned to clusters at a time.
_BLOCK = 2**20


class WeightSharing(Stage):
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

    order = 1
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
        self.clusterings: dict[str, dict[str, Tensor]] = {}

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

    def reset(self) -> None:
        self.clusterings = {}

    def has_choice(self, name: str) -> bool:
        return name in self.clusterings

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
            counts = flat.new_zeros(codebook.shape, dtype=torch.int64)
            for block, clusters in zip(blocks, index.split(_BLOCK), strict=True):
                nearest = assign(block, codebook).masked_fill_(block == 0, _ZERO)
                counts += torch.bincount(nearest - _ZERO, minlength=1 + len(codebook))[1:]
                clusters.copy_(nearest)
            dtype = precision(flat.device)
            self.clusterings[name] = {
                **self._layout(name, index),
                # The centroid of an empty cluster stays where it is: its mean is rest / 1.
                "rest": torch.where(counts > 0, 0, codebook).to(dtype),
                "counts": counts.clamp_min(1).to(dtype),
                "codebook": codebook,
            }

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if name in self.clusterings:
            self.clusterings[name]["codebook"] = self._project_(name, weight, strength)

    def project_average_(self, name: str, average: Tensor, strength: float) -> None:
        self._project_(name, average, strength)

    def choices(self) -> dict[str, Any]:
        clusterings = {
            name: {
                "index": self._index(name),
                **{key: clustering[key] for key in ("rest", "counts", "codebook")},
            }
            for name, clustering in self.clusterings.items()
        }
        return {"clusterings": clusterings}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        self.clusterings = {}
        for name, saved in choices["clusterings"].items():
            device = module.get_parameter(name).device
            clustering = {key: tensor.to(device) for key, tensor in saved.items()}
            self.clusterings[name] = clustering | self._layout(name, clustering["index"])

    def _project_(self, name: str, weight: Tensor, strength: float) -> Tensor:
        """Move weights towards the means of their clusters, and return these means."""
        clustering = self.clusterings[name]
        positions, index = clustering["positions"], clustering["index"]
        flat = weight.contiguous().view(-1)
        totals = sums(flat, positions, index, len(clustering["counts"]))
        totals = reduce_(totals, self.selection.chosen[name])
        means = torch.addcdiv(clustering["rest"], totals, clustering["counts"])
        codebook = means.to(getattr(torch, self.codebook_dtype)).to(weight.dtype)
        move_(flat, positions, index, codebook, strength)
        if not weight.is_contiguous():
            weight.copy_(flat.view_as(weight))
        return codebook

    def _layout(self, name: str, index: Tensor) -> dict[str, Tensor]:
        """Return this process's part of a whole index.

        Returns:
            ``positions`` of the weights that are in a cluster, empty if all are; and ``index``, the
            cluster of each of them.
        """
        parameter = self.parameters[name]
        part = shard(index.view(parameter.shape), parameter)
        flat = part.flatten()
        cluster = torch.uint8 if int(index.max()) < 256 else torch.int16
        position = torch.int32 if flat.numel() < 2**31 else torch.int64
        if bool((flat != _ZERO).all()):
            return {"positions": flat.new_empty(0, dtype=position), "index": flat.to(cluster)}
        positions = (flat != _ZERO).nonzero().squeeze(1)
        return {"positions": positions.to(position), "index": flat[positions].to(cluster)}

    def _index(self, name: str) -> Tensor:
        """Return the whole index, in the shape of the weight."""
        parameter = self.parameters[name]
        positions, index = (self.clusterings[name][key] for key in ("positions", "index"))
        part = torch.full_like(local(parameter), _ZERO, dtype=torch.int16).contiguous()
        flat = part.view(-1)
        if index.numel() == flat.numel():
            flat.copy_(index)
        else:
            flat[positions.long()] = index.to(flat.dtype)
        # Not every backend can send 16-bit integers.
        return gather(part.int(), parameter).short()
