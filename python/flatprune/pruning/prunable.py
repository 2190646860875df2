"""Which groups of a network a pruner prunes: those that the user names and that the criterion can judge."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from torch import nn

from flatprune.criteria import Criterion
from flatprune.criteria.base import consumer_compensation
from flatprune.cutting.neurons import CONSUMER, PRODUCER, Coupling, NeuronGroup
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.probing import reached_layers


def choose_layers(coupling: Coupling, model: nn.Module, layers: Sequence[str] | None) -> None:
    """Keep only the groups that a layer of `layers` produces."""
    if layers is None:
        return
    known = dict(model.named_modules())
    chosen: list[NeuronGroup] = []
    for name in layers:
        if name not in known:
            raise KeyError(f"layers: the model has no module named {name!r}; it has {', '.join(filter(None, known))}")
        found = [group for group in coupling.groups if any(m.name == name for m in group.of_role(PRODUCER))]
        if not found:
            reason = coupling.refused.get(name, "it is no Linear or convolution of its own that the forward calls")
            raise ValueError(f"Pruner: layer {name!r} cannot be pruned: {reason}")
        chosen += [group for group in found if all(group is not other for other in chosen)]
    coupling.groups[:] = [group for group in coupling.groups if any(group is other for other in chosen)]


def refuse_unscored(
    coupling: Coupling, curvature: Curvature, criterion: Criterion, compensate: str | bool, inputs: tuple[Any, ...]
) -> None:
    """Refuse groups with a layer without factors, or that no gradient reaches, for everything that needs factors."""
    roles = {criterion.role} if "factors" in criterion.needs else set()
    updates = compensate is True or (compensate == "auto" and criterion.compensates != "never")
    if updates and criterion.compensation is consumer_compensation:
        roles.add(CONSUMER)
    if not roles:
        return
    reached = reached_layers(curvature, *inputs)
    for role in sorted(roles):
        _refuse_without_factors(coupling, role, curvature, reached)


def _refuse_without_factors(coupling: Coupling, role: str, curvature: Curvature, reached: Set[str]) -> None:
    verb = "reads" if role == CONSUMER else "makes"
    kept = []
    for group in coupling.groups:
        blind = [member.name for member in group.of_role(role) if member.name not in reached]
        if not blind:
            kept.append(group)
            continue
        why = "gets no gradient (frozen, or cut off)" if blind[0] in curvature.layers else "has no factors"
        for member in group.of_role(PRODUCER):
            coupling.refused[member.name] = f"layer {blind[0]!r}, which {verb} it, {why}"
    coupling.groups[:] = kept
