"""Labels: a name for each entry of each dimension of a parameter, and which of them are the same.

A tensor in a graph has *fields*: tensors of labels that broadcast to its shape, one for each set of
dimensions along which its entries belong to different units. A field has size 1 in all other
dimensions.
"""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

__all__ = ["FIXED", "Fields", "Labels", "compact", "varying"]

# Label of an entry that belongs to no unit and stays, such as padding.
FIXED = -1

Fields = list[Tensor]


def varying(labels: Tensor) -> set[int]:
    """Return the dimensions along which a field varies.

    Example:
        >>> varying(torch.zeros(1, 3, 2))
        {1, 2}
    """
    return {dim for dim, size in enumerate(labels.shape) if size > 1}


def compact(labels: Tensor) -> Fields:
    """Return labels of each entry as a field; none if they are all the same.

    Example:
        >>> compact(torch.tensor([[0, 0], [1, 1]]))
        [tensor([[0],
                [1]])]
    """
    for dim, size in enumerate(labels.shape):
        head = labels.narrow(dim, 0, 1) if size > 1 else labels
        if torch.equal(head.expand_as(labels), labels):
            labels = head
    return [labels.contiguous()] if labels.numel() > 1 else []


class Labels:
    """Disjoint sets of labels, some of which are fixed."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs = [torch.empty(2, 0, dtype=torch.long)]
        self._fixed: list[Tensor] = []

    def new(self, size: int, dim: int, dims: int) -> Tensor:
        """Return a field of new labels.

        Args:
            size: Number of labels.
            dim: Dimension along which it varies.
            dims: Number of dimensions.
        """
        shape = [1] * dims
        shape[dim] = size
        self._count += size
        return torch.arange(self._count - size, self._count).view(shape)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Make labels the same, entry by entry; what meets a fixed entry is fixed.

        Args:
            a: Labels.
            b: Labels that broadcast with them.
        """
        a, b = (labels.flatten() for labels in torch.broadcast_tensors(a, b))
        both = (a >= 0) & (b >= 0)
        self._pairs.append(torch.stack([a[both], b[both]]).unique(dim=1))
        self.fix(a[b < 0])
        self.fix(b[a < 0])

    def fix(self, *labels: Tensor) -> None:
        """Fix labels: their units stay."""
        self._fixed += [each[each >= 0].unique() for each in labels]

    def roots(self) -> Tensor:
        """Return a number for each label, the same for all of a set, and -1 in fixed sets.

        In each turn the two ends of a pair take the smaller of their numbers, and chains of numbers
        are followed to their ends (Shiloach and Vishkin, 1982).

        Example:
            >>> labels = Labels()
            >>> a, b = labels.new(3, dim=0, dims=1), labels.new(2, dim=0, dims=1)
            >>> labels.unite(a[1:], b)
            >>> labels.fix(b[1])
            >>> labels.roots()
            tensor([ 0,  1, -1,  1, -1])
        """
        pairs = torch.cat(self._pairs, 1)
        roots, found = torch.empty(0).long(), torch.arange(self._count)
        while not torch.equal(roots, found):
            roots = found
            ends = roots[pairs]
            found = roots.scatter_reduce(0, ends.flatten(), ends.amin(0).repeat(2), "amin")
            while not torch.equal(found, found[found]):
                found = found[found]
        fixed = torch.zeros(self._count, dtype=torch.bool)
        for labels in self._fixed:
            fixed[roots[labels]] = True
        return torch.where(fixed[roots], FIXED, roots)

    # Fields.

    def fix_along(self, fields: Fields, dims: Iterable[int]) -> Fields:
        """Make labels along dimensions the same, and return what still varies.

        A field that varies nowhere else is fixed: there is no unit less along these dimensions.
        """
        left = []
        for labels in fields:
            head = labels
            for dim in dims:
                head = head.narrow(dim, 0, 1)
            if head.numel() < labels.numel():
                self.unite(labels, head)
                if head.numel() == 1:
                    self.fix(labels)
            if head.numel() > 1:
                left.append(head)
        return left

    def merge(self, operands: Sequence[tuple[Fields, Sequence[int]]]) -> Fields:
        """Return the fields of an operation on each entry.

        Args:
            operands: Fields and shape of each operand; shapes broadcast.
        """
        dims = max(len(shape) for _, shape in operands)
        aligned = []
        for fields, shape in operands:
            missing = [1] * (dims - len(shape))
            own = [labels.reshape([*missing, *labels.shape]) for labels in fields]
            aligned.append((own, [*missing, *shape]))
        merged: Fields = []
        for k, (fields, _) in enumerate(aligned):
            others = aligned[:k] + aligned[k + 1 :]
            for labels in fields:
                # Along a dimension where another operand has entries without labels, all stay.
                stiff = {
                    dim
                    for dim in varying(labels)
                    for found, shape in others
                    if shape[dim] > 1 and not any(dim in varying(other) for other in found)
                }
                for left in self.fix_along([labels], stiff):
                    merged = self._with(merged, left)
        return merged

    def _with(self, merged: Fields, labels: Tensor) -> Fields:
        """Return fields and one more, united with those that vary along the same dimensions."""
        for k, other in enumerate(merged):
            common = varying(labels) & varying(other)
            if common:
                rest = merged[:k] + merged[k + 1 :]
                mine = self.fix_along([labels], varying(labels) - common)
                its = self.fix_along([other], varying(other) - common)
                self.unite(mine[0], its[0])
                return self._with(rest, mine[0])
        return [*merged, labels]

    def sum(self, fields: Fields, over: AbstractSet[int], zero: bool) -> Fields:
        """Return what is left of fields of which some are summed over: zeros add nothing.

        Args:
            fields: Fields.
            over: Dimensions.
            zero: Entries are zero where their unit is; else those that are summed over stay.
        """
        if not zero:
            self.fix(*(labels for labels in fields if varying(labels) <= over))
        return [labels for labels in fields if not varying(labels) <= over]

    def contract(
        self, a: Fields, i: int, b: Fields, j: int, zero: bool = True
    ) -> tuple[Fields, Fields]:
        """Return what is left of the fields of two factors after a sum of their products.

        Args:
            a: Fields of a factor.
            i: Its dimension that is summed over.
            b: Fields of the other one.
            j: Its dimension.
            zero: Products are zero where the unit is; else it stays.
        """
        alone, left, mixed = [], [], False
        for fields, dim in ((a, i), (b, j)):
            alone.append([labels.flatten() for labels in fields if varying(labels) == {dim}])
            rest = [labels for labels in fields if varying(labels) != {dim}]
            mixed = mixed or any(dim in varying(labels) for labels in rest)
            left.append(self.fix_along(rest, [dim]))
        if alone[0] and alone[1] and not mixed and zero:
            self.unite(alone[0][0], alone[1][0])
        else:
            self.fix(*alone[0], *alone[1])
        return left[0], left[1]
