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

EVEN, WHOLE, MIXED = "even", "whole", "mixed"


class Uneven(Refused):
    """Only some of the slices that must stay equally large hold these neurons.

    Attributes:
        array: the labels [slices, entries].
    """

    def __init__(self, array: Tensor, where: str) -> None:
        super().__init__(f"it meets something of fixed size ({where})")
        self.array = array


class _Constraint(NamedTuple):
    """Slicings [neurons] of which one must hold, and the operator that asks for it."""

    choices: list[Tensor]
    where: str


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
            sizes = choice.bincount()
            if int(sizes.min()) != int(sizes.max()) or int(sizes.min()) < 2:
                raise Refused(
                    f"its {len(sizes)} slices of {int(sizes.min())} to {int(sizes.max())} channels cannot be cut "
                    f"evenly ({constraints[0].where})"
                )
            return len(sizes), choice, constraints[0].where
    places = " and by ".join(list(dict.fromkeys(constraint.where for constraint in constraints))[:2])
    raise Refused(f"it is cut into different slices by {places}")


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
            yield _Constraint(choices, where)
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
            raise Uneven(array, where)


def _kind(ids: Tensor, count: int) -> str | Tensor:
    """How neurons [count] lie in `ids` [slices, entries]: alike in all, one a slice, mixed, or the class of each.

    Neurons of a class have as many entries in each slice; as many of each class leave slices of equal size. Where each
    neuron lies in one slice, that is its class.
    """
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    known = ids >= 0
    table = torch.zeros(len(ids), count, dtype=torch.int64)
    table.index_put_((rows[known], ids[known]), torch.ones((), dtype=torch.int64), accumulate=True)
    if bool((table == table[:1]).all()):
        return EVEN
    if int((table > 0).sum(dim=1).max()) <= 1:
        return WHOLE
    patterns, which = table.T.unique(dim=0, return_inverse=True)
    apart = bool(((patterns > 0).sum(dim=1) == 1).all()) and len(patterns) == len(patterns.argmax(dim=1).unique())
    balanced = bool((patterns.sum(dim=0) == patterns.sum(dim=0)[:1]).all())
    return len(patterns) - 1 - which if apart or balanced else MIXED  # in the order of the slices


def _refines(fine: Tensor, coarse: Tensor) -> bool:
    """Whether each slice of `fine` lies within one slice of `coarse`."""
    return torch.stack([fine, coarse]).unique(dim=1).shape[1] == len(fine.unique())
