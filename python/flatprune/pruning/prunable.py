"""Which groups of a network a pruner prunes: those that the user names and that the criterion can judge."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import nn

from flatprune.coupling import CONSUMER, Call, Coupling
from flatprune.criteria import Criterion
from flatprune.criteria.base import consumer_compensation
from flatprune.criteria.members import layers_of
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.capture import UNSEEN
from kfac_ext.curvature.probing import reached_layers


def choose_layers(coupling: Coupling, model: nn.Module, layers: Sequence[str] | None) -> None:
    """Keep only the groups that a layer of `layers` produces."""
    if layers is None:
        return
    known = dict(model.named_modules())
    chosen: set[int] = set()
    for name in layers:
        if name not in known:
            raise KeyError(f"layers: the model has no module named {name!r}; it has {', '.join(filter(None, known))}")
        found = [position for position, group in enumerate(coupling.groups) if name in group.producers()]
        if not found:
            reason = coupling.refused.get(name, "it is no Linear or convolution of its own that the forward calls")
            raise ValueError(f"Pruner: layer {name!r} cannot be pruned: {reason}")
        chosen.update(found)
    coupling.keep(sorted(chosen))


def refuse_unscored(
    coupling: Coupling, curvature: Curvature, criterion: Criterion, compensate: str | bool, call: Call
) -> None:
    """Refuse groups with a layer without factors, or that no gradient reaches, for everything that needs factors."""
    roles = {criterion.role} if "factors" in criterion.needs else set()
    updates = compensate is True or (compensate == "auto" and criterion.compensates != "never")
    if updates and criterion.compensation is consumer_compensation:
        roles.add(CONSUMER)
    if not roles:
        return
    reached = reached_layers(curvature, *call.args, **call.kwargs)
    for role in sorted(roles):
        _refuse_without_factors(coupling, role, curvature, reached)


def check_watched(curvature: Curvature, criterion: Criterion) -> None:
    """Raise RuntimeError where a criterion judges by forwards and there has been none."""
    if set(criterion.needs) - {"gradients"} and not curvature.step_count:
        raise RuntimeError(
            f"Pruner: the model has made no training forward, by which criterion {criterion.name!r} judges; {UNSEEN}"
        )


def _refuse_without_factors(coupling: Coupling, role: str, curvature: Curvature, reached: Set[str]) -> None:
    layers = layers_of(curvature, coupling.groups)
    verb = "reads" if role == CONSUMER else "makes"
    kept = []
    for position, group in enumerate(coupling.groups):
        blind = "" if group.of_role(role) else f"no layer {verb} it that has factors, only a product of activations"
        for member in group.of_role(role):
            layer = layers.get(member.names)
            if layer is None or layer.name not in reached:
                missing, unreached = (
                    "has no factors (criterion='l1' needs none)",
                    "gets no gradient (frozen, or cut off)",
                )
                why = missing if layer is None else unreached
                blind = f"layer {member.module!r}, which {verb} it, {why}"
                break
        if not blind:
            kept.append(position)
        else:
            coupling.refuse(group.producers(), blind)
    coupling.keep(kept)
