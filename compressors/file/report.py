"""Where the bytes of a compressed file go, layer by layer, as in the tables of Deep Compression."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fitsmall.compressors.file.coding import Symbols
from fitsmall.compressors.file.reader import Payload, entries, payloads
from fitsmall.compressors.naming import printable
from fitsmall.compressors.surgery.kinds import changes
from fitsmall.compressors.surgery.protocol import Changed, TensorSpec
from fitsmall.compressors.text_table import aligned

__all__ = ["Report", "TensorReport", "inspect"]

# Width of the relative index in Deep Compression's sparse format: 8 bits in convolutions, 5 in
# fully connected layers; a longer gap needs a filler zero.
_CONV_GAP, _LINEAR_GAP = 8, 5

_BLOCK = 2**20


@dataclass(frozen=True)
class TensorReport:
    """One tensor's share of a file; all sizes in bytes.

    Args:
        name: Key in the state dict.
        shape: Shape of the tensor.
        weights: Number of weights.
        kept: Number of non-zero weights.
        levels: Distinct non-zero values, or integers; 0 where they are stored as floats.
        bytes_dense: The tensor uncompressed.
        pruned_bytes: After pruning alone (P): non-zero weights at full width with relative
            indexes of fixed width.
        shared_bytes: After pruning and sharing or quantization (P+Q): indexes of fixed width, and
            the codebook or the scales.
        position_bytes: Entropy-coded positions in the file.
        value_bytes: Entropy-coded values in the file.
        float_bytes: Codebook, scales, or the values themselves in the file.

    Of a sum or a product the sizes are those of its parts together, and ``kept`` counts its own
    non-zero weights.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    levels: int
    bytes_dense: int
    pruned_bytes: int
    shared_bytes: int
    position_bytes: int
    value_bytes: int
    float_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes in the file (P+Q+coding)."""
        return self.position_bytes + self.value_bytes + self.float_bytes

    @property
    def position_bits(self) -> float:
        """Bits of position for each non-zero weight."""
        return 8 * self.position_bytes / max(1, self.kept)

    @property
    def value_bits(self) -> float:
        """Bits of value for each non-zero weight, the codebook apart."""
        floats = 0 if self.levels else self.float_bytes
        return 8 * (self.value_bytes + floats) / max(1, self.kept)


@dataclass(frozen=True)
class Report:
    """The bytes of a compressed file, tensor by tensor; :meth:`table` prints them.

    Args:
        path: The file.
        coder: Name of its coder.
        tensors: One report for each tensor; tied ones count once, under their first name.
        changed: A row for each layer that surgery changed in training.
        overhead: Bytes of header, directory, padding and checksum.
        total: Size of the file.
    """

    path: Path
    coder: str
    tensors: tuple[TensorReport, ...]
    changed: tuple[Changed, ...]
    overhead: int
    total: int

    @property
    def bytes_dense(self) -> int:
        """Bytes of the same tensors uncompressed, with changed layers as they were before."""
        saved = sum(layer.bytes_before - layer.bytes for layer in self.changed)
        return sum(tensor.bytes_dense for tensor in self.tensors) + saved

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than its tensors."""
        return self.bytes_dense / self.total

    def table(self) -> str:
        """A table like Tables 2 to 5 of Deep Compression; its sizes add up to the file's."""
        rows = [
            (
                "tensor",
                "weights",
                "kept",
                "kept %",
                "levels",
                "value bits",
                "position bits",
                "P",
                "P+Q",
                f"P+Q+{self.coder}",
                "% of dense",
            )
        ]
        for tensor in self.tensors:
            if not tensor.weights:  # a mark of surgery, which the last line tells
                continue
            rows.append(
                (
                    tensor.name,
                    f"{tensor.weights:,}",
                    f"{tensor.kept:,}",
                    f"{100 * tensor.kept / max(1, tensor.weights):.1f}",
                    str(tensor.levels or "-"),
                    f"{tensor.value_bits:.2f}",
                    f"{tensor.position_bits:.2f}",
                    f"{tensor.pruned_bytes:,}",
                    f"{tensor.shared_bytes:,}",
                    f"{tensor.bytes:,}",
                    f"{100 * tensor.bytes / max(1, tensor.bytes_dense):.2f}",
                )
            )
        overhead = f"{self.overhead:,}"
        rows.append(("header, directory", "", "", "", "", "", "", overhead, overhead, overhead, ""))
        weights = sum(tensor.weights for tensor in self.tensors)
        kept = sum(tensor.kept for tensor in self.tensors)
        rows.append(
            (
                "total",
                f"{weights:,}",
                f"{kept:,}",
                f"{100 * kept / max(1, weights):.1f}",
                "",
                f"{_mean([t.value_bits for t in self.tensors], self.tensors):.2f}",
                f"{_mean([t.position_bits for t in self.tensors], self.tensors):.2f}",
                f"{self.overhead + sum(tensor.pruned_bytes for tensor in self.tensors):,}",
                f"{self.overhead + sum(tensor.shared_bytes for tensor in self.tensors):,}",
                f"{self.total:,}",
                f"{100 * self.total / max(1, self.bytes_dense):.2f}",
            )
        )
        lines = aligned(rows)
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        name = printable(self.path.name)
        summary = f"{name}: {self.total:,} bytes, {self.ratio:.1f} times smaller than"
        smaller = [layer for layer in self.changed if layer.bytes < layer.bytes_before]
        before = ", with changed layers as they were" if smaller else ""
        changed = [f"{layer.layer}: {layer.description}" for layer in self.changed]
        lines += ["", f"changed layers: {'; '.join(changed)}"] if changed else []
        dense = f"the {self.bytes_dense:,} bytes it restores{before}"
        return "\n".join([*lines, "", f"{summary} {dense}"])


