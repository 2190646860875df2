"""The pruner: removes neurons at the events of a schedule while the network trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from flatprune.coupling import NeuronGroup, find_coupling
from flatprune.coupling.attributes import held_attributes
from flatprune.coupling.example_inputs import example_calls
from flatprune.coupling.products import owned_fraction
from flatprune.criteria import Criterion, Scores, ScoringContext, as_criterion
from flatprune.criteria.loss_change import LossChange
from flatprune.cutting.ema_models import checked_ema_models
from flatprune.cutting.surgery import plan
from flatprune.pruning.costs import CostTracker, ParameterCount, smallest_cost
from flatprune.pruning.held_states import HeldStates
from flatprune.pruning.limits import LossBudget, check_loss_budget, checked_limits
from flatprune.pruning.predicted_vs_measured import calibration
from flatprune.pruning.prunable import check_watched, choose_layers, refuse_unscored
from flatprune.pruning.ranks import ranks_of
from flatprune.pruning.removals import Removal, loss_budget_note, overshoot_note, removal_records, shortfall_note
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.selection import End, check_selection, choose
from flatprune.pruning.targets import Target
from flatprune.pruning.ties import find_ties, named_ties
from kfac_ext.curvature import Curvature
from kfac_ext.curvature.outputs import Pick

MLP_COMPENSATION_BELOW = 0.04  # fraction of the parameters; above, compensating an MLP gains nothing


class Pruner:
    """Removes neurons from a network while it trains, at events whose budgets follow a cubic.

    At an event all neurons are scored (see `flatprune.criteria`); what predicts a change of the loss is divided by what
    goes with the neuron in the unit of the target (its parameters, say). The lowest go, over all layers, until the
    budget is met: at most half of a layer at once, at least `min_width` neurons stay. The survivors are updated to make
    up for the loss, and everything that belongs to the neurons is removed from model, optimizer and curvature (see
    `flatprune.cutting.surgery`).

    At the last event the target is met within its tolerance: if the limits stop a removal short of it, neurons are
    scored and removed again at once; where no neurons end so near, the record says by how much it is missed. A target
    below what the limits allow gives one warning with the figure that can be reached.

    Args:
        model: the network; its parameters stay the same objects. A `DistributedDataParallel` is renewed in place after
            each cut; then every rank calls `step`, all lose the same neurons, and what they judge by is of their whole
            batch (docs/distributed.md).
        optimizer: what trains the model: an optimizer, a list of them (Muon for matrices and AdamW for the rest, say),
            or a dict whose values they are (one a parameter, stepping in the backward); or None. What they keep of a
            parameter is cut along with it; they may hold other parameters too, such as a loss's. One that was not
            given and holds parameters of the model is noticed when it steps. See docs/training.md.
        curvature: the model's running factors.
        example_inputs: what the model can be called with: a tensor, a tuple of arguments, a dict of keywords, (args,
            kwargs), or a batch of a loader and `forward`; see `flatprune.coupling.example_inputs`. One or two
            samples do.
        target: the size to reach, in parameters, multiply-accumulates, neurons or latency.
        total_steps: optimizer steps of the whole training.
        criterion: a name of `flatprune.criteria.CRITERIA` (see there), a `Criterion`, or a function from
            `ScoringContext` to one tensor of scores a group.
        compensate: update the survivors; "auto": as the criterion wants it. "obs" and "obd": always with
            convolutions, without them below 4 % of the parameters; "kron_obs" and "c_obs": always; others never. Where
            "auto" does not compensate, "obs" means the plain "obd" score, which is as good there and needs no
            inverse; with True or False it always is the "obs" score.
        selection: "independent" takes the lowest scores as they are; "greedy" takes one neuron after the other, each
            score knowing which went before ("obs" and "obd" only, see `flatprune.pruning.selection`); "auto": greedy
            for a compensated "obs" with convolutions, else independent (docs/results.md has what that gains).
        seed: of what a criterion draws.
        schedule: when to prune; default `CubicSchedule(total_steps)`.
        round_to: widths of groups that lose neurons become multiples of this.
        min_width: neurons that stay in each group at least.
        max_layer_fraction: largest fraction of a group that goes at once.
        tie_widths: groups that keep one width: equally many neurons go from each of them at an event, from each its
            own. True: all groups of one kind (the MLPs of a transformer's layers, their heads), as models need whose
            configuration has one number for all layers (`flatprune.update_config`). Or patterns of layer names, such
            as ["*.mlp.fc1", "*.attn.qkv"]: the groups that match the same one. See `flatprune.pruning.ties`; layers
            that stay (`exclude`, `layers`, refused ones) bind no other.
        keep_proportions: all groups lose the same part of their neurons, the lowest of each, instead of the lowest of
            all; "auto": in networks with attention, whose perceptrons would lose nearly all (docs/results.md, 7).
        max_predicted_loss: at an event, neurons go only as long as the change of the loss that is predicted of them
            (greedy: together; independent: the sum of theirs; calibrated by the cuts so far) does not exceed this; the
            record says where it bound. None: no such limit.
        measure: take down what each cut made of the loss beside what was predicted (`flatprune.criteria.loss_change`),
            for one or two forwards on 64 samples, or a batch more, an event.
        exclude: layers whose outputs stay: names of modules, or types.
        layers: names of the layers to prune; default all that can be.
        forward: how a training loop calls the model with `example_inputs`, such as
            lambda model, batch: model(batch["image"]); None: as its arguments.
        ema_models: copies of the model, such as `torch.optim.swa_utils.AveragedModel(model)`, that lose the same
            neurons at the same time; see `flatprune.cutting.ema_models`.
        output: what of the model's output the loss is of, as for `Curvature`, if the curvature has not been told.

    Raises:
        TypeError: `target` is no Target; `exclude`, `layers`, `tie_widths` or `ema_models` is no list; one of the
            last is no module; `criterion` is none; `optimizer` is none, nor a list or dict of them; `example_inputs` is
            no input but a loader, say.
        ValueError: an argument out of range; `max_predicted_loss` with a criterion that predicts no loss; a layer that
            the criterion cannot judge; a layer of `layers` that cannot be pruned, with the reason; an optimizer that
            keeps what cannot be cut (LBFGS, Shampoo, SOAP, 8-bit states: by name), or none that holds a parameter of
            the model; one of `ema_models` that is no copy of the model; no layer can
            be pruned.
        KeyError: `exclude` or `layers` names a module that the model does not have.

    Example:
        >>> pruner = Pruner(model, optimizer, curvature, x[:2], target=Target(params=0.1), total_steps=1000)
        >>> loss.backward(); optimizer.step(); removals = pruner.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[Any] | Mapping[Any, Any] | None,
        curvature: Curvature,
        example_inputs: Any,
        *,
        target: Target,
        total_steps: int,
        criterion: str | Criterion | Callable[[ScoringContext], Scores] = "obs",
        compensate: str | bool = "auto",
        selection: str = "auto",
        seed: int = 0,
        schedule: CubicSchedule | None = None,
        round_to: int = 1,
        min_width: int = 2,
        max_layer_fraction: float = 0.5,
        tie_widths: bool | Sequence[str] = False,
        keep_proportions: str | bool = "auto",
        max_predicted_loss: float | None = None,
        measure: bool = True,
        exclude: Sequence[str | type] = (),
        layers: Sequence[str] | None = None,
        forward: Callable[..., Any] | None = None,
        ema_models: Sequence[nn.Module] = (),
        output: Pick = None,
    ) -> None:
        self.criterion = as_criterion(criterion)
        if not isinstance(compensate, bool) and compensate != "auto":
            raise ValueError(f"Pruner: compensate is {compensate!r}, expected 'auto', True or False")
        self.limits = checked_limits(round_to, min_width, max_layer_fraction)
        check_selection(selection, self.criterion)
        if not isinstance(keep_proportions, bool) and keep_proportions != "auto":
            raise ValueError(f"Pruner: keep_proportions is {keep_proportions!r}, expected 'auto', True or False")
        check_loss_budget(max_predicted_loss, self.criterion)
        _check_types(target, exclude=exclude, layers=layers, tie_widths=tie_widths)
        self._ranks = ranks_of(model, curvature)
        model = model if self._ranks is None else self._ranks.model
        self._states = HeldStates(model, optimizer)
        if curvature.model is not model:
            raise ValueError("Pruner: the curvature belongs to another model")
        if output is not None:
            curvature.reading.tell(output)
        if "forwards" in self.criterion.needs and not curvature.loss.needs_output:
            raise ValueError(
                f"Pruner: criterion {self.criterion.name!r} reads the model's output, of which a curvature with "
                "loss='other' knows nothing; name the loss, or take another criterion"
            )
        self.model, self.curvature = model, curvature
        self.ema_models = checked_ema_models(model, ema_models)
        self.target, self.compensate, self.selection, self.seed = target, compensate, selection, seed
        self.schedule = schedule or CubicSchedule(total_steps)
        self.max_predicted_loss, self.measure = max_predicted_loss, measure
        with curvature.paused():
            calls = example_calls(model, example_inputs, forward)
        call = calls[0]
        if target.unit == "latency" and call.kwargs:
            given = ", ".join(call.kwargs)
            raise ValueError(f"Pruner: example_inputs has keywords ({given}), a latency target needs positional ones")
        with curvature.paused():
            self.coupling = find_coupling(model, calls, exclude)
        curvature.trace(*call.args, **call.kwargs)
        refuse_unscored(self.coupling, curvature, self.criterion, compensate, call)
        choose_layers(self.coupling, model, layers)
        self.groups = self.coupling.groups
        if not self.groups:
            raise ValueError(f"Pruner: no layer can be pruned: {'; '.join(map(str, self.coupling.refusals))}")
        self._states.rehearse(self.groups)
        if self.criterion.check is not None:
            self.criterion.check(ScoringContext(model, self.groups, curvature, seed=seed))
        self.refused = dict(self.coupling.refused)
        loud = [str(refusal) for refusal in self.coupling.refusals if not refusal.expected]
        if loud:
            can_go = f"{100 * owned_fraction(model, self.groups):.0f} % of the parameters can go"
            warnings.warn(f"Pruner: {can_go}; not pruned: {'; '.join(loud)}", stacklevel=2)
        self.ties = find_ties(self.groups, tie_widths)
        self.keep_proportions, self._proportions_asked = bool(keep_proportions), keep_proportions
        if keep_proportions == "auto":
            self.keep_proportions = self.coupling.attention
        self.widths_start = {group.name: group.width for group in self.groups}
        # of a resumed run, groups of one neuron that are no longer seen as one: name -> tensors
        self._single: dict[str, list[str]] = {}
        self.history: list[Removal] = []
        self.step_count = 0
        self.stopped = ""  # why pruning ended before its time
        self._tracker = CostTracker(target, model, self.coupling, call.args, self.limits, self.ties)
        if self._ranks is not None:
            self._ranks.begin(self._tracker, self._agreement(), lambda: self.step_count)
        self.params_start, self.cost_start = self.params, self.cost

    def _agreement(self) -> dict[str, Any]:
        """What ranks must have in common, by name."""
        return {
            "step": self.step_count,
            "widths": self.widths(),
            "target": asdict(self.target),
            "events": list(self.schedule.events),
            "criterion": self.criterion.name,
            "selection": self.selection,
            "compensate": self.compensate,
            "seed": self.seed,
            "limits": (*self.limits, self.max_predicted_loss, self.measure, named_ties(self.groups, self.ties)),
            "keep_proportions": self.keep_proportions,
            "stopped": self.stopped,
        }

    def forget_optimizers(self) -> None:
        """Cut no optimizer any more, until one is seen to step: those there were go on with other tensors."""
        self._states.optimizers = ()

    @property
    def group(self) -> Any:
        """The ranks that prune together (`kfac_ext.distributed.Group`), or None."""
        return None if self._ranks is None else self._ranks.group

    @property
    def params(self) -> int:
        """Parameters of the network now."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def cost(self) -> float:
        """What the network costs now, in the unit of the target; latency is predicted, in seconds."""
        return self._tracker.cost

    @property
    def goal(self) -> float:
        """The cost that is the target."""
        return self.target.goal(self.cost_start)

    def widths(self) -> dict[str, int]:
        """Group name -> neurons left."""
        return {group.name: group.width for group in self.groups} | dict.fromkeys(self._single, 1)

    def reachable_params(self) -> int:
        """Parameters that are left when every group is as narrow as the limits allow."""
        return int(smallest_cost(ParameterCount(self.model, self.groups), self.groups, self.limits, self.ties))

    def reachable(self) -> float:
        """The same in the unit of the target; latency is predicted, in seconds."""
        return self._tracker.smallest()

    def measured_latency(self) -> float:
        """Seconds of one forward as the target counts it, measured now; only for a latency target."""
        return self._tracker.measured_latency()

    def is_event(self) -> bool:
        """Whether the next `step` is a removal event."""
        return not self.stopped and self.step_count + 1 in self.schedule.events

    def stop(self, reason: str) -> Removal:
        """End pruning for good: the events that are left remove nothing. Training can go on.

        Returns:
            The record, which is in the history too.

        Raises:
            ValueError: `reason` is empty.
            RuntimeError: pruning was stopped before.
        """
        if not reason:
            raise ValueError("Pruner.stop: reason is empty, expected a text for the records")
        if self.stopped:
            raise RuntimeError(f"Pruner.stop: stopped already ({self.stopped})")
        self.stopped = reason
        record = self._nothing(self.step_count, self.goal, f"pruning stopped: {reason}", "stop")
        self.history.append(record)
        return record

    def step(self) -> list[Removal]:
        """Count one optimizer step and, at an event, remove neurons.

        Returns:
            One record for each group that lost neurons; at an event that removes nothing, one record with the reason;
            between events nothing.

        Raises:
            RanksError: ranks differ in weights, widths, steps or settings; said on all of them, and nothing is changed.
            ValueError: factors or scores are not finite; the state of an optimizer cannot be cut (said by the
                constructor or at the first call, if it was made by then). Model, optimizers and factors are as before,
                and the step is not counted.
            RuntimeError: the model has made no training forward yet (said at the first call).
        """
        step = self.step_count + 1
        if self._ranks is not None:
            self._ranks.hear(self.curvature)
        self._states.take_in_stepped()
        if step == 1:  # not only at the first event, which may be hours away
            self._states.check(self.groups)
            check_watched(self.curvature, self.criterion)
        budget = None if self.stopped else self.schedule.budget(step, self.cost_start, self.goal)
        removals = [] if budget is None else self._event(step, budget)
        self.step_count = step
        self.history += removals
        return removals

    def _event(self, step: int, budget: float) -> list[Removal]:
        last = self.schedule.is_last(step)
        losses = LossBudget(self.max_predicted_loss, calibration(self.history, self._compensates(budget)))
        removals: list[Removal] = []
        if self._ranks is not None:
            self._ranks.prepare(self._agreement())
        if last:
            self._calibrate()
        most = self._range(budget, last)[1]
        while self.cost > most:
            found = self._remove(step, budget, last, losses, removals[-1].round + 1 if removals else 0)
            removals += found
            if not found or not last or losses.exceeded:
                break
            self._calibrate()
        note = self._note(budget, last, losses, nothing=not removals)
        if not removals:
            return [self._nothing(step, budget, note)]
        return [*removals[:-1], replace(removals[-1], note=note)]

    def _calibrate(self) -> None:
        self._tracker.calibrate()
        if self._ranks is not None:
            self._ranks.share_latency(self._tracker)

    def _range(self, budget: float, last: bool) -> tuple[float, float]:
        """The costs at which an event may end; none goes below what meets the target, if that can be."""
        least, most = self.target.range(self.cost_start)
        return least, most if last else budget

    def _note(self, budget: float, last: bool, losses: LossBudget, *, nothing: bool) -> str:
        """What is out of the ordinary about an event; a warning too where the target is missed."""
        least, most = self._range(budget, last)
        missed = self.cost > most
        if missed and losses.exceeded:
            note = loss_budget_note(self.target.unit, self.cost, budget, losses.limit)
        elif missed and last:
            limits = f"min_width={self.limits.min_width}, round_to={self.limits.round_to}"
            limits += f" and {len(self.refused)} layers that stay"
            note = shortfall_note(self.target.unit, self.cost, budget, limits)
        elif last and self.cost < least and not nothing:
            return overshoot_note(self.target.unit, self.cost, budget)
        else:
            stays = "the limits let no group lose neurons"
            if self.reachable() < self.cost:
                stays = "no neurons could go without ending below the target"
            note = stays if missed else "the budget is met already"
            return f"nothing removed: {note}" if nothing else ""
        if last:
            warnings.warn(f"Pruner: {note}", stacklevel=4)
        return f"nothing removed: {note}" if nothing and losses.exceeded else note

    def _nothing(self, step: int, budget: float, note: str, kind: str = "event") -> Removal:
        return Removal.nothing(step, self.params, budget, self.target.unit, self.cost, note, kind)

    def _remove(self, step: int, budget: float, last: bool, losses: LossBudget, number: int) -> list[Removal]:
        """One round: score, choose, compensate, cut."""
        compensate = self._compensates(budget)
        context = ScoringContext(self.model, self.groups, self.curvature, seed=self.seed, step=step)
        criterion, paper = self._criterion_in_use(compensate), self._tracker.on_paper()
        selection = self._selection_in_use(criterion, compensate)
        ties, ranks = self.ties, self._ranks
        least, most = self._range(budget, last)
        end = End(least, closely=last)
        whole = [self.widths_start[group.name] for group in self.groups] if self.keep_proportions else None
        choice = choose(
            context, criterion, selection, paper, most, self.limits, losses, ties=ties, whole=whole, end=end
        )
        choice = choice if ranks is None else ranks.choice(choice, losses)
        pruned = choice.pruned
        if not pruned:
            return []
        replacements = None if choice.joint is None or not compensate else choice.joint.compensated()
        if compensate and replacements is None:
            replacements = self.criterion.compensation(context, pruned)
        replacements = replacements if ranks is None else ranks.replacements(replacements)
        loss_change = LossChange(self.curvature, context.predictions) if self._measures else None
        choice = choice._replace(joint=None)
        del context  # H is worth nothing any more, and the cut wants memory
        params, cost, widths = self.params, self.cost, [group.width for group in self.groups]
        plan(
            self.model,
            self.coupling,
            pruned,
            optimizer=self._states.optimizers,
            curvature=self.curvature,
            replacements=replacements,
            ema_models=self.ema_models,
            seen=self._states.seen,
        ).commit()
        if ranks is not None:
            ranks.renew()
        return removal_records(
            self.groups,
            pruned,
            widths,
            choice.scores,
            choice.costs,
            step=step,
            params_before=params,
            params_after=self.params,
            budget=budget,
            compensated=compensate,
            round=number,
            unit=self.target.unit,
            cost_before=cost,
            cost_after=self.cost,
            predicted_change=choice.predicted_change,
            measured_change=None if loss_change is None else loss_change.measure(),
            calibration=losses.calibration,
        )

    @property
    def _measures(self) -> bool:
        """Whether changes of the loss can be measured: there are calls to make again, and what they return is known."""
        return self.measure and self.curvature.loss.needs_output and bool(self.curvature.recent_calls)

    def _compensates(self, budget: float) -> bool:
        if self.compensate != "auto":
            return bool(self.compensate)
        if self.criterion.compensates != "method":
            return self.criterion.compensates == "always"
        left = budget if self.target.unit == "params" else self.params
        return self.curvature.has_convolutions or left < MLP_COMPENSATION_BELOW * self.params_start

    def _selection_in_use(self, criterion: Criterion, compensate: bool) -> str:
        if self.selection != "auto":
            return self.selection
        return "greedy" if criterion.greedy and compensate and self.curvature.has_convolutions else "independent"

    def _criterion_in_use(self, compensate: bool) -> Criterion:
        if self.compensate == "auto" and not compensate and self.criterion.uncompensated is not None:
            return self.criterion.uncompensated
        return self.criterion

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and containers: counters, sizes, settings and the history."""
        return {
            "step_count": self.step_count,
            "params_start": self.params_start,
            "target": asdict(self.target),
            "events": list(self.schedule.events),
            "criterion": self.criterion.name,
            "selection": self.selection,
            "ties": named_ties(self.groups, self.ties),
            "keep_proportions": self.keep_proportions,
            "widths_start": self.widths_start,
            "widths": self.widths(),
            "tensors": {group.name: _tensors(group) for group in self.groups} | self._single,
            "attributes": held_attributes(self.model, self.coupling),
            "cost_start": self.cost_start,
            "latency": self._tracker.state_dict(),
            "stopped": self.stopped,
            "history": [record.state() for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` with a pruner of the same settings, on the model as it was then.

        Raises:
            ValueError: naming the first setting or width that differs; nothing is changed then.
        """
        own = self.state_dict()
        asked = ("target", "events", "criterion", "selection")
        for key in asked if self._proportions_asked == "auto" else (*asked, "keep_proportions"):
            if state[key] != own[key]:
                raise ValueError(f"Pruner.load_state_dict: {key} is {state[key]!r} in the state, expected {own[key]!r}")
        single, inside = self._found_in_single(state)
        widths = {group.name: group.width for p, group in enumerate(self.groups) if p not in inside}
        wanted = {name: width for name, width in state["widths"].items() if name not in single}
        for name in [*widths, *wanted]:
            if wanted.get(name) != widths.get(name):
                raise ValueError(
                    f"Pruner.load_state_dict: {name!r} has {wanted.get(name)} neurons in the state, "
                    f"{widths.get(name)} in the model; load the pruned model first"
                )
        self.coupling.keep([p for p in range(len(self.groups)) if p not in inside])
        self._single = single
        positions = {group.name: position for position, group in enumerate(self.groups)}
        # found anew in a pruned network, groups could be tied that have come to equal widths by chance
        self.ties[:] = [
            tuple(positions[name] for name in tie) for tie in state["ties"] if single.keys().isdisjoint(tie)
        ]
        self.keep_proportions, self.widths_start = state["keep_proportions"], dict(state["widths_start"])
        self.history = [Removal.from_state(record) for record in state["history"]]
        self.step_count, self.params_start = state["step_count"], state["params_start"]
        self.cost_start, self.stopped = state["cost_start"], state["stopped"]
        self._tracker.load_state_dict(state["latency"])

    def _found_in_single(self, state: Mapping[str, Any]) -> tuple[dict[str, list[str]], set[int]]:
        """Groups of the state with one neuron left that is not seen as one here, and the own groups inside of them.

        A search in the pruned network takes an attention's only head, say, for a group of the neurons of that head.
        """
        own = {group.name: group.width for group in self.groups}
        single = {name: tensors for name, tensors in state["tensors"].items() if state["widths"][name] == 1}
        single = {name: tensors for name, tensors in single.items() if own.get(name) != 1}
        owned = {tensor for tensors in single.values() for tensor in tensors}
        inside = {p for p, group in enumerate(self.groups) if owned.issuperset(_tensors(group))}
        return single, inside


def _tensors(group: NeuronGroup) -> list[str]:
    return sorted({name for member in group.members for name in member.names})


def _check_types(target: Target, **names: object) -> None:
    """Raise TypeError for a target that is none, and for names that are given as one string."""
    if not isinstance(target, Target):
        raise TypeError(f"Pruner: target is {target!r}, expected a flatprune.Target")
    for argument, value in names.items():
        if isinstance(value, str):  # would be taken apart into letters
            raise TypeError(f"Pruner: {argument} is {value!r}, expected a list of names")
