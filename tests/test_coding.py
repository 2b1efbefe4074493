import base64
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from fitsmall.compressors.file import coding, context
from fitsmall.compressors.file.coding import CODERS, Ans, Coder, Huffman, Streams
from fitsmall.compressors.file.groups import NO_GROUPS, Groups, find_groups

DATA = Path(os.environ.get("FITSMALL_DATA", Path(__file__).parents[2] / "shared" / "data"))
INTS = DATA / "codec" / "lenet300_ints.npz"

every_coder = pytest.mark.parametrize("coder", CODERS.values(), ids=CODERS.keys())


def random_symbols(
    shape: tuple[int, int], density: float, alphabet: int, seed: int = 0
) -> NDArray[np.uint8 | np.uint16]:
    rng = np.random.default_rng(seed)
    kept = rng.random(shape) < density
    symbols = kept * rng.integers(1, alphabet, shape)
    return symbols.astype(np.uint8 if alphabet <= 256 else np.uint16)


def structured_symbols(rows: int = 300, side: int = 28) -> NDArray[np.uint8]:
    """A layer on images: rows of different density, dead borders, signs that agree in patches."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    centre = (np.hypot(x, y) < 0.8).ravel()
    phases = rng.uniform(0, 6, (rows, 2))
    wave = np.sin(3 * x.ravel() + phases[:, :1]) * np.cos(3 * y.ravel() + phases[:, 1:])
    kept = rng.random(wave.shape) < centre * np.abs(wave) * rng.uniform(0, 0.5, (rows, 1)) ** 2
    size = rng.geometric(0.5, wave.shape).clip(max=4)
    symbols = kept * np.where(wave < 0, 5 - size, 4 + size)
    return np.asarray(symbols, np.uint8)


def grouped_symbols(
    shape: tuple[int, int], groups: Groups, seed: int = 0, alphabet: int = 17
) -> NDArray[np.uint8]:
    """Random values under a random mask that keeps ``most`` weights in each group."""
    rng = np.random.default_rng(seed)
    scores = rng.random((shape[0], shape[1] // groups.size // groups.spacing, *groups[::3]))
    mask = scores.argsort(axis=2).argsort(axis=2) < groups.most
    return np.asarray(mask.reshape(shape) * rng.integers(1, alphabet, shape), np.uint8)


def assert_round_trip(coder: Coder, symbols: NDArray[np.uint8 | np.uint16], alphabet: int) -> None:
    streams = coder.encode(symbols, alphabet)
    assert all(isinstance(stream, bytes) for stream in streams)
    rows, columns = symbols.shape
    decoded = coder.decode(streams, (rows, columns), alphabet)
    assert decoded.dtype == symbols.dtype
    np.testing.assert_array_equal(decoded, symbols)


@every_coder
@pytest.mark.parametrize("alphabet", [2, 3, 17, 256, 257, 5000])
def test_round_trip(coder: Coder, alphabet: int) -> None:
    for shape in ((0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (2, 3), (10, 100)):
        for density in (0.0, 0.03, 0.5, 1.0):
            assert_round_trip(coder, random_symbols(shape, density, alphabet), alphabet)


@every_coder
@given(
    symbols=arrays(
        np.uint8,
        array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
        elements=st.sampled_from([0, 0, 0, 0, 1, 2, 3, 8]),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_matrix_comes_back(coder: Coder, symbols: NDArray[np.uint8]) -> None:
    assert_round_trip(coder, symbols, 9)


@every_coder
def test_round_trip_of_the_largest_alphabet(coder: Coder) -> None:
    symbols = random_symbols((3, 50), 0.8, 2**16)
    symbols[0, :4] = [1, 2**16 - 1, 2**15, 2**15 + 1]
    assert_round_trip(coder, symbols, 2**16)


@every_coder
def test_round_trip_of_structured_symbols(coder: Coder) -> None:
    assert_round_trip(coder, structured_symbols(), 9)


@every_coder
@pytest.mark.parametrize("shape", [(100, 10), (3, 333), (1, 1000)], ids=str)
def test_chunks_join(coder: Coder, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_CHUNK", 64)
    monkeypatch.setattr(context, "_CHUNK", 64)
    monkeypatch.setattr(context, "_WIDEST", 24)
    monkeypatch.setattr(context, "_SAMPLE", 200)
    for density in (0.01, 0.3):
        assert_round_trip(coder, random_symbols(shape, density, 9), 9)


@every_coder
def test_any_memory_layout(coder: Coder) -> None:
    symbols = random_symbols((30, 40), 0.2, 9)
    kept = symbols.copy()
    streams = coder.encode(symbols.T[::2], 9)
    np.testing.assert_array_equal(coder.decode(streams, (20, 30), 9), symbols.T[::2])
    np.testing.assert_array_equal(symbols, kept)


@every_coder
def test_a_symbol_outside_the_alphabet_is_refused(coder: Coder) -> None:
    with pytest.raises(ValueError, match="outside"):
        coder.encode(np.array([[0, 3]], np.uint8), 3)


@every_coder
def test_trivial_streams(coder: Coder) -> None:
    everything = np.ones((300, 100), np.uint8)
    assert coder.encode(everything, 2) == (b"", b"")
    assert coder.encode(everything * 0, 9) == (b"\x01", b"")
    assert coder.encode(everything[:0], 9) == (b"", b"")
    assert coder.encode(everything * 5, 9).positions == b""
    assert coder.encode(random_symbols((30, 30), 0.5, 2), 2).values == b""


def test_huffman_codes_gaps_with_fillers() -> None:
    symbols = np.zeros((2, 400), np.uint8)
    symbols.flat[[0, 3, 4, 259, 515, 799]] = [1, 2, 3, 1, 2, 3]
    streams = CODERS["huffman"].encode(symbols, 4)
    # 254 zeros fit into a byte, 255 take a filler and a gap of 0, 283 a filler and a gap of 28.
    assert [*zlib.decompress(streams.positions[1:], -15)] == [0, 2, 0, 254, 255, 0, 255, 28]
    assert [*zlib.decompress(streams.values, -15)] == [1, 2, 3, 1, 2, 3]


def test_huffman_gaps_cross_chunks() -> None:
    first, pending = Huffman.gaps(np.array([0, 7, 0]), 0)
    middle, pending = Huffman.gaps(np.array([0, 0, 0]), pending)
    last, pending = Huffman.gaps(np.array([0, 0, 7]), pending)
    assert (first.tolist(), middle.tolist(), last.tolist(), pending) == ([1], [], [6], 0)


def test_ans_gaps() -> None:
    lengths, gaps = Ans.gaps(np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]))
    assert (lengths.tolist(), gaps.tolist()) == ([0, 1, 3], [1, 2, 8])


def test_each_coder_improves_on_the_one_before() -> None:
    symbols = structured_symbols()
    huffman, ans, mixed = (sum(map(len, c.encode(symbols, 9))) for c in CODERS.values())
    assert ans < huffman
    assert mixed < 0.9 * ans


@pytest.mark.parametrize("name", ["ans", "context"])
def test_near_the_entropy_of_independent_weights(name: str) -> None:
    symbols = random_symbols((500, 600), 0.1, 17)
    positions = symbols.size * (0.1 * np.log2(10) + 0.9 * np.log2(10 / 9)) / 8
    values = np.count_nonzero(symbols) * 4 / 8
    streams = CODERS[name].encode(symbols, 17)
    assert len(streams.positions) < 1.02 * positions
    assert len(streams.values) < 1.01 * values


@pytest.mark.parametrize("name", ["ans", "context"])
def test_small_vectors_cost_little_more_than_their_entropy(name: str) -> None:
    symbols = random_symbols((1, 300), 1.0, 9)
    frequencies = np.bincount(symbols[0])[1:] / 300
    entropy = -300 / 8 * float(frequencies @ np.log2(frequencies))
    assert sum(map(len, CODERS[name].encode(symbols, 9))) < entropy + 16


def test_dead_rows_and_columns_cost_little() -> None:
    symbols = np.zeros((400, 784), np.uint8)
    symbols[::4, 300:400] = 1
    assert len(CODERS["context"].encode(symbols, 2).positions) < 60 + 400 / 8


@pytest.mark.parametrize(
    ("kept", "size", "spacing"),
    [(1, 2, 1), (2, 4, 1), (2, 4, 9), (2, 4, 49), (1, 4, 25), (3, 4, 3), (4, 8, 9), (5, 16, 1)],
)
def test_masks_of_groups_cost_hardly_more_than_their_patterns(
    kept: int, size: int, spacing: int
) -> None:
    groups = Groups(size, kept, kept, spacing)
    symbols = grouped_symbols((8, 16 * spacing * (49 // spacing)), groups)
    assert find_groups(symbols) == groups
    positions = CODERS["context"].encode(symbols, 17).positions
    assert 8 * len(positions) < (groups.bits + 0.01) * symbols.size + 60
    assert_round_trip(CODERS["context"], symbols, 17)


def test_groups_in_which_a_quantizer_made_zeros() -> None:
    symbols = grouped_symbols((64, 144), Groups(4, 2, 2, 9))
    symbols *= random_symbols(symbols.shape, 0.95, 2, seed=1).astype(np.uint8)
    assert find_groups(symbols) == Groups(4, 2, 0, 9)
    positions = CODERS["context"].encode(symbols, 17).positions
    # Both weights of a pair stay with probability 0.95², in six places, one with 2·0.05·0.95, …
    entropy = -sum(p * np.log2(p / n) for p, n in ((0.9025, 6), (0.095, 4), (0.0025, 1))) / 4
    assert 8 * len(positions) < 1.01 * entropy * symbols.size + 100
    assert_round_trip(CODERS["context"], symbols, 17)


@given(
    sides=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    size=st.sampled_from([2, 4, 8, 16]),
    spacing=st.integers(1, 7),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_mask_of_groups_comes_back(
    sides: tuple[int, int], size: int, spacing: int, data: st.DataObject
) -> None:
    kept, seed = data.draw(st.integers(1, size - 1)), data.draw(st.integers(0, 9))
    shape = (sides[0], sides[1] * size * spacing)
    symbols = grouped_symbols(shape, Groups(size, kept, kept, spacing), seed)
    density = data.draw(st.sampled_from([1.0, 0.9, 0.6]))
    symbols *= random_symbols(shape, density, 2, seed + 1).astype(np.uint8)
    assert_round_trip(CODERS["context"], symbols, 17)


@pytest.mark.parametrize("density", [0.02, 0.25, 0.5, 0.75])
def test_a_mask_without_structure_has_no_groups(density: float) -> None:
    for shape in ((300, 784), (16, 576), (64, 27)):
        assert find_groups(random_symbols(shape, density, 5)) == NO_GROUPS
    assert find_groups(structured_symbols()) == NO_GROUPS


# One string of base 85 per stream.
STORED = {
    "huffman": (
        "0yA;v=3x<HU}s=x;uO^2;^I`3W#i=#;$jkJV`5?F<>XYCW@Kb#WMpLo00",
        "1;K$005A-LFfkhbKY4Z`*V{W9I660?CL=TR0{",
    ),
    "ans": (
        "0^=1Il@}FcWMp7qU|?WiU|?WiU|;|M003ad!;*MYc%POX`((_k!oh-9y#NPp*PHB^CL|Ap0s",
        "ljfA<6_*77$eg11k?(mX>d@t55cy&O",
    ),
    "context": (
        "0ssRpmVfxirl>|)<jUK3R2P)ayAijB;nE;HrGp4cnVt",
        "6a$6RRu+1maPiGAivcEn",
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_streams_are_decoded_alike_everywhere(name: str) -> None:
    i, j = np.mgrid[:24, :30]
    hashed = (i * 7919 + j * 104729 + i * j * 31) % 1009
    symbols = np.where(hashed < 5 * (i % 7) * (j % 9), 1 + hashed % 6, 0).astype(np.uint8)
    streams = Streams(*map(base64.b85decode, STORED[name]))
    np.testing.assert_array_equal(CODERS[name].decode(streams, (24, 30), 7), symbols)
    assert CODERS[name].encode(symbols, 7) == streams


@every_coder
def test_coding_is_deterministic(coder: Coder) -> None:
    symbols = structured_symbols()
    assert coder.encode(symbols, 9) == coder.encode(symbols.copy(), 9)


def test_rounding_of_the_tables_is_safe() -> None:
    odds = np.arange(1, 2**16) / np.arange(2**16 - 1, 0, -1)
    logits = 256 * np.log(odds)
    sigmoids = 2**16 / (1 + np.exp(-np.arange(-2900, 2901) / 256))
    for exact in (logits, sigmoids):
        assert np.abs(exact % 1 - 0.5).min() > 1e-9
    np.testing.assert_array_equal(context._LOGIT[1:], np.rint(logits))
    np.testing.assert_array_equal(context._SIGMOID, np.rint(sigmoids).clip(1, 2**16 - 1))


@every_coder
def test_damaged_streams_never_crash(coder: Coder) -> None:
    rng = np.random.default_rng(0)
    symbols = random_symbols((50, 60), 0.2, 9)
    positions, values = coder.encode(symbols, 9)
    wide = coder.encode(random_symbols((50, 60), 0.2, 700), 700)
    damaged = [Streams(b"", b""), Streams(positions, b""), Streams(b"\x02", values)]
    for _ in range(50):
        noise = rng.bytes(int(rng.integers(0, 200)))
        cut = int(rng.integers(0, len(positions)))
        flipped = bytearray(positions)
        flipped[cut] ^= 1 << int(rng.integers(8))
        damaged += [
            Streams(noise, noise),
            Streams(b"\x02" + noise, noise),
            Streams(positions, noise),
            Streams(positions, values[: cut % len(values)]),
            Streams(positions[:cut], values),
            Streams(bytes(flipped), values),
        ]
    for alphabet in (9, 700):
        for streams in [*damaged, wide]:
            try:
                decoded = coder.decode(streams, (50, 60), alphabet)
            except ValueError:
                continue
            assert decoded.shape == (50, 60)
            assert int(decoded.max()) < alphabet


@every_coder
def test_more_weights_than_the_streams_can_stand_for_are_refused(coder: Coder) -> None:
    with pytest.raises(ValueError, match="short"):
        coder.decode(Streams(b"\x01", b""), (2**30, 2**30), 9)
    empty = np.zeros((2000, 2000), np.uint8)
    assert_round_trip(coder, empty, 9)
    assert_round_trip(coder, empty + np.uint8(1), 2)
    empty[1234, 567] = 1
    assert_round_trip(coder, empty, 2)


def test_sizes_of_a_real_network() -> None:
    if not INTS.exists():
        pytest.skip(f"{INTS} is not there: set FITSMALL_DATA")
    total = 0
    with np.load(INTS) as matrices:
        for matrix in matrices.values():
            levels, symbols = np.unique(np.append(matrix, 0), return_inverse=True)
            zero = int(np.searchsorted(levels, 0))
            symbols = np.where(symbols == zero, 0, symbols + (symbols < zero))[:-1]
            symbols = symbols.reshape(matrix.shape).astype(np.uint8)
            streams = CODERS["context"].encode(symbols, len(levels))
            decoded = CODERS["context"].decode(streams, symbols.shape, len(levels))
            codebook = np.concatenate([[0], levels[levels != 0]])
            np.testing.assert_array_equal(codebook[decoded], matrix)
            total += sum(map(len, streams)) + len(levels) - 1 + 12  # int8 levels, shape, lengths
    # NNCodec 2.1.3 (ISO/IEC 15938-17) takes 7,695 bytes, independent symbols 8,365.
    assert total < 7000


def test_a_mask_costs_no_more_when_it_is_transposed() -> None:
    """Each unit reads a patch of an image, in a matrix of medium size."""
    mask = np.zeros((200, 28, 28), np.uint8)
    for unit, (top, left) in zip(
        mask, np.random.default_rng(0).integers(20, size=(200, 2)), strict=True
    ):
        unit[top : top + 8, left : left + 8] = 1
    rows = mask.reshape(200, -1)
    lengths = [len(context.encode_mask(np.ascontiguousarray(own))) for own in (rows, rows.T)]
    assert lengths[1] <= 1.05 * lengths[0]
