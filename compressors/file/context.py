"""Adaptive arithmetic coding of sparse, clustered matrices by mixed contexts.

A matrix of symbols is coded bit by bit: which columns and rows are empty, which of the other
weights are kept, then the sign and magnitude of each kept weight. A bit costs -log₂ of its
probability

    p = sigmoid(Σᵢ wᵢ·logit pᵢ),        then   wᵢ ← wᵢ + η·(bit - p)·logit pᵢ,

where pᵢ is the frequency of ones so far in context i (a column, a row, a neighbourhood, …), known
to encoder and decoder. Log-odds of independent evidence add up, so the mixture is in log-odds; the
weights learn which evidence to trust. (Mahoney, "Adaptive weighing of context models for lossless
data compression", 2005.)

All arithmetic is on integers, so that every machine decodes the same weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fitsmall.compressors.file.groups import LARGEST_GROUP, NO_GROUPS, Groups, find_groups

__all__ = ["decode_mask", "decode_values", "encode_mask", "encode_values"]

Symbols = NDArray[Any]  # 2-D, uint8 or uint16
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Bits are coded with probabilities of 16 bits, so that a sure zero costs 2e-5 bits, and frequencies
# are averaged with 22. Log-odds are in units of 1/256; those of 65535 to 1 are 2839.
_ONE = 1 << 16
_HALF = 1 << 21
_LIMIT = 2900

# Frequencies move by 1/(n + 3/2) after n observations, towards the average of what they saw; from
# _MEMORY on they follow the recent past. A row or a column is worth a longer memory.
_RATE = (2 * _ONE // (2 * np.arange(1024) + 3)).astype(np.int64)
_MEMORY = 500
_LONG_MEMORY = 1000

# Rounding these tables is the same everywhere: no entry is within 1e-9 of a tie.
_odds = np.arange(1, _ONE) / np.arange(_ONE - 1, 0, -1)
_LOGIT = np.rint(256 * np.log(np.concatenate([_odds[:1], _odds]))).astype(np.int32)
_sigmoid = 1 / (1 + np.exp(-np.arange(-_LIMIT, _LIMIT + 1) / 256))
_SIGMOID = np.rint(_ONE * _sigmoid).clip(1, _ONE - 1).astype(np.int32)

_CONTEXTS = 6  # adaptive frequencies in a mixture …
_INPUTS = _CONTEXTS + 4  # … and log-odds that the caller sets
_KINDS = 19  # sets of mixing weights, one per kind of bit
_MASK_RATE, _VALUE_RATE = 8, 12  # η·4096: masks are long and sparse, values few

_CHUNK = 2**20  # weights that a kernel sees at once
_WIDEST = 2**16  # longer rows are cut, so that the state per column stays small
_SAMPLE = 2**15  # weights on which the encoder compares strides of a mask …
_VALUES_SAMPLE = 2**11  # … kept weights, about, on which it compares its options for values …
_WHOLE = 2**18  # … and the most weights of a mask that may be transposed
_PLAIN, _TRANSPOSED, _GROUPED = range(3)  # layouts of a mask: first byte of its stream
_GROUP_SLOTS, _PRIOR = 1536, 60  # first slot of groups; observations that their start is worth
_CLOSEST = 3  # smallest stride: closer ones would make two neighbours coincide

# Fields of the arithmetic coder, and the constants that keep its arithmetic on 64 unsigned bits.
_LOW, _HIGH, _CODE, _POSITION, _DECODING = range(5)
_U0, _U1, _U8, _U16, _U56, _U255 = (np.uint64(k) for k in (0, 1, 8, 16, 56, 255))


class _Mixer(NamedTuple):
    """State of the arithmetic coder and of the mixture of contexts."""

    coder: NDArray[np.uint64]  # low, high, code, position, decoding
    slots: NDArray[np.uint32]  # by context: frequency of ones (22 bits), observations (10 bits)
    weights: NDArray[np.int32]  # (kinds, inputs), in units of 1/65536
    context: NDArray[np.int64]  # (contexts,): the slots of the next bit
    logits: NDArray[np.int32]  # (inputs,): the first are those of the slots


class _MaskState(NamedTuple):
    """State of the coder of a mask between two chunks."""

    live: NDArray[np.int64]  # columns that are not empty
    column: NDArray[np.int64]  # (pad + width + pad,): frequency of ones in each column
    line: NDArray[np.int8]  # (pad + width + pad,): the current row
    rows: NDArray[np.int64]  # rows so far that are not empty; whether the last one is


class _ValueState(NamedTuple):
    """State of the coder of values. A value is its sign times its rank from zero, or 0."""

    above: NDArray[np.int64]  # (width,): last value of each column
    line: NDArray[np.int64]  # (pad + width + pad,): the current row


def _compiled(function: _Function) -> _Function:
    return cast(_Function, njit(cache=True)(function))


# ------------------------------------------------------------------------------------- one bit


@_compiled
def _code(coder: Any, data: Any, p: int, bit: int) -> int:
    """Codes a bit that is 1 with probability p/65536: writes it, or reads and returns it.

    The interval [low, high] of 64-bit fractions is split in proportion. Leading bytes on which both
    ends agree are written to the data, or read from it; zeros follow after its end.
    """
    low, high, decoding = coder[_LOW], coder[_HIGH], coder[_DECODING] != _U0
    middle = low + ((high - low) >> _U16) * np.uint64(p)
    if decoding:
        bit = 1 if coder[_CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + _U1
    while (low ^ high) >> _U56 == _U0:
        position = np.int64(coder[_POSITION])
        if decoding:
            byte = np.uint64(data[position]) if position < data.size else _U0
            coder[_CODE] = (coder[_CODE] << _U8) | byte
        else:
            data[position] = high >> _U56
        coder[_POSITION] = np.uint64(position + 1)
        low, high = low << _U8, (high << _U8) | _U255
    coder[_LOW], coder[_HIGH] = low, high
    return bit


@_compiled
def _adapt(slots: Any, k: int, bit: int) -> None:
    p, n = np.int64(slots[k]) >> 10, np.int64(slots[k]) & 1023
    p += ((bit << 22) - p) * _RATE[n] >> 16
    slots[k] = (p << 10) | min(n + 1, _MEMORY)


@_compiled
def _flag(mixer: Any, data: Any, k: int, bit: int) -> int:
    """Codes a bit by the frequency in slot k alone."""
    p: Any = np.int64(mixer.slots[k]) >> 16
    bit = _code(mixer.coder, data, min(max(p, 1), _ONE - 1), bit)
    _adapt(mixer.slots, k, bit)
    return bit


@_compiled
def _mixed(mixer: Any, data: Any, kind: int, rate: int, bit: int) -> int:
    """Codes a bit by the mixture, and learns from it."""
    slots, context, logits, weights = mixer.slots, mixer.context, mixer.logits, mixer.weights[kind]
    for i in range(_CONTEXTS):
        logits[i] = _LOGIT[slots[context[i]] >> 16]
    total = 0
    for i in range(_INPUTS):
        total += weights[i] * logits[i]
    p = _SIGMOID[min(max((total >> 16) + _LIMIT, 0), 2 * _LIMIT)]
    bit = _code(mixer.coder, data, p, bit)
    error = ((bit << 16) - p) * rate
    for i in range(_INPUTS):
        weights[i] += (error * logits[i] + (1 << 19)) >> 20
    for i in range(_CONTEXTS):
        _adapt(slots, context[i], bit)
    return bit


# --------------------------------------------------------------------------------------- masks


@_compiled
def _code_columns(live: Any, data: Any, mixer: Any, stride: int) -> None:
    """Codes which columns are alive, not all zero. Dead ones come in patches, as image borders."""
    for j in range(live.size):
        west = live[j - 1] if j >= 1 else 0
        north = live[j - stride] if j >= stride else 0
        northeast = live[j - stride + 1] if j >= stride else 0
        live[j] = _flag(mixer, data, west + 2 * north + 4 * northeast, live[j])


@_compiled
def _level(logit: int, usual: int) -> int:
    """A density relative to the usual one, on a scale of eight levels of half a nat."""
    return min(max(((logit - usual) >> 7) + 4, 0), 7)


@_compiled
def _code_mask(
    mask: Any, data: Any, mixer: Any, state: Any, stride: int, density: int, groups: Any
) -> None:
    """Codes rows of ones and zeros. A row is an image, or kernels, of lines of `stride` weights.

    In a group of N:M structure the place in the group and the ones before it are the context, and
    ones or zeros that the structure leaves no choice about are not coded.
    """
    line, column, context, logits = state.line, state.column, mixer.context, mixer.logits
    size, most, least, spacing = groups
    counts = np.zeros(spacing, np.int64)  # ones so far in each of the groups that interleave
    is_known, count, group = False, 0, 0
    pad = 2 * stride + 2
    usual = _LOGIT[density >> 6]
    logits[_CONTEXTS + 3] = usual
    for i in range(mask.shape[0]):
        alive = _flag(mixer, data, 8 + state.rows[1], 1 if mask[i].any() else 0)
        state.rows[1] = alive
        if not alive:
            continue
        line[:] = 0
        row = density
        seen = 20  # observations that the prior is worth, of a row here, of a column below
        column_rate = _RATE[min(state.rows[0] + 3, _LONG_MEMORY)]
        state.rows[0] += 1
        for j in state.live:
            if j >= mask.shape[1]:
                break
            k = pad + j
            west, north = line[k - 1], line[k - stride]
            northwest, northeast = line[k - stride - 1], line[k - stride + 1]
            near = west + north + northwest + northeast
            far = line[k - 2] + line[k - stride - 2] + line[k - stride + 2]
            far += line[k - 2 * stride - 1] + line[k - 2 * stride] + line[k - 2 * stride + 1]
            around = column[k - 1] + column[k + 1] + column[k - stride] + column[k + stride]
            logits[_CONTEXTS] = _LOGIT[column[k] >> 6]
            logits[_CONTEXTS + 1] = _LOGIT[row >> 6]
            logits[_CONTEXTS + 2] = _LOGIT[around >> 8]
            c = _level(logits[_CONTEXTS], usual)
            r = _level(logits[_CONTEXTS + 1], usual)
            a = _level(logits[_CONTEXTS + 2], usual)
            context[0] = 64 + west + 2 * north + 4 * northwest + 8 * northeast + 16 * min(far, 3)
            context[1] = 128 + 8 * c + r
            context[2] = 192 + 8 * a + c
            context[3] = 256 + 32 * min(near, 3) + 8 * min(far, 3) + r
            context[4] = 512 + 64 * min(near, 3) + 8 * a + r
            context[5] = 1024 + 64 * min(near + far, 7) + 8 * c + r
            kept: Any = np.int64(mask[i, j])  # as a condition, it would halve the speed
            kind = 0
            if size:
                member, group = j // spacing % size, j % spacing
                if member == 0:
                    counts[group] = 0
                count = counts[group]
                is_known = count == most or count + size - member == least
                kind = 1 + member
                context[0] = _GROUP_SLOTS + LARGEST_GROUP * member + count
            if is_known:
                bit = 1 if count < most else 0
            else:
                bit = _mixed(mixer, data, kind, _MASK_RATE, kept)
            if size:
                counts[group] += bit
            mask[i, j] = bit
            line[k] = bit
            row += ((bit << 22) - row) * _RATE[min(seen, _LONG_MEMORY)] >> 16
            column[k] += ((bit << 22) - column[k]) * column_rate >> 16
            seen += 1


# -------------------------------------------------------------------------------------- values


@_compiled
def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


@_compiled
def _class(value: int) -> int:
    """0 pruned; 1 and 2 small and large negative; 3 and 4 small and large positive."""
    return 0 if value == 0 else (1 if value < 0 else 3) + (abs(value) > 2)


@_compiled
def _node(mixer: Any, data: Any, base: Any, nodes: int, node: int, kind: int, bit: int) -> int:
    """Codes one decision on the way to a value; each has its own slots."""
    for i in range(_CONTEXTS):
        mixer.context[i] = (100 * i + base[i]) * nodes + node
    return _mixed(mixer, data, kind, _VALUE_RATE, bit)


@_compiled
def _code_value(
    mixer: Any, data: Any, base: Any, nodes: int, below: int, above: int, value: int
) -> int:
    """Codes a value in [-below, above], not 0: its sign, then Elias' gamma code of its rank."""
    negative = 1 if below and (value < 0 or not above) else 0
    if below and above:
        negative = _node(mixer, data, base, nodes, 0, 0, negative)
    highest, rank = (below if negative else above), abs(value)
    first = 1 + negative * (nodes >> 1)
    length = 0
    while highest >> (length + 1):
        longer = 1 if rank >> (length + 1) else 0
        if not _node(mixer, data, base, nodes, first + length, 1 + length, longer):
            break
        length += 1
    first += 17 + ((1 << length) if length < 7 else 64 * (length - 5))
    prefix = 1
    for shift in range(length - 1, -1, -1):
        bit = (rank >> shift) & 1
        if prefix < 64:
            bit = _node(mixer, data, base, nodes, first + prefix, 18, bit)
        else:  # the last bits of large ranks are noise
            bit = _code(mixer.coder, data, _ONE >> 1, bit)
        prefix = 2 * prefix + bit
    rank = min(prefix, highest)
    return -rank if negative else rank


