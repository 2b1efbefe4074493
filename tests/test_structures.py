"""Structures: which sets of weights live or die together, the user's own ones too."""

import inspect
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from fitsmall.compressors import (
    Block,
    KMeans,
    NofM,
    Sparse,
    Structure,
    TopK,
    Unstructured,
    exact,
    same_bits,
)
from fitsmall.compressors.choices.allocation import SetScores, as_allocation
from fitsmall.compressors.projections.structures import as_structure, support


@dataclass(frozen=True)
class Rows(Structure):
    """Whole rows: a user's own structure."""

    def refusal(self, shape: torch.Size) -> str | None:
        return None if len(shape) >= 2 else "it has no rows"

    def pool(self, scores: Tensor) -> Tensor:
        return scores.flatten(1).sum(1)

    def mask(self, scores: Tensor, keep: int) -> Tensor:
        rows = support(self.pool(scores), keep)
        return rows.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)


def test_a_structure_takes_at_most_20_lines() -> None:
    assert len(inspect.getsource(Rows).splitlines()) <= 20


STRUCTURES = [Unstructured(), NofM(2, 4), NofM(1, 2), Block(4, 4), Block(2, 6), Block(1, 1), Rows()]
SHAPES = [(8, 12), (4, 0), (8, 4, 3, 3)]


def sparsities(structure: Structure) -> list[float]:
    return [0.0, 0.3, 0.75, 1.0] if structure.sparsity is None else [structure.sparsity]


PROJECTIONS = [TopK(s, structure) for structure in STRUCTURES for s in sparsities(structure)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups(tensor: Tensor, m: int) -> Tensor:
    """One row for each m consecutive inputs, spelled out."""
    rows, inputs = tensor.shape[:2]
    flat = tensor.reshape(rows, inputs, -1)
    return torch.stack(
        [
            flat[row, start : start + m, side]
            for row in range(rows)
            for start in range(0, inputs, m)
            for side in range(flat.shape[2])
        ]
    )


def kept_sets(structure: Structure, mask: Tensor) -> int:
    """Number of sets with a weight in a mask."""
    return int((structure.pool(mask.float()) > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_feasible_idempotent_and_stored_exactly(
    projection: TopK, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = random(*shape).to(dtype)
    once = projection.project(weight)
    assert once.dtype == dtype
    assert once.shape == weight.shape
    total = projection.structure.num_sets(weight.shape)
    limit = round((1 - projection.sparsity) * total)
    assert kept_sets(projection.structure, once != 0) == (limit if weight.numel() else 0)
    assert once[once != 0].equal(weight[once != 0])
    assert same_bits(projection.project(once), once)
    assert same_bits(exact(once).decode(), once)
    assert same_bits(pickle.loads(pickle.dumps(projection)).project(weight), once)
    if isinstance(projection.structure, NofM) and once.numel():
        counts = groups(once, projection.structure.m).count_nonzero(dim=1)
        assert (counts == projection.structure.n).all()


@pytest.mark.parametrize("tiny", [1e-30, 1e-4], ids=["float32", "float16"])
def test_squares_of_tiny_weights_do_not_underflow(tiny: float) -> None:
    weight = (tiny * torch.tensor([[1.0, 1.0, 2.0, 2.0]])).to(
        torch.float16 if tiny == 1e-4 else torch.float32
    )
    once = TopK(0.5, Block(1, 2)).project(weight)
    assert (once != 0).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "structure"),
    [((2, 6), NofM(1, 3)), ((2, 4), NofM(2, 4)), ((1, 4, 1, 2), NofM(1, 2))],
    ids=str,
)
def test_nofm_is_never_farther_than_the_optimum(
    shape: tuple[int, ...], structure: NofM, seed: int
) -> None:
    weight = random(*shape, seed=seed).round(decimals=1)
    ways = [
        list(chosen) for chosen in itertools.combinations(range(structure.m), structure.n)
    ]  # the same choices for each group
    best = sum(
        min(float(group.square().sum() - group[chosen].square().sum()) for chosen in ways)
        for group in groups(weight, structure.m)
    )
    error = (TopK(structure.sparsity, structure).project(weight) - weight).square().sum()
    assert float(error) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 1, 2)], ids=str)
def test_blocks_are_never_farther_than_the_optimum(shape: tuple[int, ...], seed: int) -> None:
    weight = random(*shape, seed=seed).round(decimals=1)
    matrix = weight.reshape(4, 6)
    blocks = [matrix[r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)]
    best = min(
        sum(float(block.square().sum()) for block in dropped)
        for dropped in itertools.combinations(blocks, 4)
    )
    error = (TopK(4 / 6, Block(2, 2)).project(weight) - weight).square().sum()
    assert float(error) == pytest.approx(best, abs=1e-5)


