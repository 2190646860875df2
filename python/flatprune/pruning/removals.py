"""What the events of pruning removed, and why: one record a group and event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flatprune.coupling import NeuronGroup
from flatprune.pruning.targets import UNITS, amount


@dataclass(frozen=True)
class Removal:
    """What an event removed from one group of neurons, or why it removed nothing.

    Attributes:
        step: optimizer steps taken.
        layer: name of the group, its first producer; empty in the record of an event that removed nothing.
        removed: number of neurons.
        neurons: their indices before the removal, ascending.
        width_before, width_after: neurons of the group.
        params_before, params_after: parameters of the whole network before and after the cut.
        budget: what the network was to cost after the event, in `unit`.
        compensated: whether the survivors were updated.
        note: anything out of the ordinary; empty otherwise.
        kind: "removal"; "event" for one at which nothing was removed; "stop" for the end of pruning before its time.
        round: of the cuts of this event, from 0; more than one is made only at the last event.
        unit: of the target: "params", "macs", "neurons" or "latency" (seconds).
        cost_before, cost_after: of the whole network before and after the cut.
        neuron_cost: what went with a neuron of this group before the cut: scores are divided by it, but for the
            magnitude baselines.
        lowest_removed, highest_removed, lowest_kept: scores as they were ranked, of this group's neurons.
        predicted_change: the change of the loss that the whole cut was to make, the sum of its neurons' scores before
            they were divided by their cost. Of the "obs" score that is the change after the survivors have been
            compensated, of the "obd" score without; single changes are added up as if they did not meet, and the sum
            is multiplied by `calibration`. None where the score predicts no loss.
        measured_change: what the whole cut made of it, see `flatprune.criteria.loss_change`; None if not measured.
        calibration: see `flatprune.pruning.predicted_vs_measured.calibration`.
    """

    step: int
    layer: str
    removed: int
    neurons: tuple[int, ...]
    width_before: int
    width_after: int
    params_before: int
    params_after: int
    budget: float
    compensated: bool
    note: str = ""
    kind: str = "removal"
    round: int = 0
    unit: str = "params"
    cost_before: float | None = None
    cost_after: float | None = None
    neuron_cost: float | None = None
    lowest_removed: float | None = None
    highest_removed: float | None = None
    lowest_kept: float | None = None
    predicted_change: float | None = None
    measured_change: float | None = None
    calibration: float = 1.0

    @classmethod
    def nothing(cls, step: int, params: int, budget: float, unit: str, cost: float, note: str, kind: str) -> Removal:
        """The record of something at which no neuron went, because of `note`."""
        return cls(step, "", 0, (), 0, 0, params, params, budget, False, note, kind, 0, unit, cost, cost)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**asdict(self), "neurons": list(self.neurons)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Removal:
        """The inverse of `state`."""
        return cls(**{**state, "neurons": tuple(state["neurons"])})

    def explanation(self) -> dict[str, Any]:
        """All but the neurons' indices, for people and for `history.jsonl`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "neurons"}


def removal_records(
    groups: Sequence[NeuronGroup],
    pruned: Mapping[int, Tensor],
    widths: Sequence[int],
    scores: Sequence[Tensor],
    costs: Sequence[float],
    **cut: Any,
) -> list[Removal]:
    """One record for each group that lost neurons in a cut.

    Args:
        groups: after the cut.
        pruned: position in `groups` -> int64 [m] neurons that went, ascending.
        widths: neurons of each group before.
        scores: as they were ranked, one tensor [neurons before] a group.
        costs: what went with a neuron of each group.
        cut: the fields of `Removal` that describe the whole cut.
    """
    records = []
    for position, neurons in sorted(pruned.items()):
        removed, kept = _split(scores[position], neurons)
        records.append(
            Removal(
                layer=groups[position].name,
                removed=len(neurons),
                neurons=tuple(neurons.tolist()),
                width_before=widths[position],
                width_after=groups[position].width,
                neuron_cost=costs[position],
                lowest_removed=float(removed.min()),
                highest_removed=float(removed.max()),
                lowest_kept=float(kept.min()),
                **cut,
            )
        )
    return records


def _split(score: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.ones(len(score), dtype=torch.bool)
    kept[neurons] = False
    return score[neurons], score[kept]


def shortfall_note(unit: str, cost: float, budget: float, limits: str) -> str:
    """What is said where the limits stop the network short of its target."""
    return (
        f"the target of {amount(unit, budget)} {UNITS[unit]} is out of reach: {amount(unit, cost)} are left "
        f"with {limits}"
    )


def overshoot_note(unit: str, cost: float, budget: float) -> str:
    """What is said where no neurons end within the tolerance of the target."""
    return (
        f"{amount(unit, cost)} {UNITS[unit]} are left, {1 - cost / budget:.1%} below the target of "
        f"{amount(unit, budget)}: no neurons that could go end nearer"
    )


def loss_budget_note(unit: str, cost: float, budget: float, limit: float | None) -> str:
    """What is said where the predicted loss ended an event short of its budget."""
    return (
        f"max_predicted_loss={limit:g} ended the event at {amount(unit, cost)} {UNITS[unit]}, "
        f"the budget was {amount(unit, budget)}"
    )