def inspect(path: str | os.PathLike[str], limit: int | None = None) -> Report:
    """Account for every byte of a compressed file.

    Args:
        path: File that :func:`~fitsmall.compressors.save` wrote.
        limit: Most bytes that its tensors may take, see :func:`~fitsmall.compressors.read`.

    Raises:
        ValueError: The file is damaged, truncated, or not a fitsmall file.

    Example:
        >>> import tempfile
        >>> from fitsmall.compressors import save
        >>> path = f"{tempfile.mkdtemp()}/eye.fitsmall"
        >>> size = save(path, {"eye": torch.eye(100)})
        >>> report = inspect(path)
        >>> report.tensors[0].kept, report.bytes_dense, report.total == size
        (100, 40000, True)
    """
    coder, found = entries(path)
    tied = {entry.name for entry in found if entry.kind == "alias"}
    reports = tuple(
        _report(payload) for payload in payloads(path, limit) if payload.entry.name not in tied
    )
    layout = {entry.name: TensorSpec(torch.Size(entry.shape), entry.dtype) for entry in found}
    total = os.path.getsize(path)
    overhead = total - sum(report.bytes for report in reports)
    return Report(Path(path), coder, reports, tuple(changes(layout)), overhead, total)


def _report(payload: Payload) -> TensorReport:
    entry = payload.entry
    leaves = [_leaf_report(leaf) for leaf in payload.leaves()]
    if not payload.parts:
        return leaves[0]
    return TensorReport(
        name=entry.name,
        shape=entry.shape,
        weights=entry.numel,
        kept=int(payload.decode().count_nonzero()),
        levels=0,
        bytes_dense=entry.numel * entry.dtype.itemsize,
        pruned_bytes=sum(leaf.pruned_bytes for leaf in leaves),
        shared_bytes=sum(leaf.shared_bytes for leaf in leaves),
        position_bytes=sum(leaf.position_bytes for leaf in leaves),
        value_bytes=sum(leaf.value_bytes for leaf in leaves),
        float_bytes=sum(leaf.float_bytes for leaf in leaves),
    )


def _leaf_report(leaf: Payload) -> TensorReport:
    entry, symbols = leaf.entry, leaf.symbols
    width = entry.dtype.itemsize
    dense = pruned = shared = entry.numel * width
    levels = entry.levels
    if symbols is None:
        # By bytes, since torch cannot count every dtype that it can hold.
        weights = leaf.floats.view(torch.uint8).view(-1, entry.storage.itemsize)
        kept = int(weights.any(dim=1).count_nonzero())
    else:
        kept, pairs, gap = _relative(symbols, _CONV_GAP if len(entry.shape) > 2 else _LINEAR_GAP)
        pruned = min(dense, math.ceil(pairs * (8 * width + gap) / 8))
        shared = pruned
        if entry.kind in ("shared", "integer"):
            # Without any level all weights are zero.
            index = max(1, math.ceil(math.log2(max(1, levels))))
            shared = math.ceil(pairs * (index + gap) / 8) + entry.floats * width
    return TensorReport(
        name=entry.name,
        shape=entry.shape,
        weights=entry.numel,
        kept=kept,
        levels=levels,
        bytes_dense=dense,
        pruned_bytes=pruned,
        shared_bytes=shared,
        position_bytes=entry.positions,
        value_bytes=entry.values,
        float_bytes=entry.float_bytes,
    )


def _relative(symbols: Symbols, width: int) -> tuple[int, int, int]:
    """Number of non-zero symbols, of pairs with the fillers of long gaps, and bits of a gap."""
    flat = symbols.reshape(-1)
    kept = int(np.count_nonzero(flat))
    if kept == flat.size:
        return kept, kept, 0
    pairs, last = kept, -1
    # Block by block: a position takes eight times its symbol's memory.
    for start in range(0, flat.size, _BLOCK):
        positions = start + np.flatnonzero(flat[start : start + _BLOCK])
        gaps = np.diff(positions, prepend=last) - 1
        pairs += int((gaps >> width).sum())
        last = positions[-1] if positions.size else last
    return kept, pairs, width


def _mean(per_weight: list[float], tensors: tuple[TensorReport, ...]) -> float:
    """Mean over non-zero weights."""
    kept = sum(tensor.kept for tensor in tensors)
    total = sum(bits * tensor.kept for bits, tensor in zip(per_weight, tensors, strict=True))
    return total / max(1, kept)
