"""The file: everything comes back bit for bit, and nothing damaged comes back at all."""

import math
import os
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fitsmall.compressors import (
    Code,
    Dense,
    Integer,
    KMeans,
    Lookup,
    Sparse,
    TopK,
    compress,
    exact,
    inspect,
    load,
    read,
    restore,
    same_bits,
    save,
)
from fitsmall.compressors.choices.allocation import Lazy
from fitsmall.compressors.codes.lattice import lattice, spread
from fitsmall.compressors.file.coding import CODERS, Streams
from fitsmall.compressors.file.schema import DTYPES, Entry
from fitsmall.compressors.file.writer import estimate
from fitsmall.experiments.benchmarks.forged_files import forge

GENERATOR = torch.Generator().manual_seed(0)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def codes(dtype: torch.dtype) -> dict[str, Code]:
    mask = torch.rand(20, 30, generator=GENERATOR) < 0.1
    kept = int(mask.sum())
    codebook = weight(5, dtype=dtype).sort().values
    index = torch.randint(5, (20, 30), generator=GENERATOR)
    return {
        "dense": Dense(weight(3, 4, dtype=dtype)),
        "dense narrow": Dense(weight(3, 4).bfloat16().to(dtype)),
        "lookup": Lookup(Dense(codebook), index),
        "lookup narrow": Lookup(Dense(codebook.bfloat16().to(dtype)), index),
        "sparse": Sparse(mask, Dense(weight(kept, dtype=dtype))),
        "sparse lookup": Sparse(mask, Lookup(Dense(codebook), index[mask])),
        "sparse lookup narrow": Sparse(
            mask, Lookup(Dense(codebook.bfloat16().to(dtype)), index[mask])
        ),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("coder", CODERS)
def test_every_code_survives_the_file(coder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = codes(dtype)
    size = save(tmp_path / "a.fitsmall", stored, coder)
    assert size == (tmp_path / "a.fitsmall").stat().st_size
    restored = load(tmp_path / "a.fitsmall")
    assert list(restored) == list(stored)
    for name, code in stored.items():
        assert same_bits(restored[name], code.decode()), name


@pytest.mark.parametrize("coder", CODERS)
def test_any_state_dict_survives(coder: str, tmp_path: Path) -> None:
    tensors = {
        "": weight(2),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "zeros": torch.zeros(50, 60),
        "ones": torch.ones(3000),
        "half": weight(10, 10, dtype=torch.float16),
        "count": torch.tensor(123456789),
        "ints": torch.arange(-50, 50),
        "bytes": torch.arange(256).to(torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.complex(weight(3), weight(3)),
        "fp8": weight(40).to(torch.float8_e4m3fn),
        "odd": torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45] * 9),
        "conv": KMeans(7).project(TopK(0.8).project(weight(6, 5, 3, 3))),
        "transposed": weight(7, 9).t(),
        "rare levels": torch.cat([torch.zeros(5000), weight(20)]),
        "many levels": torch.arange(3000.0).repeat(3),
        "название": weight(3),
    }
    save(tmp_path / "a.fitsmall", tensors, coder)
    restored = load(tmp_path / "a.fitsmall")
    assert list(restored) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(restored[name], tensor), name
    assert [(entry.name, tensor.shape) for entry, tensor in read(tmp_path / "a.fitsmall")] == [
        (name, tensor.shape) for name, tensor in tensors.items()
    ]


def test_exact_finds_the_code_that_made_a_tensor_small() -> None:
    raw = weight(40, 40)
    assert isinstance(exact(raw), Dense)
    pruned = exact(TopK(0.9).project(raw))
    assert isinstance(pruned, Sparse)
    assert isinstance(pruned.values, Dense)
    assert isinstance(exact(KMeans(8).project(raw)), Lookup)
    single = torch.zeros(256, 64)  # a scale for each row would take 1,024 bytes
    single[0, 0] = 0.3
    assert exact(single).bits() < 500
    both = exact((TopK(0.9) | KMeans(8)).project(raw))
    assert isinstance(both, Sparse)
    assert isinstance(both.values, Lookup)
    assert both.values.codebook.shape == (8,)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    embedding = nn.Embedding(50, 20)
    head = nn.Linear(20, 50, bias=False)
    head.weight = embedding.weight
    net = nn.Sequential(embedding, head)
    tied = save(tmp_path / "tied", net.state_dict())
    assert tied < 1.1 * save(tmp_path / "single", {"0.weight": embedding.weight})
    restored = load(tmp_path / "tied")
    assert same_bits(restored["0.weight"], restored["1.weight"])
    assert len(inspect(tmp_path / "tied").tensors) == 1


def test_memory_that_is_used_again_is_no_tie(tmp_path: Path) -> None:
    """Tensors made one by one may get the memory of a freed one."""
    names = {str(i): i for i in range(20)}
    save(tmp_path / "a", Lazy(names, lambda name: torch.full((999,), float(name)) + 0.1))
    for name, value in names.items():
        assert load(tmp_path / "a")[name][0] == pytest.approx(value + 0.1)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.fitsmall"
    sparse = (TopK(0.9) | KMeans(4)).project(weight(30, 40))
    save(path, {"fc.weight": sparse, "fc.bias": weight(30), "tied": sparse})
    return path


def test_every_damaged_byte_is_noticed(small: Path) -> None:
    data = small.read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 + position % 255
        small.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"small\.fitsmall"):
            load(small)


