"""What must stay alike when neurons go: tensors whose labels vary along several dimensions must stay rectangular.

Of such a *grid*, for one of its dimensions, either whole slices go (each holds one neuron), or every slice holds all
neurons alike (no constraint), or each neuron lies in one slice (or one of several sets of slices that balance each
other): then the same number must go from each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.coupling.findings import Findings
from flatprune.coupling.neurons import Refused

ACROSS = "some of its channels lie across the bounds of slices"
EVEN, WHOLE, MIXED = "even", "whole", "mixed"


class Uneven(Refused):
    """Only some of the slices that must stay equally large hold these neurons.

    Attributes:
        array: the labels [slices, entries].
    """

    def __init__(self, array: Tensor, where: str) -> None:
        super().__init__(f"it meets something of fixed size ({where})")
        self.array = array


class Crossed(Refused):
    """What is laid out in rows and columns (a channel shuffle) is also cut into slices that run across both.

    Attributes:
        array: the labels [rows, columns], fewer rows than columns.
    """

    def __init__(self, array: Tensor, why: str) -> None:
        super().__init__(why)
        self.array = array


class Across(Refused):
    """Some neurons lie across the bounds of slices, or are more than others of the same kind; the rest may go evenly.

    Attributes:
        stay: bool [neurons], which ones do.
    """

    def __init__(self, stay: Tensor, where: str) -> None:
        super().__init__(f"{ACROSS} ({where})")
        self.stay = stay


class _Constraint(NamedTuple):
    """Slicings [neurons] of which one must hold, the operator that asks for it, the labels of a grid."""

    choices: list[Tensor]
    where: str
    array: Tensor | None = None


def slices_of(findings: Findings, number: Tensor, count: int) -> tuple[int, Tensor, str]:
    """The finest slicing of `count` neurons that all grids and fixed slices allow.

    Args:
        findings: its grids and slices.
        number: int64 [labels + 1], the neuron of each (flat) label, -1 for none; the last entry stands for no label.
        count: neurons.

    Returns:
        How many slices, int64 [neurons] the slice of each, and the operator that asks for them ("" for none).

    Raises:
        Refused: there is none.
    """
    constraints = [*_of_grids(findings, number, count), *_of_fixed_slices(findings, number, count)]
    if not constraints:
        return 1, torch.zeros(count, dtype=torch.int64), ""
    for choice in (choice for constraint in constraints for choice in constraint.choices):
        if all(any(_refines(choice, other) for other in constraint.choices) for constraint in constraints):
            _check_sizes(choice, constraints[0].where)
            return int(choice.max()) + 1, choice, constraints[0].where
    places = " and by ".join(list(dict.fromkeys(constraint.where for constraint in constraints))[:2])
    why = f"it is cut into different slices by {places}"
    for constraint in constraints:
        if constraint.array is not None:
            raise Crossed(constraint.array, why)
    raise Refused(why)


def _check_sizes(slice_of: Tensor, where: str) -> None:
    """Refuse slices that are not equally large, or hold one neuron."""
    sizes = slice_of.bincount()
    if int(sizes.max()) < 2:
        raise Refused(f"its {len(sizes)} slices hold one channel each ({where})")
    size = max((n for n in sizes.unique().tolist() if n > 1), key=lambda n: n * int((sizes >= n).sum()))
    order = slice_of.argsort(stable=True)
    rank = torch.empty_like(slice_of)
    rank[order] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[slice_of[order]]
    stay = (sizes[slice_of] < size) | (rank >= size)  # as few as may be
    if bool(stay.any()):
        raise Across(stay, where)


def _of_grids(findings: Findings, number: Tensor, count: int) -> Iterable[_Constraint]:
    for array, where in findings.grids.values():
        ids = number[array]
        if not bool((ids >= 0).any()):
            continue
        kinds = [_kind(ids.movedim(d, 0).reshape(ids.shape[d], -1), count) for d in range(ids.dim())]
        if WHOLE in kinds:
            continue
        choices = [kind for kind in kinds if isinstance(kind, Tensor)]
        if choices:
            crossed = array if array.dim() == len(choices) == 2 else None
            if crossed is not None and crossed.shape[0] > crossed.shape[1]:
                crossed = crossed.T
            yield _Constraint(choices, where, crossed)
        elif MIXED in kinds:
            raise Refused(f"its channels are laid out in a way that cannot be cut ({where})")


def _of_fixed_slices(findings: Findings, number: Tensor, count: int) -> Iterable[_Constraint]:
    for array, where in findings.slices:
        ids = number[array]
        if not bool((ids >= 0).any()):
            continue
        kind = _kind(ids, count)
        if isinstance(kind, Tensor) and bool((ids >= 0).any(dim=1).all()):
            yield _Constraint([kind], where)
        elif not isinstance(kind, str) or kind != EVEN:
            table = _entries(ids, count) > 0
            across = table.sum(dim=0) > 1
            if bool(across.any()) and bool(table[:, ~across].any(dim=1).all()):
                raise Across(across, where)
            raise Uneven(array, where)


def _kind(ids: Tensor, count: int) -> str | Tensor:
    """How neurons [count] lie in `ids` [slices, entries]: alike in all, one a slice, mixed, or the class of each.

    Neurons of a class have as many entries in each slice; as many of each class leave slices of equal size. Where each
    neuron lies in one slice, that is its class.
    """
    table = _entries(ids, count)
    if bool((table == table[:1]).all()):
        return EVEN
    if int((table > 0).sum(dim=1).max()) <= 1:
        return WHOLE
    patterns, which = table.T.unique(dim=0, return_inverse=True)
    apart = bool(((patterns > 0).sum(dim=1) == 1).all()) and len(patterns) == len(patterns.argmax(dim=1).unique())
    balanced = bool((patterns.sum(dim=0) == patterns.sum(dim=0)[:1]).all())
    return len(patterns) - 1 - which if apart or balanced else MIXED  # in the order of the slices


def _entries(ids: Tensor, count: int) -> Tensor:
    """How many entries each neuron has in each slice: int64 [slices, neurons]."""
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    known = ids >= 0
    table = torch.zeros(len(ids), count, dtype=torch.int64)
    return table.index_put_((rows[known], ids[known]), torch.ones((), dtype=torch.int64), accumulate=True)


def _refines(fine: Tensor, coarse: Tensor) -> bool:
    """Whether each slice of `fine` lies within one slice of `coarse`."""
    return torch.stack([fine, coarse]).unique(dim=1).shape[1] == len(fine.unique())
