"""What `flatprune.Pruner` accepts: checks of its arguments, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn

from flatprune.criteria import CRITERIA, Criterion
from flatprune.criteria.base import consumer_compensation
from flatprune.cutting.neurons import CONSUMER, PRODUCER, Coupling, NeuronGroup
from flatprune.pruning.selection import SELECTIONS
from flatprune.pruning.targets import Target
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.probing import reached_layers


def check_arguments(compensate: str | bool, round_to: int, min_width: int, max_layer_fraction: float) -> None:
    """Raise ValueError for the first argument out of range."""
    if not isinstance(compensate, bool) and compensate != "auto":
        raise ValueError(f"Pruner: compensate is {compensate!r}, expected 'auto', True or False")
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Pruner: {name} is {value!r}, expected an integer of 1 or more")
    if not 0.0 < max_layer_fraction <= 1.0:
        raise ValueError(f"Pruner: max_layer_fraction is {max_layer_fraction}, expected above 0 and at most 1")


def check_loss_budget(limit: float | None, criterion: Criterion) -> None:
    """Raise ValueError for a limit that is no positive number, or that the criterion knows nothing about."""
    if limit is None:
        return
    if not 0.0 < limit < float("inf"):
        raise ValueError(f"Pruner: max_predicted_loss is {limit}, expected a number above 0, or None")
    if not criterion.predicts_loss:
        raise ValueError(f"Pruner: max_predicted_loss is {limit:g}, but criterion {criterion.name!r} predicts no loss")


def check_selection(selection: str, criterion: Criterion) -> None:
    """Raise ValueError for a selection that is none, or that the criterion cannot serve."""
    if selection not in SELECTIONS:
        raise ValueError(f"Pruner: selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    if selection == "greedy" and criterion.joint is None:
        able = ", ".join(name for name, other in CRITERIA.items() if other.joint is not None)
        raise ValueError(f"Pruner: selection 'greedy' needs joint scores, which {criterion.name} has not; {able} have")


def check_selections(target: Target, **names: object) -> None:
    """Raise TypeError for a target that is none, and for names given as one string."""
    if not isinstance(target, Target):
        raise TypeError(f"Pruner: target is {target!r}, expected a flatprune.Target")
    for argument, value in names.items():
        if isinstance(value, str):  # would be taken apart into letters
            raise TypeError(f"Pruner: {argument} is {value!r}, expected a list of names")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise ValueError for an optimizer that holds parameters which are not the model's."""
    own = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate([] if optimizer is None else optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise ValueError(
                    f"Pruner: parameter {index} of optimizer group {number}, shape {tuple(parameter.shape)}, is not a "
                    "parameter of the model; build the optimizer from model.parameters()"
                )


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
