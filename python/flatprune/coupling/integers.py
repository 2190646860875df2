"""Integers in the code that follow a width: those near the place where a cut network fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from flatprune.coupling.attributes import integers, known_attributes, own_shapes
from flatprune.coupling.neurons import Attribute, NeuronGroup

_LEVELS = 3  # modules around a failure whose integers are looked at, innermost first


def followable(
    modules: Mapping[str, nn.Module],
    running: tuple[str, ...],
    suspects: Sequence[int],
    groups: Mapping[int, NeuronGroup],
    taken: Sequence[Attribute],
) -> Iterator[tuple[int, Attribute]]:
    """Integers of the modules around a failure that equal a size which a suspect changes.

    Where numbers without labels differ (the root of a width, say), all that a module holds a part of are suspects.

    Args:
        modules: of the model, by name.
        running: modules where it fails, outermost first.
        suspects: positions of the groups that meet there.
        groups: position -> group, of all that are cut.
        taken: integers that follow something already.
    """
    following = {(a.module, a.key, a.place) for a in taken}
    for name in _around(modules, running):
        module = modules[name]
        settled = known_attributes(module, own_shapes(module))
        owned = {p: _owned_inside(groups[p], name) for p in suspects or groups}
        possible = sorted((p for p in owned if suspects or owned[p]), key=lambda p: -owned[p])
        for key, place, value in integers(module):
            if key in settled or (name, key, place) in following:
                continue
            for position in possible:
                for step, per in _changes(groups[position], value):
                    yield position, Attribute(name, key, place, step, per)


def _owned_inside(group: NeuronGroup, module: str) -> int:
    """How many tensors of a group a module holds; its integers most likely follow the one with most."""
    return sum(any(f"{name}.".startswith(f"{module}.") for name in member.names) for member in group.members)


def _around(modules: Mapping[str, nn.Module], running: tuple[str, ...]) -> list[str]:
    """The modules around a failure, innermost first, then what stands beside the innermost."""
    around = list(dict.fromkeys(running[::-1]))[:_LEVELS]
    parent = around[1] if len(around) > 1 else around[0] if around else ""
    beside = [name for name in modules if name.startswith(parent + ".") and parent and name not in around]
    return [*around, *beside]


def _changes(group: NeuronGroup, value: int) -> Iterator[tuple[int, int]]:
    """How an integer of this value may follow a group's width: (step, per)."""
    found = set()
    for size, count in [(group.width, 1), *((m.size, m.index.shape[1]) for m in group.members)]:
        for pieces in {1, group.groups, *(m.groups for m in group.members)}:
            if size % pieces == 0 and size // pieces == value:
                shared = math.gcd(count, pieces)
                found.add((count // shared, pieces // shared))
    yield from sorted(found)
