"""Groups that keep one width: which they are, and how many neurons go from each of them at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from flatprune.coupling import NeuronGroup

Tie = tuple[int, ...]  # positions of groups that always lose equally many neurons


def find_ties(groups: Sequence[NeuronGroup], tie_widths: bool | Sequence[str]) -> list[Tie]:
    """Which groups keep the same width; each group is in exactly one tie, alone if it is bound to no other.

    Args:
        groups: the groups that are pruned.
        tie_widths: True: groups of one kind, which is to say that the names of their producers are the same but for
            numbers, and so are their widths, what a neuron is and how they are sliced: the MLPs of all layers of a
            transformer, say. Or patterns such as "*.mlp.fc1": groups with a producer that matches the same one.

    Returns:
        Ties of ascending positions, in the order of their first ones.

    Raises:
        ValueError: a pattern matches no group, or groups of different widths.

    Example:
        >>> find_ties(find_coupling(bert, ids).groups, ["*.intermediate.dense"])
        [(0,), (1, 3, 5), (2,), (4,), (6,)]
    """
    kinds: dict[object, list[int]] = {}
    if tie_widths is True:
        for position, group in enumerate(groups):
            kinds.setdefault(_kind(group), []).append(position)
    for pattern in () if isinstance(tie_widths, bool) else tie_widths:
        kinds[pattern] = _matching(groups, pattern)
    first = list(range(len(groups)))  # of the groups that each is tied to
    for found in kinds.values():
        joined = {first[position] for position in found}
        first = [min(joined) if other in joined else other for other in first]
    return [tuple(p for p, other in enumerate(first) if other == tie) for tie in sorted(set(first))]


def _kind(group: NeuronGroup) -> object:
    names = frozenset(re.sub(r"\d+", "#", name) for name in group.producers())
    return names, group.width, group.unit, group.groups, group.multiple


def _matching(groups: Sequence[NeuronGroup], pattern: str) -> list[int]:
    found = [p for p, group in enumerate(groups) if any(fnmatchcase(name, pattern) for name in group.producers())]
    if not found:
        names = ", ".join(dict.fromkeys(name for group in groups for name in group.producers()))
        raise ValueError(f"Pruner: tie_widths: {pattern!r} matches no layer that is pruned; there are {names}")
    first, *others = (groups[position] for position in found)
    for other in others:
        if other.width != first.width:
            raise ValueError(
                f"Pruner: tie_widths: {pattern!r} matches {first.name!r} with {first.width} neurons and {other.name!r} "
                f"with {other.width}, expected equal widths"
            )
    return found


def named_ties(groups: Sequence[NeuronGroup], ties: Sequence[Tie]) -> list[list[str]]:
    """Names of the groups of each tie."""
    return [[groups[position].name for position in tie] for tie in ties]