def test_every_truncation_is_noticed(small: Path) -> None:
    data = small.read_bytes()
    for length in range(len(data)):
        small.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"small\.fitsmall"):
            load(small)


FORGED = {
    "a codebook of 1048576 levels": Entry(
        "w", (2**20,), torch.float32, "shared", floats=2**20, positions=0, values=0
    ),
    "an impossible shape": Entry("w", (2**40, 2**40), torch.float32, "dense"),
    "'d' has 65 dimensions": Entry("d", (1,) * 65, torch.float32, "dense", floats=1),
    "only stored dense": Entry("w", (50,), torch.uint16, "sparse", torch.uint16, floats=5),
    "wrong number of values": Entry("w", (50,), torch.float32, "dense", floats=5),
    "more values than weights": Entry("w", (5,), torch.float32, "sparse", floats=50),
    "do not add up": Entry("w", (50,), torch.float32, "dense", floats=50),
}


@pytest.mark.parametrize("message", FORGED)
def test_what_no_model_holds_is_refused_before_it_costs_memory(
    message: str, tmp_path: Path
) -> None:
    entry = FORGED[message]
    adds_up = message not in ("do not add up", "an impossible shape")
    payload = bytes(entry.bytes if adds_up else 0)
    (tmp_path / "forged").write_bytes(forge("context", [entry], payload))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "forged")


def test_a_directory_of_nothing_but_repetition_is_refused(tmp_path: Path) -> None:
    entries = [Entry("w" * 9, (1,) * 60, torch.float32, "dense", floats=0)] * 20_000
    (tmp_path / "bomb").write_bytes(forge("context", entries, b""))
    assert (tmp_path / "bomb").stat().st_size < 20_000
    with pytest.raises(ValueError, match="does not end"):
        load(tmp_path / "bomb")