@_compiled
def _code_values(
    symbols: Any, data: Any, mixer: Any, state: Any, stride: int, below: int, above: int, nodes: int
) -> None:
    """Codes the symbols that are not 0: 1 … `below` are negative values, the rest positive ones."""
    line = state.line
    pad = 2 * stride + 2
    base = np.zeros(_CONTEXTS, np.int64)
    for i in range(symbols.shape[0]):
        line[:] = 0
        balance = 0  # positive minus negative values of the row, roughly
        last = 0
        for j in range(symbols.shape[1]):
            symbol = symbols[i, j]
            if symbol == 0:
                continue
            k = pad + j
            west, north = line[k - 1], line[k - stride]
            northwest, northeast = line[k - stride - 1], line[k - stride + 1]
            lean = _sign(west) + _sign(north)
            count = size = 0
            for neighbour in (
                *(west, north, northwest, northeast, line[k - 2], line[k - 2 * stride]),
                *(line[k - stride + 2], line[k - stride - 2]),
            ):
                lean += _sign(neighbour)
                count += neighbour != 0
                size += abs(neighbour)
            lean = 4 + _sign(lean) * min((abs(lean) + 2) // 3, 3)
            size = 0 if count == 0 else 1 + min((2 * size - count) // (2 * count), 3)
            pattern = 27 * _sign(west) + 9 * _sign(north) + 3 * _sign(northwest) + _sign(northeast)
            base[1] = 40 + pattern
            base[2] = 5 * lean + size
            base[3] = 8 * lean + min(max(balance // 2 + 3, 0), 6)
            base[4] = 5 * _class(state.above[j]) + _class(last)
            base[5] = 5 * _class(west) + _class(north)
            value = symbol - below - 1 if symbol <= below else symbol - below
            value = _code_value(mixer, data, base, nodes, below, above, value)
            symbols[i, j] = value + below + 1 if value < 0 else value + below
            line[k] = state.above[j] = last = value
            balance = min(max(balance + _sign(value), -8), 8)


# -------------------------------------------------------------------------- streams and headers


class _Stream:
    """The mixer of a stream, and its bytes: read where they are given, collected where not."""

    def __init__(self, data: bytes | None, slots: int, start: int, weights: list[float]) -> None:
        decoding = data is not None
        first = (data or b"")[:8].ljust(8, b"\0")
        coder = [0, 2**64 - 1, int.from_bytes(first, "big"), 8 if decoding else 0, decoding]
        self.mixer = _Mixer(
            np.array(coder, np.uint64),
            np.full(slots, start << 10, np.uint32),
            np.tile(np.array([round(w * _ONE) for w in weights], np.int32), (_KINDS, 1)),
            np.zeros(_CONTEXTS, np.int64),
            np.zeros(_INPUTS, np.int32),
        )
        self.decoding = decoding
        self._buffer = np.frombuffer(bytearray(data or b""), np.uint8)
        self._written = bytearray()

    def buffer(self, bits: int) -> NDArray[np.uint8]:
        """The bytes to read, or room to write ``bits`` more bits: eight bytes each at the worst."""
        if not self.decoding:
            self._flush()
            self._buffer = np.empty(8 * bits, np.uint8)
        return self._buffer

    def _flush(self) -> None:
        self._written += self._buffer[: int(self.mixer.coder[_POSITION])].tobytes()
        self.mixer.coder[_POSITION] = 0

    def written(self) -> bytes:
        """All bytes, ended by the shortest ones that zeros may follow."""
        self._flush()
        low, high = int(self.mixer.coder[_LOW]), int(self.mixer.coder[_HIGH])
        for length in range(9):
            end = high >> (64 - 8 * length) << (64 - 8 * length)
            if end >= low:
                break
        return (bytes(self._written) + end.to_bytes(8, "big")[:length]).rstrip(b"\0")


def _chunks(symbols: Symbols, size: int) -> Iterator[Symbols]:
    """Views of consecutive rows, ``size`` weights or a little more; too long rows are cut."""
    rows, width = symbols.shape
    step = max(1, size // width)
    for top in range(0, rows, step):
        for left in range(0, width, _WIDEST):
            yield symbols[top : top + step, left : left + _WIDEST]


def _sample(symbols: Symbols, size: int) -> Symbols:
    return symbols[: max(1, size // symbols.shape[1]), :size]


def _strides(symbols: Symbols) -> list[int]:
    """Candidates for the width of the image or kernel in a row: peaks of the autocorrelation."""
    x = symbols - symbols.mean()
    spectrum = np.abs(np.fft.rfft(x, 2 * x.shape[1])) ** 2
    likeness = np.fft.irfft(spectrum.sum(axis=0))[_CLOSEST : min(256, x.shape[1])]
    return sorted({_CLOSEST, *(_CLOSEST + int(k) for k in np.argsort(-likeness)[:3])})


def _density(byte: int) -> int:
    """A 22-bit frequency from one byte: 1, 31/32, … 17/32, 1/2, 31/64, … 17/2²⁰."""
    return min((32 - (byte & 15)) << 17 >> (byte >> 4), (1 << 22) - 1)


_DENSITIES = np.array([_density(byte) for byte in range(256)])


def _expect(groups: Groups, mixer: _Mixer) -> None:
    """Starts from equally likely patterns of a group, and without trust in other contexts."""
    for member in range(groups.size):
        for count in range(groups.most):
            p = min((groups.most - count) / (groups.size - member), 31 / 32)
            slot = _GROUP_SLOTS + LARGEST_GROUP * member + count
            mixer.slots[slot] = (round(p * 2**22) << 10) + _PRIOR
    mixer.weights[1:] = [_ONE] + [0] * (_INPUTS - 1)


def _run_mask(symbols: Symbols, header: bytes, data: bytes | None = None) -> bytes:
    """Codes where the symbols are not zero, or sets them to one there if there are data."""
    layout, *settings = header
    groups = NO_GROUPS
    if layout == _GROUPED:
        groups = Groups(*settings)
        stride, density = _CLOSEST, (groups.most << 22) // groups.size
    else:
        stride, density = settings[0], _density(settings[1])
    matrix = symbols.T if layout == _TRANSPOSED else symbols
    # Evidence is worth about a tenth at first: the contexts overlap.
    stream = _Stream(data, 2048, density, [0.1] * _CONTEXTS + [0.2, 0.2, 0.2, 0.0])
    stream.mixer.slots[:64] = _HALF << 10  # flags
    if groups.size:
        _expect(groups, stream.mixer)
    width, pad = min(matrix.shape[1], _WIDEST), 2 * stride + 2
    live = np.ones(width, np.int64)
    if matrix.shape[0] >= 8 and not groups.size:  # fewer rows cannot pay for flags
        if not stream.decoding:
            live[:] = 0
            for chunk in _chunks(matrix, _CHUNK):
                live[: chunk.shape[1]] |= chunk.any(axis=0)
        _code_columns(live, stream.buffer(width), stream.mixer, stride)
    state = _MaskState(
        np.flatnonzero(live),
        np.full(width + 2 * pad, density),
        np.zeros(width + 2 * pad, np.int8),
        np.array([0, 1]),
    )
    for chunk in _chunks(matrix, _CHUNK):
        mask = np.ascontiguousarray(chunk != 0).view(np.uint8)
        buffer = stream.buffer(mask.size + len(mask))
        _code_mask(mask, buffer, stream.mixer, state, stride, density, groups)
        if stream.decoding:
            chunk[:] = mask
    return b"" if stream.decoding else stream.written()


def encode_mask(symbols: Symbols) -> bytes:
    """Codes where the symbols of a matrix are not zero.

    A header says what suits the mask best, tried out on a sample: rows first or columns first, with
    the width of an image or kernel in a row and the density outside of empty rows and columns; or
    groups of N:M structure in the rows.
    """
    sample = _sample(symbols, _SAMPLE) != 0
    area = np.count_nonzero(sample.any(axis=0)) * np.count_nonzero(sample.any(axis=1))
    density = np.count_nonzero(symbols) / symbols.size * sample.size / max(area, 1)
    byte = int(np.abs(_DENSITIES - density * 2**22).argmin())

    def best(headers: list[bytes], sample: Symbols) -> bytes:
        return min(headers, key=lambda header: len(_run_mask(sample, header)))

    headers, compared = [bytes([_PLAIN, _CLOSEST, byte])], sample
    if symbols.size <= _WHOLE:
        headers += [bytes([_TRANSPOSED, _CLOSEST, byte])]
        compared = symbols != 0
    if symbols.shape[1] <= _WIDEST and (groups := find_groups(symbols)).size:
        headers += [bytes([_GROUPED, *groups])]
    header = best(headers, compared)
    if header[0] == _TRANSPOSED:
        sample = _sample(compared.T, _SAMPLE).T
    if header[0] != _GROUPED:
        strides = _strides(sample.T if header[0] == _TRANSPOSED else sample)
        header = best([bytes([header[0], stride, byte]) for stride in strides], sample)
    return header + _run_mask(symbols, header)


def decode_mask(data: bytes, symbols: Symbols) -> None:
    """Sets those symbols to one that were not zero; all must be zero before."""
    length = 5 if data[:1] == bytes([_GROUPED]) else 3
    header = data[:length]
    if len(header) < length or header[0] > _GROUPED:
        raise ValueError("damaged positions")
    if header[0] == _GROUPED:
        size, most, least, spacing = header[1:]
        if not least <= most < size <= LARGEST_GROUP or not most or not spacing:
            raise ValueError("damaged positions")
    elif header[1] < _CLOSEST:
        raise ValueError("damaged positions")
    _run_mask(symbols, header, data[length:])


def _run_values(symbols: Symbols, alphabet: int, header: bytes, data: bytes | None = None) -> bytes:
    """Codes the symbols that are not zero, or replaces them if there are data."""
    stride, below = header[0], int.from_bytes(header[1:], "little")
    above = alphabet - 1 - below
    longest = max(below, above).bit_length() - 1
    nodes = 2 * (18 + (2 << longest if longest < 7 else 64 * (longest - 4)))  # see _code_value
    stream = _Stream(data, 100 * _CONTEXTS * nodes, _HALF, [0.16] * _CONTEXTS + [0.0] * 4)
    width = min(symbols.shape[1], _WIDEST)
    state = _ValueState(np.zeros(width, np.int64), np.zeros(width + 4 * stride + 4, np.int64))
    for chunk in _chunks(symbols, _CHUNK >> 4):
        values = chunk.astype(np.int64)
        buffer = stream.buffer(34 * int(np.count_nonzero(values)))  # sign, 15 + 1 lengths, 15 bits
        _code_values(values, buffer, stream.mixer, state, stride, below, above, nodes)
        if stream.decoding:
            chunk[:] = values
    return b"" if stream.decoding else stream.written()


def encode_values(symbols: Symbols, alphabet: int) -> bytes:
    """Codes the symbols that are not zero, given where they are.

    The header has the width of an image or kernel in a row, and the number of symbols below zero.
    """
    kept = int(np.count_nonzero(symbols))
    sample = _sample(symbols, min(_VALUES_SAMPLE * symbols.size // kept, 8 * _SAMPLE))

    def cost(header: bytes) -> int:
        return len(_run_values(sample, alphabet, header))

    def header(stride: int, below: int) -> bytes:
        return bytes([stride]) + below.to_bytes(1 if alphabet <= 256 else 2, "little")

    # Ranks from the median are shortest, and zero may be a level or two from it. A few values of
    # many levels are best without signs.
    shares = np.bincount(sample.ravel(), minlength=alphabet)[1:].cumsum()
    median = int(np.searchsorted(shares, shares[-1] / 2))
    stride = min(_strides(sample), key=lambda stride: cost(header(stride, median)))
    splits = {0, *range(max(0, median - 2), min(median + 3, alphabet))}
    best = min((header(stride, below) for below in sorted(splits)), key=cost)
    return best + _run_values(symbols, alphabet, best)


def decode_values(data: bytes, symbols: Symbols, alphabet: int) -> None:
    """Replaces the symbols that are not zero by values in [1, alphabet)."""
    size = 2 if alphabet <= 256 else 3
    if len(data) < size or data[0] < _CLOSEST:
        raise ValueError("damaged values")
    if int.from_bytes(data[1:size], "little") >= alphabet:
        raise ValueError("damaged values")
    _run_values(symbols, alphabet, data[:size], data[size:])
