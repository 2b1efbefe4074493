"""A target for the size of the file: zeros, levels and bits of all tensors at one price."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fitsmall.compressors.choices.clusterings import clusterings_table, decoded
from fitsmall.compressors.choices.entropy_constrained import Clustering, cluster, price_within
from fitsmall.compressors.codes.code import matrix_shape
from fitsmall.compressors.codes.dtypes import INTEGERS
from fitsmall.compressors.file.schema import CODER_NAMES
from fitsmall.compressors.file.sizes import bytes_of, dense_bytes
from fitsmall.compressors.naming import abridged, grouped, lookup
from fitsmall.compressors.training.messages import inform, warn
from fitsmall.compressors.training.methods.centroids import move_, nearest
from fitsmall.compressors.training.methods.file_of import FileOf, rounded
from fitsmall.compressors.training.methods.shared_values import ZERO, SharedValues
from fitsmall.compressors.training.sharding import local
from fitsmall.compressors.training.statistics import Statistics
from fitsmall.compressors.weights import is_statistic

__all__ = ["SizeTarget"]

# Attributes that a checkpoint saves, in addition to clusters and statistics.
_STATE = ("price", "ratio", "measure_at", "bytes", "dense", "aim")

# Part of the window in which the price rises; in the rest weights move to their levels.
_TIGHTENING = 0.65
# Without zeros: choices while weights move to their levels, for each one before.
_OFTENER = 4
# Where the size has no schedule, it is at least so many times what is not compressed.
_NEAREST = 1.1
# How far weights are on their way to their levels where the size has no schedule.
_FOLLOWING = 0.9
# Bits of a weight that the file may take when the window begins.
_FIRST_BITS = 8.0
# Part of the mean curvature of a tensor that is added to that of each of its weights.
_DAMPING = 1.0
# Weights of a tensor among which a price is searched.
_SAMPLE = 2**16
# Strength between two measurements of the file.
_BETWEEN = 0.05
# Part of the target that the file may leave, and the number of prices that are tried for it.
_TOLERANCE, _TRIES = 0.007, 16
# Part of it that the other coders leave: values train on, levels meet, and tables grow.
_SPARE = 0.01


class SizeTarget(SharedValues):
    r"""Train a network whose compressed file has a given size.

    Each weight becomes one of the few levels of its tensor, zero among them. A single price
    :math:`\lambda` of a bit decides for all tensors together which weights are zero, and how many
    levels a tensor has:

    .. math:: \min \sum_i \tfrac12 F_i (w_i - c_{a_i})^2 + \lambda\, \mathrm{bits}_i(a_i),
              \qquad F_i = \sqrt{\mathrm{E}[g_i^2]} + \overline{\sqrt{\mathrm{E}[g^2]}},

    with the curvature that Adam assumes, damped by its mean over the tensor
    (:mod:`~fitsmall.compressors.choices.entropy_constrained`). The price follows a budget of bytes
    that falls to the target within the first 65 % of the window, steeply at first:
    ``size + (8 bits a weight - size) (1 - t)^3``. Zeros are zero at once, and hardly
    ever return. In the rest of the window the others move to their levels, ``w = u + s (c - u)``
    with ``s`` from 0 to 1. At its end the price is corrected until the file, really coded, takes
    99.3 to 100 % of the target; after that only the values of the levels are trained.

    Biases and norms are weights as all others. Running statistics of batch-norms are rounded to
    bfloat16 after the window. What else no optimizer trains stays as it is and counts.

    Args:
        size: Of the file: a fraction of the bytes of the module's state dict, such as ``1/20``; or
            text with a unit, such as ``"40 KB"`` (40,000 bytes) or ``"40 KiB"``. With None
            :attr:`aim` is followed, which somebody else moves, and the last choice before the end
            of the window stays.
        start: Fraction of training after which compression begins.
        stop: Fraction of training after which every weight has its level.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices.
        include: Patterns of parameter names: see :func:`~fitsmall.compressors.select`.
        exclude: Patterns of parameter names to leave out.
        coder: Coder of the file, see :func:`~fitsmall.compressors.save`.
        zeros: Whether weights may become zero.

    Attributes:
        aim: Bytes that the next choice may take, where there is no ``size``.
        price: Loss that a bit was worth at the last choice.
        bytes: Estimated size of the file at the last choice; at the end of the window its real one.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> print(Plan([SizeTarget(1 / 10)], nn.Linear(20, 10), horizon=1000))
        Compression plan of 210 parameters
          SizeTarget: a file of at most 84 bytes, of 840, straight-through, steps 50 to 850
            acts on 100.0 %:
              weight  200  95.2 %
              bias     10   4.8 %
    """

    num_updates = 60
    codebook_dtype = "bfloat16"
    followed = frozenset({"size", "every", "zeros"})

    def __init__(
        self,
        size: float | str | None,
        start: float = 0.05,
        stop: float = 0.85,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        include: str | Sequence[str] | None = "*",
        exclude: str | Sequence[str] = (),
        coder: str = "context",
        zeros: bool = True,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        self.zeros = zeros
        self.size, self.coder = size, lookup("coder", coder, {name: name for name in CODER_NAMES})
        if size is not None:
            bytes_of(size, 1, "SizeTarget")  # checks it
        self.statistics = Statistics(("squared_gradient",))
        self.file = FileOf(nn.Module(), self.coder)
        self.masks: dict[str, Tensor] = {}
        self.price: float | None = None
        self.ratio, self.measure_at, self.bytes, self.dense, self.aim = 1.0, 0.0, 0, 0, 0
        self.reset()

    def describe(self) -> str:
        most = "as few bytes as possible" if self.size is None else f"at most {self.target:,} bytes"
        return f"a file of {most}, of {self.dense:,}"

    def metrics(self) -> dict[str, float]:
        if not self.price or not self.bytes:
            return {}
        # Of the file that the chosen levels would make, whether weights have reached them or not.
        sizes = {"bytes": float(self.bytes), "ratio": self.dense / self.bytes}
        return {"price": self.price, "target_bytes": float(self.target), **sizes}

    @property
    def target(self) -> int:
        """Most bytes of the file."""
        return self.aim if self.size is None else bytes_of(self.size, self.dense, "SizeTarget")

    def strength(self, progress: float) -> float:
        return progress

    @property
    def steps_between(self) -> int:
        steps, (first, last) = super().steps_between, self.window
        following = self.clock.now >= first + _TIGHTENING * (last - first)
        if following and not self.zeros and self.every is None:
            return max(1, steps // _OFTENER)
        return steps

    # Selection, statistics.

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self.file = FileOf(module, self.coder)
        if not self.dense and not self.file.is_lazy:
            self.dense = dense_bytes(module)
        self.statistics.attach(module, self.selection, self.parameters)

    def begin(self, horizon: float) -> None:
        self.statistics.begin()
        if self.chosen_at is not None or self.size is None:
            return
        self.file.left_out = set(self.selection.waiting.values())
        least = self.file.least(self._zeros(self.selection.chosen))
        if least >= self.target:
            raise ValueError(
                f"SizeTarget: a file of {self.target:,} bytes cannot be reached: with every "
                f"selected weight at zero it takes {least:,}; ask for more, or act on more "
                "parameters"
            )
        self.file.left_out = set()
        now = self.file.size()
        if now <= self.target:
            warn(
                f"SizeTarget: the file takes {now:,} bytes before training, and may take "
                f"{self.target:,}: nothing has to become smaller; ask for less"
            )

    @property
    def needs_gradients(self) -> bool:
        return True

    def observe(
        self, name: str, weight: Tensor, gradient: Tensor | None, state: Mapping[str, Any]
    ) -> None:
        self.statistics.observe(name, weight, gradient, state)

    def discard(self, names: Collection[str]) -> None:
        self.statistics.discard(names)

    def narrowed(self, names: Collection[str]) -> None:
        self.statistics.drop(names)

    def is_ready(self, name: str) -> bool:
        return self.statistics.is_ready(name)

    # Choice.

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        if self.size is None and strength == 1:
            return
        ready = [name for name in weights if self.statistics.has_all(name)]
        samples = [self._sample(name, weights[name]) for name in ready]
        target, others = self._target_of(ready)
        left = 1.0 - min(1.0, strength / _TIGHTENING) if self.size is not None else 0.0
        first = others + _FIRST_BITS / 8 * sum(self.parameters[name].numel() for name in ready)
        budget = target + max(0.0, first - target) * left**3

        def bits(price: float) -> float:
            return sum(share * cluster(w, f, price, self.zeros).bits for w, f, share in samples)

        room = 8 * (budget - others) / self.ratio
        self.price = price_within(bits, room, self.price)
        if strength == 1:
            found = self._within(target, weights, ready)
        else:
            found = self._cluster(weights, ready, self.price)
            if strength >= self.measure_at or self.size is None:
                self.bytes = self._size(found)
                if self.bytes > others:
                    self.ratio = 8 * (self.bytes - others) / bits(self.price)
                self.measure_at = strength + _BETWEEN
        for name, mine in found.items():
            self._take(name, weights[name], mine)
        if strength == 1:
            inform(self._table(found))

    def _target_of(self, names: Sequence[str]) -> tuple[float, int]:
        """Return the target of a file of what counts, and how many bytes of it all others take that
        are not among ``names``.

        Parameters that are to be compressed and cannot be yet, such as frozen ones, count as they
        are. If they are too large for that, they are left out of the file, and the others have
        their share of the target, by their number.
        """
        late = self._late(names)
        zeros = self._zeros(names)
        self.file.left_out = set()
        others = self.file.size(zeros)
        target = float(self.target)
        if others >= target and late:
            self.file.left_out = set(late.values())
            others = self.file.size(zeros)
            mine = sum(self.parameters[name].numel() for name in names)
            share = mine / (mine + sum(parameter.numel() for parameter in late.values()))
            target = others + (target - others) * share
        if self.size is None:
            target = max(target, _NEAREST * others)
        if others >= target:
            raise ValueError(
                f"SizeTarget: a file of {self.target:,} bytes cannot be reached: what is not "
                f"compressed takes {others:,}; ask for more, or act on more parameters"
            )
        return target, others

    def _late(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        """Return the parameters that are to be compressed, and cannot be yet."""
        chosen = self.selection.chosen
        missing = {name: parameter for name, parameter in chosen.items() if name not in names}
        waiting = self.selection.waiting.items()
        return missing | {name: parameter for name, parameter in waiting if not is_lazy(parameter)}

    def _sample(self, name: str, weight: Tensor) -> tuple[Any, Any, float]:
        """Return rows of a weight as a matrix, their curvatures, and how many they stand for."""
        matrix, curvature = self._matrices(name, weight)
        rows = slice(None, None, -(-matrix.size // _SAMPLE))
        sample = np.ascontiguousarray(matrix[rows])
        share = matrix.size / max(1, sample.size)
        return sample, np.ascontiguousarray(curvature[rows]), share

    def _matrices(self, name: str, weight: Tensor) -> tuple[Any, Any]:
        """Return a weight and its curvature as matrices."""
        wide = weight.float()
        curvature = self.statistics.of(name, wide)["squared_gradient"].float().sqrt()
        curvature = curvature + _DAMPING * curvature.mean() + torch.finfo(torch.float32).tiny
        shape = matrix_shape(weight.shape)
        return wide.reshape(shape).cpu().numpy(), curvature.reshape(shape).cpu().numpy()

    def _cluster(
        self, weights: Mapping[str, Tensor], names: Iterable[str], price: float
    ) -> dict[str, Clustering]:
        return {
            name: cluster(*self._matrices(name, weights[name]), price, self.zeros) for name in names
        }

    def _size(self, found: Mapping[str, Clustering]) -> int:
        """Return the size of the file, really coded."""
        weights: dict[Tensor, Tensor] = {
            self.parameters[name]: decoded(mine).view(self.parameters[name].shape)
            for name, mine in found.items()
        }
        return self.file.size(weights)

    def _within(
        self, target: float, weights: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, Clustering]:
        """Return the clusterings at the price at which the file is just below a target."""
        best: dict[str, Clustering] = {}
        self.bytes = 0
        target *= 1 - _SPARE * (self.coder != "context")

        def size_at(price: float) -> int:
            nonlocal best
            found = self._cluster(weights, names, price)
            size = self._size(found)
            if self.bytes < size <= target:
                self.bytes, best = size, found
            return size

        try:
            self.price = price_within(size_at, target, self.price, _TOLERANCE, _TRIES)
        except ValueError as error:
            raise ValueError(
                f"SizeTarget: no price gives a file of {target:,.0f} bytes, {error}: ask for more"
            ) from error
        return best

    def _take(self, name: str, weight: Tensor, found: Clustering) -> None:
        """Fix the levels of a weight until the next choice."""
        index = torch.from_numpy(found.index.ravel().astype(np.int16)).to(weight.device)
        codebook = torch.from_numpy(found.codebook).to(weight.device, weight.dtype)
        zero = found.zero
        # The level 0 is no cluster.
        index = torch.where(index == zero, ZERO, index - (index > zero).short())
        codebook = codebook[torch.arange(len(codebook), device=weight.device) != zero]
        self.share(name, index, codebook, weight.flatten())
        self.masks[name] = self._mask(name)

    def keep_nearest(self, latents: Mapping[str, Tensor]) -> None:
        """Fix the levels that weights are nearest to, before the window ends, and measure the file.

        Args:
            latents: Latents by the names of their parameters.
        """
        if not self.clusterings or self.clock.now >= self.window.last:
            return
        weights: dict[Tensor, Tensor] = {}
        for name in self.clusterings.keys() & latents.keys():
            latent, codebook = latents[name].flatten(), self._codebook(name, latents[name].dtype)
            kept = self._index(name).flatten() != ZERO
            index = torch.where(kept, nearest(latent, codebook), ZERO).short()
            self.share(name, index, codebook, latent)
            weights[self.parameters[name]] = self.levels(name)
        self.bytes = self.file.size(weights)

    def _mask(self, name: str) -> Tensor:
        """Return this process's part of a mask: all bits set where a weight is not zero."""
        kept = torch.zeros(local(self.parameters[name]).numel(), dtype=torch.bool)
        kept = kept.to(self.parameters[name].device)
        positions = self.clusterings[name]["positions"]
        everywhere = len(positions) == 0 and len(self.clusterings[name]["index"]) > 0
        kept[slice(None) if everywhere else positions.long()] = True
        return -kept.view(local(self.parameters[name]).shape).to(torch.int8)

    def _zeros(self, names: Iterable[str]) -> dict[Tensor, Tensor]:
        """Return zeros in the place of whole parameters."""
        weights = [self.parameters[name] for name in names]
        return {weight: torch.zeros(weight.shape, dtype=weight.dtype) for weight in weights}

    def _table(self, found: Mapping[str, Clustering]) -> str:
        """Return a table of what was chosen."""
        head = f"SizeTarget: a file of {self.bytes:,} bytes, of at most {self.target:,}, at a price"
        return "\n  ".join([f"{head} of {self.price:.3g} a bit", *clusterings_table(found)])

    def finish(self) -> list[str]:
        warnings = super().finish()
        if self.file.left_out and self.chosen_at is not None:
            selected = {**self.selection.waiting, **self.parameters}
            left_out = {name: p for name, p in selected.items() if p in self.file.left_out}
            names = abridged([pattern for pattern, _ in grouped(left_out)])
            warnings.append(
                f"SizeTarget: the file is larger than {self.target:,} bytes, since {names} took no "
                "part in training: make them trainable, or ask for more"
            )
        return warnings

    # Projection.

    def levels(self, name: str) -> Tensor:
        """Return this process's part of a weight at the levels that were chosen for it."""
        weight = torch.zeros_like(local(self.parameters[name].detach())).contiguous()
        mine = self.clusterings[name]
        codebook = self._codebook(name, weight.dtype)
        move_(weight.view(-1), mine["positions"], mine["index"], codebook, 1.0)
        return weight

    def _round_(self, name: str, weight: Tensor, strength: float) -> None:
        """Move the weights that are not zero towards the nearest level, ``w = u + s (c - u)``."""
        positions, index = (self.clusterings[name][key] for key in ("positions", "index"))
        if not len(index):
            return
        codebook, flat = self._codebook(name, weight.dtype), weight.contiguous().view(-1)
        kept = positions.long() if len(positions) else slice(None)
        latents = flat[kept]
        flat[kept] = latents.lerp(codebook[nearest(latents, codebook)], strength)
        if not weight.is_contiguous():
            weight.copy_(flat.view_as(weight))

    def _codebook(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the levels of a weight, but for 0, as precise as in the file."""
        return self.clusterings[name]["codebook"].to(getattr(torch, self.codebook_dtype)).to(dtype)

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        for name in self.masks.keys() & parameters.keys():
            _mask_(local(parameters[name].detach()), self.masks[name])

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        if name in self.masks:
            _mask_(weight, self.masks[name])
            if self._changes_levels(strength):
                self._round_(name, weight, self._pull(strength))
            else:
                super().project_(name, weight, self._pull(strength))

    def project_average_(self, name: str, average: Tensor, strength: float) -> None:
        _mask_(average, self.masks[name])
        if self._changes_levels(strength):
            self._round_(name, average, self._pull(strength))
        else:
            super().project_average_(name, average, self._pull(strength))

    def _changes_levels(self, strength: float) -> bool:
        """Return whether weights change their level between two choices.

        Without zeros they stay: the nearest of few levels is then far from the one of least bits.
        """
        return self.zeros and strength < 1 and self._pull(strength) > 0

    def project_buffers_(self, buffers: Mapping[str, Tensor]) -> None:
        if self.chosen_at is not None and self.clock.now >= self.window.last:
            for name, buffer in buffers.items():
                if is_statistic(name):
                    buffer.copy_(rounded(buffer))

    def _pull(self, strength: float) -> float:
        """Return how far weights are on their way to their levels."""
        if self.size is None:
            return 1.0 if strength == 1 else _FOLLOWING
        return max(0.0, (strength - _TIGHTENING) / (1 - _TIGHTENING))

    # State.

    def reset(self) -> None:
        super().reset()
        self._forget()
        self.masks, self.dense, self.aim = {}, 0, 0
        self.file.left_out = set()
        self.statistics.reset()

    def _forget(self) -> None:
        self.price, self.ratio, self.measure_at, self.bytes = None, 1.0, 0.0, 0

    def choices(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _STATE} if self.price else {}
        return {**super().choices(), "target": own, **self.statistics.state_dict()}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        super().load_choices(choices, module)
        self._forget()
        for name, value in choices["target"].items():
            setattr(self, name, value)
        self.masks = {name: self._mask(name) for name in self.clusterings}
        self.statistics.load_state_dict(choices, dict(module.named_parameters()))


def _mask_(weight: Tensor, mask: Tensor) -> None:
    # On the bits, since a product with 0 would make -0 of negative weights.
    weight.view(INTEGERS[weight.dtype.itemsize]).bitwise_and_(mask)
