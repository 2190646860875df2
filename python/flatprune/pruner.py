"""The pruner: removes neurons at the events of a schedule while the network trains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.graph import neuron_groups
from flatprune.neurons import CONSUMER, PRODUCER, Coupling, NeuronGroup
from flatprune.saliency import (
    CRITERIA,
    compensation,
    curvature_scores,
    has_convolution,
    input_statistics,
    magnitude_scores,
)
from flatprune.schedule import CubicSchedule
from flatprune.selection import Limits, neuron_costs, select, smallest_params
from flatprune.surgery import plan
from flatprune.targets import Target
from kfac_ext.curvature import Curvature

MLP_COMPENSATION_BELOW = 0.04  # share of the parameters; above, compensating an MLP gains nothing


@dataclass(frozen=True)
class Removal:
    """What an event removed from one group of neurons, or why it removed nothing.

    Attributes:
        step: optimizer steps taken.
        layer: name of the group, its first producer; empty in the record of an event that removed nothing.
        removed: number of neurons.
        neurons: their indices before the removal, ascending.
        width_before, width_after: neurons of the group.
        params_before, params_after: parameters of the whole network before and after the event.
        budget: parameters the event was to reach.
        compensated: whether the survivors were updated.
        note: anything out of the ordinary; empty otherwise.
    """

    step: int
    layer: str
    removed: int
    neurons: tuple[int, ...]
    width_before: int
    width_after: int
    params_before: int
    params_after: int
    budget: int
    compensated: bool
    note: str = ""


class Pruner:
    """Removes neurons from a network while it trains, at events whose parameter budgets follow a cubic.

    At an event all neurons are scored (see `flatprune.saliency`), the score is divided by the parameters that go with
    the neuron, and the lowest go, over all layers, until the budget is met: at most half of a layer at once, at least
    `min_width` neurons stay. The survivors are updated to make up for the loss, and everything that belongs to the
    neurons is removed from model, optimizer and curvature (see `flatprune.surgery`).

    At the last event the target is reached: if the limits stop a removal short of it, neurons are scored and removed
    again at once. A target below what the limits allow gives one warning with the figure that can be reached.

    Args:
        model: the network; its parameters stay the same objects.
        optimizer: holds the model's parameters; or None.
        curvature: the model's running factors.
        example_inputs: a tensor or tuple of tensors the model can be called with; one or two samples do.
        target: the size to reach.
        total_steps: optimizer steps of the whole training.
        criterion: "obs", "outgoing", or the baselines "l1" (global) and "l1_uniform".
        compensate: update the survivors; "auto": always with convolutions, without them below 4 % of the parameters,
            never with the magnitude baselines. Where "auto" does not compensate, "obs" means the plain outgoing score,
            which is as good there and needs no inverse; with True or False it always is the obs score.
        schedule: when to prune; default `CubicSchedule(total_steps)`.
        round_to: widths of groups that lose neurons become multiples of this.
        min_width: neurons that stay in each group at least.
        max_layer_fraction: largest share of a group that goes at once.
        exclude: layers whose outputs stay: names of modules, or types.
        layers: names of the layers to prune; default all that can be.

    Raises:
        TypeError: `target` is no Target; `exclude` or `layers` is one string instead of a list.
        ValueError: an argument out of range; a layer of `layers` that cannot be pruned, with the reason; an optimizer
            that holds parameters which are not the model's; no layer can be pruned.
        KeyError: `exclude` or `layers` names a module that the model does not have.

    Example:
        >>> pruner = Pruner(model, optimizer, curvature, x[:2], target=Target(params=0.1), total_steps=1000)
        >>> loss.backward(); optimizer.step(); removals = pruner.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        curvature: Curvature,
        example_inputs: Any,
        *,
        target: Target,
        total_steps: int,
        criterion: str = "obs",
        compensate: str | bool = "auto",
        schedule: CubicSchedule | None = None,
        round_to: int = 1,
        min_width: int = 2,
        max_layer_fraction: float = 0.5,
        exclude: Sequence[str | type] = (),
        layers: Sequence[str] | None = None,
    ) -> None:
        _check_arguments(criterion, compensate, round_to, min_width, max_layer_fraction)
        _check_selections(target, exclude=exclude, layers=layers)
        _check_optimizer(model, optimizer)
        if curvature.model is not model:
            raise ValueError("Pruner: the curvature belongs to another model")
        self.model, self.optimizer, self.curvature = model, optimizer, curvature
        self.target, self.criterion, self.compensate = target, criterion, compensate
        self.schedule = schedule or CubicSchedule(total_steps)
        self.limits = Limits(round_to, min_width, max_layer_fraction)
        inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        curvature.trace(*inputs)
        self.coupling = neuron_groups(model, inputs, exclude)
        self._refuse_unscored()
        _choose_layers(self.coupling, model, layers)
        self.groups = self.coupling.groups
        if not self.groups:
            raise ValueError(f"Pruner: no layer can be pruned: {_reasons(self.coupling.refused)}")
        self.refused = dict(self.coupling.refused)
        loud = {name: reason for name, reason in self.refused.items() if name not in self.coupling.expected}
        if loud:
            warnings.warn(f"Pruner: not pruned: {_reasons(loud)}", stacklevel=2)
        self.history: list[Removal] = []
        self.step_count = 0
        self.params_start = self.params
        self._warned = False

    @property
    def params(self) -> int:
        """Parameters of the network now."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def widths(self) -> dict[str, int]:
        """Group name -> neurons left."""
        return {group.name: group.width for group in self.groups}

    def reachable_params(self) -> int:
        """Parameters that are left when every group is as narrow as the limits allow."""
        return smallest_params(self.model, self.groups, self.limits)

    def step(self) -> list[Removal]:
        """Count one optimizer step and, at an event, remove neurons.

        Returns:
            One record for each group that lost neurons; at an event that removes nothing, one record with the reason;
            between events nothing.

        Raises:
            ValueError: factors or scores are not finite; model, optimizer and factors are as before, and the step is
                not counted.
            RuntimeError: the model has made no training forward yet.
        """
        step = self.step_count + 1
        budget = self.schedule.budget(step, self.params_start, self.target.params_of(self.params_start))
        removals = [] if budget is None else self._event(step, budget)
        self.step_count = step
        self.history += removals
        return removals

    def _event(self, step: int, budget: int) -> list[Removal]:
        last = self.schedule.is_last(step)
        removals: list[Removal] = []
        while self.params > budget:
            found = self._remove(step, budget, last)
            if not found:
                break
            removals += found
            if not last:
                break
        if last and self.params > budget:
            removals = self._note_shortfall(removals, budget)
        if not removals:
            params = self.params
            reason = "the budget is met already" if params <= budget else "the limits let no group lose neurons"
            note = f"nothing removed: {reason}"
            removals = [Removal(step, "", 0, (), 0, 0, params, params, budget, False, note)]
        return removals

    def _note_shortfall(self, removals: list[Removal], budget: int) -> list[Removal]:
        note = (
            f"the target of {budget} parameters is out of reach: {self.params} are left with min_width="
            f"{self.limits.min_width}, round_to={self.limits.round_to} and {len(self.refused)} layers that stay"
        )
        warnings.warn(f"Pruner: {note}", stacklevel=4)
        if removals:
            removals = [*removals[:-1], Removal(**{**vars(removals[-1]), "note": note})]
        else:
            params = self.params
            removals = [Removal(self.step_count + 1, "", 0, (), 0, 0, params, params, budget, False, note)]
        return removals

    def _remove(self, step: int, budget: int, last: bool) -> list[Removal]:
        """One round: score, choose, compensate, cut."""
        compensate = self._compensates(budget)
        scores, inverses = self._scores(compensate)
        gone = select(self.model, self.groups, scores, budget, self.limits, closely=last)
        if not gone:
            return []
        replacements = compensation(self.curvature, self.groups, gone, inverses) if compensate else None
        params, before = self.params, self.widths()
        plan(
            self.model,
            self.groups,
            gone,
            optimizer=self.optimizer,
            curvature=self.curvature,
            replacements=replacements,
        ).commit()
        return [
            Removal(
                step=step,
                layer=self.groups[position].name,
                removed=len(neurons),
                neurons=tuple(neurons.tolist()),
                width_before=before[self.groups[position].name],
                width_after=self.groups[position].width,
                params_before=params,
                params_after=self.params,
                budget=budget,
                compensated=compensate,
            )
            for position, neurons in sorted(gone.items())
        ]

    def _compensates(self, budget: int) -> bool:
        if self.compensate != "auto":
            return bool(self.compensate)
        if self.criterion not in ("obs", "outgoing"):
            return False
        return has_convolution(self.curvature) or budget < MLP_COMPENSATION_BELOW * self.params_start

    @torch.no_grad()
    def _scores(self, compensate: bool) -> tuple[list[Tensor], dict[str, tuple[Tensor, ...]]]:
        """Scores of all neurons a parameter, and the inverses if they are needed (one forward at most)."""
        by_curvature = self.criterion in ("obs", "outgoing")
        plain = self.compensate == "auto" and not compensate
        criterion = "outgoing" if by_curvature and plain else self.criterion
        inverses: dict[str, tuple[Tensor, ...]] = {}
        if by_curvature or compensate:
            names = {member.name: None for group in self.groups for member in group.of_role(CONSUMER)}
            statistics = input_statistics(self.curvature, names)
            if compensate or criterion == "obs":
                inverses = statistics.inverses()
        if not by_curvature:
            return magnitude_scores(self.groups, criterion), inverses
        scores = curvature_scores(self.curvature, self.groups, criterion, statistics, inverses)
        costs = neuron_costs(self.model, self.groups)
        return [score / cost for score, cost in zip(scores, costs)], inverses

    def _refuse_unscored(self) -> None:
        """Refuse groups that are read by a layer without factors, for everything that needs them."""
        if self.criterion not in ("obs", "outgoing") and self.compensate is not True:
            return
        kept = []
        for group in self.coupling.groups:
            blind = [m.name for m in group.of_role(CONSUMER) if m.name not in self.curvature.layers]
            if not blind:
                kept.append(group)
                continue
            for member in group.of_role(PRODUCER):
                self.coupling.refused[member.name] = f"layer {blind[0]!r}, which reads it, has no factors"
        self.coupling.groups[:] = kept

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and containers: counters, sizes, settings and the history."""
        return {
            "step_count": self.step_count,
            "params_start": self.params_start,
            "target": asdict(self.target),
            "events": list(self.schedule.events),
            "criterion": self.criterion,
            "widths": self.widths(),
            "history": [{**asdict(record), "neurons": list(record.neurons)} for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` with a pruner of the same settings, on the model as it was then.

        Raises:
            ValueError: naming the first setting or width that differs; nothing is changed then.
        """
        own = self.state_dict()
        for key in ("target", "events", "criterion"):
            if state[key] != own[key]:
                raise ValueError(f"Pruner.load_state_dict: {key} is {state[key]!r} in the state, expected {own[key]!r}")
        for name in [*own["widths"], *state["widths"]]:
            if state["widths"].get(name) != own["widths"].get(name):
                raise ValueError(
                    f"Pruner.load_state_dict: {name!r} has {state['widths'].get(name)} neurons in the state, "
                    f"{own['widths'].get(name)} in the model; load the pruned model first"
                )
        self.history = [Removal(**{**record, "neurons": tuple(record["neurons"])}) for record in state["history"]]
        self.step_count, self.params_start = state["step_count"], state["params_start"]


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())


def _check_arguments(
    criterion: str, compensate: str | bool, round_to: int, min_width: int, max_layer_fraction: float
) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"Pruner: criterion is {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if not isinstance(compensate, bool) and compensate != "auto":
        raise ValueError(f"Pruner: compensate is {compensate!r}, expected 'auto', True or False")
    for name, value in (("round_to", round_to), ("min_width", min_width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Pruner: {name} is {value!r}, expected an integer of 1 or more")
    if not 0.0 < max_layer_fraction <= 1.0:
        raise ValueError(f"Pruner: max_layer_fraction is {max_layer_fraction}, expected above 0 and at most 1")


def _check_selections(target: Target, **names: object) -> None:
    if not isinstance(target, Target):
        raise TypeError(f"Pruner: target is {target!r}, expected a flatprune.Target")
    for argument, value in names.items():
        if isinstance(value, str):  # would be taken apart into letters
            raise TypeError(f"Pruner: {argument} is {value!r}, expected a list of names")


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    own = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate([] if optimizer is None else optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise ValueError(
                    f"Pruner: parameter {index} of optimizer group {number}, shape {tuple(parameter.shape)}, is not a "
                    "parameter of the model; build the optimizer from model.parameters()"
                )


def _choose_layers(coupling: Coupling, model: nn.Module, layers: Sequence[str] | None) -> None:
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