def test_an_inflated_stream_is_no_larger_than_its_matrix(tmp_path: Path) -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bomb.compress(bytes(10**8)) + bomb.flush()
    symbols = np.zeros((10, 10), np.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        CODERS["huffman"].decode(Streams(b"\x02" + data, b""), symbols.shape, 9)
    assert tracemalloc.get_traced_memory()[1] < 10**8
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["zeros", "levels", "sparse", "distinct"])
def test_every_type_of_the_format_survives(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    raw = torch.arange(64).repeat(4)
    values = {
        "zeros": raw * 0,
        "levels": raw % 3,
        "sparse": raw * (raw % 8 == 0),
        "distinct": raw,
    }
    tensor = values[kind].to(dtype)
    save(tmp_path / "a", {"w": tensor})
    assert same_bits(load(tmp_path / "a")["w"], tensor)


def test_types_outside_of_the_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'w' is torch\.complex32"):
        save(tmp_path / "a", {"w": torch.zeros(3, dtype=torch.complex32)})


def test_a_module_sets_the_limit_of_its_own_file(tmp_path: Path) -> None:
    net = nn.Linear(2**12, 2**12 + 1, bias=False)  # above 64 MiB of zeros, in about 100 bytes
    with torch.no_grad():
        net.weight.zero_()
    save(tmp_path / "zeros", net.state_dict())
    with pytest.raises(ValueError, match="pass limit="):
        load(tmp_path / "zeros")
    assert not restore(net, tmp_path / "zeros").weight.any()


def test_a_file_may_not_ask_for_more_memory_than_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "zeros"
    save(path, {"zeros": Sparse(torch.zeros(2**25, dtype=torch.bool), Dense(torch.empty(0)))})
    with pytest.raises(ValueError, match="asks for 134,217,728 bytes"):
        load(path)
    assert load(path, limit=2**27)["zeros"].count_nonzero() == 0


def test_other_files_and_versions_are_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no compressed network")
    with pytest.raises(ValueError, match="is not a fitsmall file"):
        load(tmp_path / "text")
    newer = bytearray(small.read_bytes())
    newer[4] = 9
    small.write_bytes(newer)
    with pytest.raises(ValueError, match="format version 9"):
        load(small)


def test_a_failed_save_leaves_the_old_file(small: Path) -> None:
    before = small.read_bytes()
    with pytest.raises(TypeError, match="'step' is a int"):
        save(small, {"weight": weight(5), "step": 3})  # type: ignore[dict-item]
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]
    with pytest.raises(ValueError, match="choose one of huffman, ans, context"):
        save(small, {}, coder="lzma")


def test_report_accounts_for_every_byte(small: Path) -> None:
    report = inspect(small)
    assert sum(tensor.bytes for tensor in report.tensors) + report.overhead == report.total
    assert report.total == small.stat().st_size
    fc = report.tensors[0]
    assert (fc.name, fc.weights, fc.kept, fc.levels) == ("fc.weight", 1200, 120, 4)
    assert fc.shared_bytes < fc.pruned_bytes < fc.bytes_dense == 4800
    assert f"{report.total:,}" in report.table()


