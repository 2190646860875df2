"""Which neurons go at an event: the lowest scores of the whole network, within the limits, until the budget is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.cutting.neurons import NeuronGroup
from flatprune.pruning.costs import CostModel

SELECTIONS = ("auto", "independent", "greedy")  # does a score know which neurons went before? (see `Pruner`)


class LossBudget:
    """How much the loss may rise at one event, by the scores' own prediction.

    Args:
        limit: sum of the predicted changes that is allowed, or None for any.

    Attributes:
        spent: predicted changes of what has been removed so far.
        exceeded: whether a neuron had to stay for it.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.spent = 0.0
        self.exceeded = False

    def allows(self, change: float) -> bool:
        """Whether `change` may be added to what is spent; a refusal is noted."""
        if self.limit is None or self.spent + change <= self.limit:
            return True
        self.exceeded = True
        return False


class Limits(NamedTuple):
    """What a removal must respect.

    Attributes:
        round_to: widths, in channels, become multiples of this.
        min_width: channels that stay in a group at least (of an attention: one head or more of that many together).
        max_fraction: largest fraction of a group that goes at once.
    """

    round_to: int = 1
    min_width: int = 2
    max_fraction: float = 0.5

    def step(self, group: NeuronGroup) -> int:
        """Neurons that go together: a multiple of the rounding and of the slices of a grouped convolution."""
        rounding = self.round_to // math.gcd(self.round_to, group.unit)
        return math.lcm(rounding, group.groups)

    def floor(self, group: NeuronGroup) -> int:
        """The smallest width of a group."""
        step, least = self.step(group), -(-max(self.min_width, 1) // group.unit)
        return min(group.width, step * -(-least // step))

    def bundles(self, group: NeuronGroup) -> list[int]:
        """Sizes of the bundles that may go at once, the first one bringing the width to a multiple of the step."""
        step, width = self.step(group), group.width
        removable = min(width - self.floor(group), int(self.max_fraction * width + 1e-9))
        first = width % step or step
        if removable < first:
            return []
        return [first] + [step] * ((removable - first) // step)


class _Bundle(NamedTuple):
    score: float
    position: int
    start: int
    size: int

    def sum_of(self, ranked: Tensor) -> float:
        """Sum over its neurons of values [neurons] in the order of removal."""
        return float(ranked[self.start : self.start + self.size].sum())


def smallest_cost(costs: CostModel, groups: Sequence[NeuronGroup], limits: Limits) -> float:
    """The cost that is left when every group is as narrow as the limits allow; `costs` is left at that."""
    for position, group in enumerate(groups):
        costs.remove(position, group.width - limits.floor(group))
    return costs.cost


def select(
    costs: CostModel,
    groups: Sequence[NeuronGroup],
    scores: Sequence[Tensor],
    budget: float,
    limits: Limits,
    *,
    closely: bool = False,
    changes: Sequence[Tensor] | None = None,
    losses: LossBudget | None = None,
) -> dict[int, Tensor]:
    """The neurons to remove: globally lowest score first until the network costs at most `budget`.

    Args:
        costs: the network as it stands; left as it is without the neurons.
        groups: its neuron groups.
        scores: one tensor [neurons] a group.
        budget: cost to get down to.
        limits: how many may go; where they bind, more than `budget` is left.
        closely: end near the budget: the last neuron is, of those that reach it, the one of least total score
            (score times cost), and neurons of high score stay after all where the budget allows it.
        changes: predicted change of the loss by each neuron, one tensor [neurons] a group.
        losses: choosing stops at the first neuron whose change this budget does not allow any more.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    orders = [removal_order(group, score) for group, score in zip(groups, scores)]
    taken: list[_Bundle] = []
    cost = costs.cost
    change = 0.0
    bundles = _bundles(groups, scores, orders, limits)
    for number, bundle in enumerate(bundles):
        if cost <= budget:
            break
        if closely and costs.cost_without(bundle.position, bundle.size) <= budget:
            bundle = _gentlest_finish(costs, bundles[number:], budget)
        if losses is not None and changes is not None:
            change += bundle.sum_of(changes[bundle.position][orders[bundle.position]])
            if not losses.allows(change):
                break
        costs.remove(bundle.position, bundle.size)
        cost = costs.cost
        taken.append(bundle)
    if closely and cost <= budget:
        taken = _give_back(costs, taken, budget)
    ends: dict[int, int] = {}
    for bundle in taken:
        ends[bundle.position] = max(ends.get(bundle.position, 0), bundle.start + bundle.size)
    return {position: orders[position][:end].sort().values for position, end in ends.items()}


def removal_order(group: NeuronGroup, score: Tensor) -> Tensor:
    """Neurons by ascending score; with slices, the lowest of each slice, then the second lowest of each, ..."""
    order = score.argsort(stable=True)
    if group.groups == 1:
        return order
    slices = [order[group.group_of[order] == part] for part in range(group.groups)]
    return torch.stack(slices, dim=1).flatten()


def _bundles(
    groups: Sequence[NeuronGroup], scores: Sequence[Tensor], orders: Sequence[Tensor], limits: Limits
) -> list[_Bundle]:
    bundles = []
    for position, group in enumerate(groups):
        sizes = limits.bundles(group)
        ranked = scores[position][orders[position]]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        bundles += [
            _Bundle(float(ranked[start : start + size].mean()), position, start, size)
            for start, size in zip(starts, sizes)
        ]
    return sorted(bundles, key=lambda bundle: (bundle.score, bundle.position, bundle.start))


def _gentlest_finish(costs: CostModel, left: Sequence[_Bundle], budget: float) -> _Bundle:
    """Of the bundles that may go next and reach the budget, the one whose score times cost is least."""
    cost = costs.cost
    nexts: dict[int, _Bundle] = {}
    for bundle in left:
        nexts.setdefault(bundle.position, bundle)
    after = {position: costs.cost_without(position, bundle.size) for position, bundle in nexts.items()}
    finishing = [position for position in nexts if after[position] <= budget]
    return nexts[min(finishing, key=lambda position: nexts[position].score * (cost - after[position]))]


def _give_back(costs: CostModel, taken: list[_Bundle], budget: float) -> list[_Bundle]:
    """Drop bundles from the end as long as the budget holds; within a group only the last one can stay."""
    last = {bundle.position: bundle for bundle in taken}
    kept: list[_Bundle] = []
    for bundle in reversed(taken):
        if last[bundle.position] is bundle and costs.cost_without(bundle.position, -bundle.size) <= budget:
            costs.remove(bundle.position, -bundle.size)
            earlier = [other for other in taken if other.position == bundle.position and other.start < bundle.start]
            if earlier:
                last[bundle.position] = earlier[-1]
        else:
            kept.append(bundle)
    return kept[::-1]