def test_nofm_groups_are_consecutive_inputs_of_one_position() -> None:
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([1.0, 4.0, 3.0, 2.0])
    scores[0, :, 0, 1] = torch.tensor([8.0, 5.0, 6.0, 7.0])
    mask = NofM(2, 4).mask(scores, keep=4)
    assert mask[0, :, 0, 0].tolist() == [False, True, True, False]
    assert mask[0, :, 0, 1].tolist() == [True, False, False, True]


def test_blocks_are_of_the_matrix_of_a_convolution() -> None:
    scores = torch.zeros(2, 2, 1, 2)
    scores[1, 0, 0, 1] = 3.0  # column 1 of 4
    scores[0, 1, 0, 0] = 2.0  # column 2
    assert Block(2, 2).pool(scores).tolist() == [[3.0, 2.0]]
    mask = Block(2, 2).mask(scores, keep=1)
    assert mask[:, 0].all()
    assert not mask[:, 1].any()


@pytest.mark.parametrize("shape", [(3, 8), (2, 4, 2, 1)], ids=str)
@pytest.mark.parametrize("scale", [0.5, 10.0], ids=["many ties", "few ties"])
def test_nofm_on_the_way_gives_every_group_the_same_to_one(
    shape: tuple[int, ...], scale: float
) -> None:
    structure = NofM(2, 4)
    scores = (scale * random(*shape)).round()
    of_groups = groups(scores, 4).tolist()
    before = torch.zeros(shape, dtype=torch.bool)
    for keep in range(scores.numel() + 1):
        mask = structure.mask(scores, keep)
        assert int(mask.sum()) == keep
        assert (mask | before).equal(mask), "a larger number keeps what a smaller one does"
        # By hand: Python's sort is stable, so that ties stay in the order of their positions.
        every, more = divmod(keep, len(of_groups))
        order = [sorted(range(4), key=lambda i, g=g: -g[i]) for g in of_groups]  # type: ignore[misc]
        following = sorted(
            range(len(of_groups)), key=lambda g: -of_groups[g][order[g][min(every, 3)]]
        )
        expected = [{*order[g][: every + (g in following[:more])]} for g in range(len(of_groups))]
        chosen = [{i for i in range(4) if row[i]} for row in groups(mask, 4).tolist()]
        assert chosen == expected
        before = mask


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_what_is_pruned_hard_stays_pruned(structure: Structure) -> None:
    shape = torch.Size([8, 12])
    sets = structure.num_sets(shape)
    alive = torch.ones(shape, dtype=torch.bool)
    for step, keep in enumerate(range(sets, sets // 2 - 1, -max(1, sets // 20))):
        scores = random(*shape, seed=step).exp().masked_fill(~alive, -torch.inf)
        mask = structure.mask(scores, keep)
        assert not (mask & ~alive).any()
        assert kept_sets(structure, mask) == keep
        alive = mask
    # None returns, even if more may survive again.
    scores = random(*shape).exp().masked_fill(~alive, -torch.inf)
    assert structure.mask(scores, sets).equal(alive)


def test_a_block_with_a_weight_that_is_pruned_for_good_scores_least() -> None:
    scores = torch.tensor([[9.0, -torch.inf, 1.0, 1.0]])
    assert Block(1, 2).pool(scores).tolist() == [[-torch.inf, 2.0]]
    assert Block(1, 2).mask(scores, keep=2).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_ties_are_broken_by_position(structure: Structure) -> None:
    ones = torch.ones(8, 12)
    sets = structure.num_sets(ones.shape)
    mask = structure.mask(ones, sets // 2)
    assert int(mask.sum()) == 48
    if not isinstance(structure, NofM):
        kept = structure.pool(mask.float()).flatten() > 0
        assert kept.tolist() == [True] * (sets // 2) + [False] * (sets // 2)
    else:
        half = structure.m // 2
        assert (groups(mask, structure.m) == (torch.arange(structure.m) < half)).all()


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_bad_scores_and_numbers_are_refused(structure: Structure) -> None:
    scores = torch.ones(4, 12)
    sets = structure.num_sets(scores.shape)
    for keep in (-1, sets + 1):
        with pytest.raises(ValueError, match=f"cannot keep {keep} of {sets}"):
            structure.mask(scores, keep)
    scores[1, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN: did training diverge"):
        structure.mask(scores, 2)


@pytest.mark.parametrize(
    ("structure", "shape", "reason"),
    [
        (NofM(2, 4), (10,), "fewer than 2 dimensions"),
        (
            NofM(2, 4),
            (16, 3, 5, 5),
            r"dimension 1 of its shape \(16, 3, 5, 5\) is no multiple of 4",
        ),
        (Block(4, 4), (8,), "fewer than 2 dimensions"),
        (Block(4, 4), (10, 8), "matrix of 10 x 8 does not divide into blocks of 4 x 4"),
        (Block(4, 4), (8, 3, 3, 3), "matrix of 8 x 27 does not divide into blocks of 4 x 4"),
        (Rows(), (8,), "it has no rows"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(structure: Structure, shape: tuple[int, ...], reason: str) -> None:
    sparsity = 0.5 if structure.sparsity is None else structure.sparsity
    with pytest.raises(ValueError, match=rf"cannot prune the tensor: .*{reason}"):
        TopK(sparsity, structure).project(torch.ones(shape))


def test_shapes_that_fit() -> None:
    assert Unstructured().refusal(torch.Size([3])) is None
    assert NofM(2, 4).refusal(torch.Size([3, 8, 3, 3])) is None
    assert Block(4, 9).refusal(torch.Size([8, 3, 3, 3])) is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NofM(4, 4), ValueError, r"NofM\(n=4, m=4\) keeps n of m weights, with n from 1"),
        (lambda: NofM(0, 4), ValueError, "n from 1"),
        (lambda: Block(0, 4), ValueError, r"Block\(rows=0, columns=4\) has no weights"),
        (lambda: TopK(0.6, NofM(2, 4)), ValueError, "has a sparsity of 0.5 and no other, got 0.6"),
        (lambda: TopK(0.5, NofM), TypeError, r"a structure is Unstructured\(\), NofM.* got <class"),
        (lambda: as_structure("2:4"), TypeError, "got '2:4'"),
    ],
)
def test_structures_that_cannot_work(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_topk_shows_a_structure_of_its_own_alone() -> None:
    assert repr(TopK(0.9)) == "TopK(sparsity=0.9)"
    assert repr(TopK(2 / 3, NofM(1, 3))) == f"TopK(sparsity={2 / 3}, structure=NofM(n=1, m=3))"
    assert TopK(0.8, Block(4, 4)) != TopK(0.8)
    assert len({TopK(0.8), TopK(0.8, Unstructured()), TopK(0.8, Block(4, 4))}) == 2


def test_zeros_that_survive_take_no_place() -> None:
    code = TopK(0.25).encode(torch.tensor([1.0, 0.0, 0.0, 2.0]))
    assert isinstance(code, Sparse)
    assert code.mask.tolist() == [True, False, False, True]


def test_survivors_of_a_structure_are_clustered() -> None:
    weight = torch.tensor([[5.0, 0.1, 7.0, -0.2, 1.0, -4.0, 0.5, -2.0]])
    projected = (TopK(0.5, NofM(2, 4)) | KMeans(2)).project(weight)
    assert projected.tolist() == [[6.0, 0.0, 6.0, 0.0, 0.0, -3.0, 0.0, -3.0]]


def test_an_allocation_counts_sets() -> None:
    weights = {"a": torch.ones(4, 4), "b": torch.tensor([[9.0] * 4, [0.0] * 4])}
    shapes = {name: weight.shape for name, weight in weights.items()}
    scores = SetScores(Block(2, 2), shapes, weights.__getitem__)
    # The blocks of b score 18 each, those of a 4.
    assert as_allocation("global")(scores, 0.5) == {"a": 1, "b": 2}
    mask = Block(2, 2).mask(weights["a"], 1)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_erk_shares_densities_between_sets_of_different_sizes() -> None:
    shapes = {"conv": torch.Size([16, 8, 3, 3]), "fc": torch.Size([64, 96])}
    # Densities of weights 30 / 1152 and 160 / 6144, which are equal: so are those of rows.
    assert as_allocation("erk")(SetScores(Rows(), shapes), 0.5) == {"conv": 8, "fc": 32}


def test_sums_of_half_precision_scores_do_not_tie() -> None:
    scores = torch.tensor([[256.0, 1.0, 256.0, 0.0]], dtype=torch.bfloat16)
    assert Block(1, 2).pool(scores).tolist() == [[257.0, 256.0]]


def test_from_yaml() -> None:
    config = {
        "_target_": "fitsmall.compressors.TopK",
        "sparsity": 0.5,
        "structure": {"_target_": "fitsmall.compressors.NofM", "n": 2, "m": 4},
    }
    assert instantiate(config) == TopK(0.5, NofM(2, 4))
