"""Sums and moves of weight sharing, compiled and by torch."""

import pytest
import torch

from fitsmall.compressors.training.methods import centroids

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "clusters"), [(1, 1), (1001, 16), (997, 300), (0, 0)])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_compiled_and_torch_agree(
    dtype: torch.dtype,
    count: int,
    clusters: int,
    everywhere: bool,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count if everywhere else 2 * count + 1, generator=generator, dtype=dtype)
    positions = torch.randperm(len(weights), generator=generator)[:count].sort().values.int()
    narrow = torch.uint8 if clusters < 256 else torch.int16
    index = torch.randint(max(1, clusters), (count,), generator=generator).to(narrow)
    where = positions[:0] if everywhere else positions

    totals = centroids.sums(weights, where, index, clusters)
    expected = torch.zeros(clusters, dtype=torch.float64)
    expected.index_add_(0, index.long(), weights[positions.long()].double())
    torch.testing.assert_close(totals, expected, rtol=1e-12, atol=1e-12)

    codebook = torch.randn(clusters, generator=generator, dtype=dtype)
    compiled, by_torch = weights.clone(), weights.clone()
    centroids.move_(compiled, where, index, codebook, strength)
    with monkeypatch.context() as patch:
        patch.setattr(centroids, "_BLOCK", 100)  # several blocks
        product = centroids._product(weights, where, index, clusters)
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
        patch.setattr(centroids, "_compiled", lambda _: False)
        centroids.move_(by_torch, where, index, codebook, strength)
    torch.testing.assert_close(compiled, by_torch)
    if strength == 1.0:
        assert compiled.equal(weights.index_copy(0, positions.long(), codebook[index.long()]))