@pytest.mark.parametrize("shape", [(128, 256), (32, 64, 3, 3)], ids=str)
def test_masks_of_two_in_four_inputs_cost_two_thirds_of_a_bit(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    scores = torch.rand(shape, generator=GENERATOR).unflatten(1, (-1, 4))
    mask = scores.argsort(2).argsort(2).flatten(1, 2) < 2
    shared = KMeans(16).project(weight(*shape) * mask)
    save(tmp_path / "a", {"w": shared})
    assert same_bits(load(tmp_path / "a")["w"], shared)
    (tensor,) = inspect(tmp_path / "a").tensors
    assert 8 * tensor.position_bytes < 0.66 * tensor.weights


def test_a_tensor_of_zeros_is_reported_too(tmp_path: Path) -> None:
    save(tmp_path / "a", {"w": torch.zeros(30, 40)})
    (tensor,) = inspect(tmp_path / "a").tensors
    assert (tensor.kept, tensor.levels, tensor.shared_bytes, tensor.bytes) == (0, 0, 0, 1)


def test_fixed_width_sizes_follow_the_paper(tmp_path: Path) -> None:
    """32 weights apart are beyond a 5-bit gap and need one filler, as in the paper's Figure 2."""
    sparse = torch.zeros(1, 70)
    sparse[0, [0, 33, 34, 66]] = torch.tensor([1.5, -2.5, 1.5, -2.5])
    save(tmp_path / "a", {"w": sparse})
    (tensor,) = inspect(tmp_path / "a").tensors
    # Gaps 0, 32, 0, 31: one filler, five pairs; 32 + 5 bits each, then 1 + 5 and the codebook.
    assert tensor.pruned_bytes == 24  # ceil(5 * 37 / 8)
    assert tensor.shared_bytes == 4 + 2 * 4  # ceil(5 * 6 / 8) and two centroids


@pytest.mark.parametrize("shape", [(50, 20, 5, 5), (1024, 384)], ids=str)
def test_estimate_is_within_one_percent(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GENERATOR.manual_seed(0)  # whatever tests have drawn before
    # Two thirds of the larger tensor.
    monkeypatch.setattr("fitsmall.compressors.codes.code.ESTIMATE_SYMBOLS", 2**18)
    tensors = {"weight": (TopK(0.95) | KMeans(16)).project(weight(*shape)), "bias": weight(9)}
    assert estimate(tensors) == pytest.approx(save(tmp_path / "a", tensors), rel=0.01)


def test_compress_and_restore_a_plain_module(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
        )

    net = network()
    found = compress(net, {"*": TopK(0.5) | KMeans(8), "3*": TopK(0.9) | KMeans(4)})
    assert list(found) == ["0.weight", "3.weight"]
    assert int(net[3].weight.count_nonzero()) == 144
    save(tmp_path / "net", net.state_dict())
    restored = restore(network(), tmp_path / "net")
    for name, tensor in net.state_dict().items():
        assert same_bits(restored.state_dict()[name], tensor)


def test_restore_names_what_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path / "net", {"weight": weight(3, 2), "extra": weight(1)})
    with pytest.raises(ValueError, match="does not fit Linear") as error:
        restore(nn.Linear(4, 3), tmp_path / "net")
    for part in ("bias is missing", "extra is not in the module", r"weight has shape (3, 2)"):
        assert part in str(error.value)


def test_compress_names_the_culprit() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.weight: .*diverge"):
        compress(net, KMeans(2))
    assert torch.equal(net[0].weight, before)
    with pytest.raises(ValueError, match=r"'conv\*' matches none .*0\.weight or 1\.weight"):
        compress(net, {"conv*": TopK(0.5)})
    with pytest.raises(ValueError, match="matches no parameter of Sequential"):
        compress(net, TopK(0.5), exclude="head")


def quantized(shape: tuple[int, ...], blocks: tuple[int, ...], bits: int, dice: int) -> Tensor:
    """Integers of so many bits, times scales of eight digits."""
    generator = torch.Generator().manual_seed(dice)
    high = 2 ** (bits - 1) - 1
    integers = torch.randint(-high, high + 1, shape, generator=generator)
    scales = torch.rand(blocks, generator=generator).add(0.01).bfloat16().float()
    return integers * spread(scales, torch.Size(shape))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.float32), (4, torch.float64), (8, torch.float32)], ids=str
)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((24, 50), (24, 1)),
        ((12, 3, 5, 5), (12, 1, 1, 1)),
        ((12, 6, 5, 5), (1, 6, 1, 1)),
        ((6, 256), (6, 4)),
    ],
)
def test_integers_are_found_in_floats(
    bits: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    blocks: tuple[int, ...],
    tmp_path: Path,
) -> None:
    weight = quantized(shape, blocks, bits, dice=bits).to(dtype)
    code = exact(weight)
    assert isinstance(code, Integer)
    assert code.scales.shape == blocks
    assert int(code.integers.abs().max()) < 2 ** (bits - 1)
    assert same_bits(code.decode(), weight)
    size = save(tmp_path / "integers", {"w": weight})
    assert same_bits(load(tmp_path / "integers")["w"], weight)
    assert estimate({"w": code}) == pytest.approx(size, rel=0.01, abs=2)
    levels = 2**bits - 1
    entropy = math.log2(levels) / 8 * weight.numel()
    assert size < 1.1 * entropy + 2 * code.scales.shape.numel() + 150
    (tensor,) = inspect(tmp_path / "integers").tensors
    assert tensor.levels <= levels
    assert tensor.float_bytes == 2 * code.scales.shape.numel()


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(1, 3))
def test_grids_are_exact_or_not_found(values: list[float], rows: int) -> None:
    blocks = torch.tensor([values] * rows)
    found = lattice(blocks)
    if found is not None:
        scales, integers = found
        assert same_bits(scales.unsqueeze(1) * integers, blocks)
        assert int(integers.abs().max()) <= 127


def test_negative_zeros_survive(tmp_path: Path) -> None:
    weight = quantized((24, 50), (24, 1), bits=4, dice=0)
    weight[3, 4] = -0.0
    save(tmp_path / "zero", {"w": weight})
    assert same_bits(load(tmp_path / "zero")["w"], weight)
