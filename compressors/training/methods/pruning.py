"""Gradual pruning: more and more weights become zero during training."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fitsmall.compressors.choices.allocation import Allocation, SetScores, as_allocation
from fitsmall.compressors.choices.criteria import Criterion, as_criterion
from fitsmall.compressors.choices.schedules import Cubic, Schedule
from fitsmall.compressors.codes.dtypes import INTEGERS
from fitsmall.compressors.naming import abridged, grouped
from fitsmall.compressors.projections.prune import keep_slices_, kept
from fitsmall.compressors.projections.structures import Structure, Unstructured, as_structure
from fitsmall.compressors.training.messages import warn
from fitsmall.compressors.training.optimizers import like_gradient
from fitsmall.compressors.training.sharding import gather, local, shard
from fitsmall.compressors.training.stage import Stage
from fitsmall.compressors.training.statistics import Statistics

__all__ = ["GradualPruning"]

_SPARSITY = 0.95


class GradualPruning(Stage):
    r"""Set more and more weights to zero: sparsity ``s(t) = sparsity * schedule(t)``.

    Zhu and Gupta (2017). Every ``every`` steps the weights with the smallest scores are chosen
    again, exactly as many as the schedule asks for, and stay zero until the next choice. All layers
    are pruned, also the first and the last, as in Han et al. (2015): with the default global
    threshold small and important layers keep more weights. Gale et al. (2019) keep the first
    convolution dense and prune the last layer less: ``exclude="conv1"``, ``overrides={"fc": 0.8}``.

    Args:
        sparsity: Final fraction of zeros, over all selected parameters together; by default 0.95,
            or the sparsity that the structure fixes.
        criterion: Score of a weight, the largest of which survive: a name (``magnitude``,
            ``gradient``, ``activation``, ``hessian``, ``adam``, ``movement`` or ``random``), a
            function ``(weight, statistics) -> score``, or a
            :class:`~fitsmall.compressors.Criterion` of a function and the statistics that it needs;
            see :mod:`fitsmall.compressors.choices.criteria`. The default compares layers of any
            scale; a global threshold on magnitudes spares embeddings and empties other layers.
        allocation: How the sparsity is spread over tensors: a name (``global``, ``uniform``,
            ``erk`` or ``lamp``), or a function ``(scores by name, sparsity) -> number of kept sets
            by name``; by default ``global``. See :mod:`fitsmall.compressors.choices.allocation`.
        schedule: Strength as a function of progress through the window.
        start: Fraction of training at which pruning begins.
        stop: Fraction of training at which the final sparsity is reached.
        start_step: The same in optimizer steps, instead of ``start``.
        stop_step: The same in optimizer steps, instead of ``stop``.
        every: Steps between choices; by default the window has 100 choices.
        coupling: ``"hard"``: pruned weights stay zero for good. ``"straight_through"``: the
            optimizer moves a dense latent weight by the gradient at the pruned one, so that
            weights can return (dynamic pruning with feedback, Lin et al., 2020; SR-STE, Zhou et
            al., 2021, with ``structure=NofM(2, 4)`` and ``pruned_decay=2e-4``).
        include: Patterns of parameter names that replace the default, all weights: see
            :func:`~fitsmall.compressors.select`.
        exclude: Patterns of parameter names to leave out.
        overrides: Sparsities by pattern of parameter names; ``sparsity`` is then that of all other
            parameters together.
        structure: Sets of weights that are pruned together: ``Unstructured()``, the default,
            ``NofM(2, 4)``, ``Block(4, 4)``, or one of your own; see
            :mod:`fitsmall.compressors.projections.structures`.
        pruned_decay: Weight decay on the latents of pruned weights alone, ``g <- g + d (1 - m) u``,
            so that fewer of them return to be pruned again; with ``coupling="straight_through"``.

    Example:
        >>> from torch import nn
        >>> from fitsmall.compressors.training import Plan
        >>> print(Plan([GradualPruning(0.9, stop=0.5)], nn.Linear(20, 10), horizon=1000))
        Compression plan of 210 parameters
          GradualPruning: sparsity 0.9 (global gradient), hard, steps 0 to 500
            acts on 95.2 %:
              weight  200  95.2 %
          left out (a bias or a norm): bias; 4.8 %, 40 bytes
    """

    order = 0
    followed = frozenset(
        {"sparsity", "overrides", "allocation", "schedule", "every", "pruned_decay"}
    )

    def __init__(
        self,
        sparsity: float | None = None,
        criterion: str | Criterion | Callable[..., Tensor] = "gradient",
        allocation: str | Allocation | Callable[..., Mapping[str, int]] | None = None,
        schedule: Schedule | None = None,
        start: float = 0.0,
        stop: float = 0.7,
        start_step: int | None = None,
        stop_step: int | None = None,
        every: int | None = None,
        coupling: Literal["hard", "straight_through"] = "hard",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        overrides: Mapping[str, float] | None = None,
        structure: Structure | None = None,
        pruned_decay: float = 0.0,
    ) -> None:
        super().__init__(start, stop, start_step, stop_step, every, include, exclude)
        self.structure = as_structure(structure) if structure is not None else Unstructured()
        self.overrides = self._overrides(overrides)
        for fraction in (sparsity, *self.overrides.values()):
            if fraction is not None:
                _check_fraction(fraction)
        fixed = self.structure.sparsity
        if fixed is not None:
            self._check_fixed(fixed, sparsity, allocation)
            self.sparsity, allocation = fixed, "uniform"
        else:
            self.sparsity = _SPARSITY if sparsity is None else sparsity
        if coupling not in ("hard", "straight_through"):
            raise ValueError(
                f"GradualPruning: unknown coupling {coupling!r}, choose hard or straight_through"
            )
        if pruned_decay and coupling == "hard":
            raise ValueError(
                "GradualPruning: pruned_decay acts on the latents of pruned weights, which only "
                "coupling='straight_through' keeps"
            )
        if not pruned_decay >= 0:
            raise ValueError(f"GradualPruning: pruned_decay is at least 0, got {pruned_decay}")
        self.schedule = self._schedule(schedule, Cubic())
        self.criterion = as_criterion(criterion)
        self.allocation = as_allocation("global" if allocation is None else allocation)
        self.pruned_decay = pruned_decay
        self._coupling = coupling
        self._sparse: set[str] = set()  # weights that a warning has named
        self.statistics = Statistics(self.criterion.statistics)
        # Of this process's part of each weight: all bits set where it is kept, none where pruned.
        self.masks: dict[str, Tensor] = {}

    def _check_fixed(self, fixed: float, sparsity: float | None, allocation: object) -> None:
        """Refuse settings that the structure determines by itself."""
        for name, refused in (
            ("sparsity", sparsity is not None and abs(sparsity - fixed) > 1e-9),
            ("overrides", bool(self.overrides)),
            ("allocation", allocation not in (None, "uniform")),
        ):
            if refused:
                raise ValueError(
                    f"GradualPruning: {self.structure} fixes a sparsity of {fixed:g} in every "
                    f"tensor: leave out {name}"
                )

    @property
    def coupling(self) -> str:
        return self._coupling

    def describe(self) -> str:
        how = [f"{self.criterion}"]
        if self.structure.sparsity is None:
            how.insert(0, f"{self.allocation}")
        if self.structure != Unstructured():
            how.append(f"of {self.structure}")
        own = f", {len(self.overrides)} overrides" if self.overrides else ""
        return f"sparsity {self.sparsity:g} ({' '.join(how)}{own})"

    def strength(self, progress: float) -> float:
        return self.schedule(progress)

    # Selection.

    @property
    def takes_any_weight(self) -> bool:
        return "input_norm" not in self.criterion.statistics

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        forms = self.selection.forms
        reasons = {
            name: f"{self.structure}: {reason}"
            for name, parameter in self.selection.chosen.items()
            if (reason := self.structure.refusal(forms[name].matrix_shape(parameter.shape)))
        }
        self.selection = self.selection.without({**self._unscored(module), **reasons})
        chosen = self.selection.chosen
        own = self.selection.match(self.overrides)
        for name, keep in self._final(own).items():
            target = own.get(name, self.sparsity)
            # A sparsity of exactly 1 switches a layer off on purpose.
            if not keep and target < 1:
                raise ValueError(
                    f"GradualPruning: a sparsity of {target:g} leaves none of the "
                    f"{chosen[name].numel():,} weights of {name}: lower it, exclude the parameter, "
                    f"or give it its own with overrides={{{name!r}: ...}}"
                )
        self.statistics.attach(module, self.selection, self.parameters)

    def _unscored(self, module: nn.Module) -> dict[str, str]:
        """Return the reasons why the criterion cannot score weights, by name.

        Raises:
            ValueError: One of them was asked for by name.
        """
        reasons = {
            name: reason
            for name in self.selection.chosen
            if (reason := self.statistics.refusal(module, name))
        }
        if reasons and self.include is not None:
            name, reason = next(iter(reasons.items()))
            raise ValueError(
                f"GradualPruning: exclude {name}, or choose another criterion than "
                f"{self.criterion}: {reason}"
            )
        return reasons

    def _final(self, own: Mapping[str, float]) -> dict[str, int]:
        """Return how many sets each tensor keeps in the end, where that depends on no scores."""
        chosen = self.selection.chosen
        final = {name: sum(self._kept(name, fraction).values()) for name, fraction in own.items()}
        free = {name: self._matrices(name) for name in chosen if name not in own}
        shapes = {part: shape for parts in free.values() for part, shape in parts.items()}
        if self.allocation.by_shape:
            keep = self.allocation(SetScores(self.structure, shapes), self.sparsity)
            final |= {name: sum(keep[part] for part in parts) for name, parts in free.items()}
        elif free and not kept(sum(map(self.structure.num_sets, shapes.values())), self.sparsity):
            final |= dict.fromkeys(free, 0)
        return final

    def _kept(self, name: str, sparsity: float) -> dict[str, int]:
        """Return how many sets each matrix of a parameter keeps at a sparsity of its own."""
        num_sets = self.structure.num_sets
        return {
            part: kept(num_sets(shape), sparsity) for part, shape in self._matrices(name).items()
        }

    def _matrices(self, name: str) -> dict[str, torch.Size]:
        """Return the shapes of a parameter's matrices, by their names in the allocation."""
        form, shape = self.selection.forms[name], self.selection.chosen[name].shape
        number = form.num_matrices(shape)
        names = [name] if number == 1 else [f"{name}[{index}]" for index in range(number)]
        return dict.fromkeys(names, form.matrix_shape(shape))

    def hook(self) -> None:
        self.statistics.hook()

    def unhook(self) -> None:
        self.statistics.unhook()

    # Statistics.

    def begin(self, horizon: float) -> None:
        self.statistics.begin()

    @property
    def needs_gradients(self) -> bool:
        return self.statistics.of_gradients

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

    def before_update(
        self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], gradient_scale: float
    ) -> None:
        for name in self.masks.keys() & parameters.keys() if self.pruned_decay else ():
            latent = local(parameters[name].detach())
            gradient = parameters[name].grad
            if gradient is not None:
                pruned = latent.masked_fill(self.masks[name] != 0, 0.0)
                decayed = like_gradient(pruned, local(gradient))
                local(gradient).add_(decayed, alpha=self.pruned_decay * gradient_scale)

    # Masks.

    def has_choice(self, name: str) -> bool:
        return name in self.masks

    def choose(self, weights: Mapping[str, Tensor], strength: float) -> None:
        self.statistics.synchronize()
        # A weight without statistics waits for the next choice.
        ready = [name for name in weights if self.statistics.has_all(name)]
        own = self.selection.match(self.overrides)
        free = [name for name in ready if name not in own]
        keep = self.allocation(self._set_scores(free, weights), self.sparsity * strength)
        for name in ready:
            if name in own:
                keep |= self._kept(name, own[name] * strength)
            form = self.selection.forms[name]
            masks = [
                self.structure.mask(scores, keep[part])
                for part, scores in zip(
                    self._matrices(name), form.split(self._score(name, weights[name])), strict=True
                )
            ]
            mask = form.join(torch.stack(masks)).contiguous()
            if form.normed is not None:
                keep_slices_(mask, weights[name], form.normed)
            self.masks[name] = _bits(shard(mask, self.selection.chosen[name]))
        self._warn_of_sparse_layers(free, keep)

    def _warn_of_sparse_layers(self, names: Sequence[str], keep: Mapping[str, int]) -> None:
        """Warn, once, of layers whose density is below a hundredth of all layers' together."""
        num_sets, kept_sets = {}, {}
        for name in names:
            matrices = self._matrices(name)
            num_sets[name] = sum(map(self.structure.num_sets, matrices.values()))
            kept_sets[name] = sum(keep[part] for part in matrices)
        average = sum(kept_sets.values()) / max(1, sum(num_sets.values()))
        sparse = [
            name
            for name in names
            if kept_sets[name] < 0.01 * average * num_sets[name] and name not in self._sparse
        ]
        self._sparse.update(sparse)
        if sparse:
            warn(
                f"GradualPruning: {abridged([pattern for pattern, _ in grouped(sparse)])} kept "
                f"less than a hundredth of the average density of {average:.2g}: give them a "
                "sparsity of their own with overrides, or choose another criterion or allocation"
            )

    def project_(self, name: str, weight: Tensor, strength: float) -> None:
        # On the bits, since a product with 0 would make -0 of negative weights.
        mask = self.masks.get(name)
        if mask is not None:
            weight.view(INTEGERS[weight.dtype.itemsize]).bitwise_and_(mask)

    def _set_scores(self, names: Iterable[str], weights: Mapping[str, Tensor]) -> SetScores:
        """Return the scores of the sets of each matrix of some parameters."""
        matrices = {name: self._matrices(name) for name in names}
        origin = {part: (n, k) for n, parts in matrices.items() for k, part in enumerate(parts)}
        shapes = {part: shape for parts in matrices.values() for part, shape in parts.items()}

        @lru_cache(maxsize=1)  # the matrices of a parameter are looked up one after the other
        def split(name: str) -> Tensor:
            return self.selection.forms[name].split(self._score(name, weights[name]))

        def scores(part: str) -> Tensor:
            name, index = origin[part]
            return split(name)[index]

        return SetScores(self.structure, shapes, scores)

    def _score(self, name: str, weight: Tensor) -> Tensor:
        # In half precision squares of weights underflow.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        score = self.criterion(wide, self.statistics.of(name, wide))
        if name in self.masks and self.coupling == "hard":
            # With hard coupling a pruned weight never returns, even if an update moved it.
            mask = gather(self.masks[name], self.selection.chosen[name])
            score = score.masked_fill(mask == 0, -torch.inf)
        return score

    # State.

    def reset(self) -> None:
        self.masks, self._sparse = {}, set()
        self.statistics.reset()

    def choices(self) -> dict[str, Any]:
        masks = {
            name: gather(mask, self.parameters[name]) != 0 for name, mask in self.masks.items()
        }
        return {"masks": masks, **self.statistics.state_dict()}

    def load_choices(self, choices: dict[str, Any], module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        self.masks = {
            name: _bits(shard(mask.to(parameters[name].device), parameters[name]))
            for name, mask in choices["masks"].items()
        }
        self.statistics.load_state_dict(choices, parameters)


def _check_fraction(fraction: Any) -> None:
    if isinstance(fraction, int | float) and 0.0 <= fraction <= 1.0:
        return
    percent = ""
    if isinstance(fraction, int | float) and 1 < fraction <= 100:
        percent = f": for {fraction:g} % write {fraction / 100:g}"
    raise ValueError(
        f"GradualPruning: a sparsity is a fraction in [0, 1], got {fraction!r}{percent}"
    )


def _bits(mask: Tensor) -> Tensor:
    """Return -1, which sets all bits of an integer of any width, for true, and 0 for false."""
    return mask.to(torch.int8).neg_()
