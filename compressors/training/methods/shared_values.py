"""Stages after which the weights of a tensor share few values: indexes, and a trained codebook."""

from typing import Any

import torch
from torch import Tensor, nn

from fitsmall.compressors.training.methods.centroids import move_, precision, sums
from fitsmall.compressors.training.sharding import gather, local, reduce_, shard
from fitsmall.compressors.training.stage import Stage

__all__ = ["ZERO", "SharedValues"]

# Weights of a whole tensor that are looked at together.
_BLOCK = 2**20

ZERO = -1
"""Index of a weight that is zero and in no cluster."""


class SharedValues(Stage):
    r"""A stage after which the non-zero weights of each tensor share few values.

    Between two choices the cluster ``a_i`` of every weight is fixed, and the value of a cluster
    with ``n_j`` members moves with their latents,

    .. math:: c_j = r_j + \frac{1}{n_j} \sum_{a_i = j} u_i,

    so that an SGD step moves it by the mean of its members' gradients. At a strength below 1
    weights move only a part of the way to their values.

    Attributes:
        clusterings: By name of the parameter: clusters and their values.
    """

    order = 1
    codebook_dtype: str
    """Float type that values are rounded to."""

    def reset(self) -> None:
        self.clusterings: dict[str, dict[str, Tensor]] = {}

    def has_choice(self, name: str) -> bool:
        return name in self.clusterings

    def share(
        self, name: str, index: Tensor, codebook: Tensor, weight: Tensor | None = None
    ) -> None:
        """Fix the clusters of a parameter until the next choice.

        Args:
            name: Name of the parameter.
            index: Cluster of each weight, of the whole parameter and flat; :data:`ZERO` for zeros.
            codebook: Value of each cluster.
            weight: Latents of the whole parameter, flat, if values begin at the codebook's; without
                them values are the means of their members, and only an empty cluster keeps its own.
        """
        dtype = precision(index.device)
        counts = torch.zeros(len(codebook), dtype=torch.int64, device=index.device)
        for block in index.split(_BLOCK):
            counts += torch.bincount(block.long() - ZERO, minlength=1 + len(codebook))[1:]
        if weight is None:
            rest = torch.where(counts > 0, 0, codebook).to(dtype)
        else:
            positions = (index != ZERO).nonzero().squeeze(1)
            members = index[positions].to(torch.uint8 if len(codebook) < 256 else torch.int16)
            totals = sums(weight[positions], positions[:0], members, len(codebook))
            rest = codebook.to(dtype) - totals / counts.clamp_min(1)
        self.clusterings[name] = {
            **self._layout(name, index),
            "rest": rest,
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
        if bool((flat != ZERO).all()):
            return {"positions": flat.new_empty(0, dtype=position), "index": flat.to(cluster)}
        positions = (flat != ZERO).nonzero().squeeze(1)
        return {"positions": positions.to(position), "index": flat[positions].to(cluster)}

    def _index(self, name: str) -> Tensor:
        """Return the whole index, in the shape of the weight."""
        parameter = self.parameters[name]
        positions, index = (self.clusterings[name][key] for key in ("positions", "index"))
        part = torch.full_like(local(parameter), ZERO, dtype=torch.int16).contiguous()
        flat = part.view(-1)
        if index.numel() == flat.numel():
            flat.copy_(index)
        else:
            flat[positions.long()] = index.to(flat.dtype)
        # Not every backend can send 16-bit integers.
        return gather(part.int(), parameter).short()
