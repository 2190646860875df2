"""Which neurons go in one round of an event: scored, lowest first, within the limits, until the budget is met.

*Independent*: by the scores as they are, over the whole network. *Greedy*: one neuron after the other, each score
knowing which were pruned before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.criteria import CRITERIA, Criterion, Scores, ScoringContext
from flatprune.criteria.base import JointScores
from flatprune.cutting.neurons import NeuronGroup
from flatprune.pruning.costs import CostModel
from flatprune.pruning.limits import Limits, LossBudget

SELECTIONS = ("auto", "independent", "greedy")  # does a score know which neurons were pruned before? (see `Pruner`)


def check_selection(selection: str, criterion: Criterion) -> None:
    """Raise ValueError for a selection that is none, or that the criterion cannot serve."""
    if selection not in SELECTIONS:
        raise ValueError(f"Pruner: selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    if selection == "greedy" and criterion.joint is None:
        able = ", ".join(name for name, other in CRITERIA.items() if other.joint is not None)
        raise ValueError(f"Pruner: selection 'greedy' needs joint scores, which {criterion.name} has not; {able} have")


class Choice(NamedTuple):
    """The neurons of one round.

    Attributes:
        pruned: position of a group -> int64 [m] neurons that go, ascending.
        scores: what they were ranked by, one tensor [neurons] a group; of a greedy selection, before the first went.
        costs: what goes with a neuron of each group.
        predicted_change: of the loss, in total; None if the criterion predicts none.
    """

    pruned: dict[int, Tensor]
    scores: Scores
    costs: list[float]
    predicted_change: float | None


@torch.no_grad()
def choose(
    context: ScoringContext,
    criterion: Criterion,
    selection: str,
    paper: CostModel,
    budget: float,
    limits: Limits,
    losses: LossBudget,
    *,
    closely: bool,
) -> Choice:
    """Score all neurons and choose those that go; `losses` is charged with what they are predicted to cost.

    Args:
        context: of the network as it stands.
        criterion: judges.
        selection: "independent" or "greedy".
        paper: the network's costs; left as the choice leaves the network.
        budget: cost to get down to.
        limits: how many may go.
        losses: ends the choice where the loss is predicted to rise too much.
        closely: end near the budget.

    Raises:
        ValueError: scores are not finite.
    """
    costs = paper.neuron_costs()
    if selection == "greedy":
        assert criterion.joint is not None
        joint = criterion.joint(context)
        criterion.refuse_not_finite(context, joint.scores)
        scores = [score / cost for score, cost in zip(joint.scores, costs)]
        pruned = select_greedily(paper, context.groups, joint, budget, limits, closely=closely, losses=losses)
        predicted = joint.total if criterion.predicts_loss else None
    else:
        changes = criterion.scores(context)
        scores = [score / cost for score, cost in zip(changes, costs)] if criterion.per_cost else changes
        known = changes if criterion.predicts_loss else None
        pruned = select(paper, context.groups, scores, budget, limits, closely=closely, changes=known, losses=losses)
        predicted = None if known is None else sum(float(known[p][neurons].sum()) for p, neurons in pruned.items())
    losses.spent += predicted or 0.0
    return Choice(pruned, scores, costs, predicted)


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


def select_greedily(
    costs: CostModel,
    groups: Sequence[NeuronGroup],
    joint: JointScores,
    budget: float,
    limits: Limits,
    *,
    closely: bool = False,
    losses: LossBudget | None = None,
) -> dict[int, Tensor]:
    """The neurons to remove, one by one: lowest joint score by cost first until the network costs `budget`.

    Where several neurons of a group must go together (rounding, grouped convolutions), they are the lowest of the
    group, and their mean score stands for them.

    Args:
        costs: the network as it stands; left as it is without the neurons. Scores are divided by what goes with a
            neuron before the first one has been pruned.
        groups: its neuron groups.
        joint: their joint scores; it knows of the removal afterwards.
        budget: cost to get down to.
        limits: how many may go; where they bind, more than `budget` is left.
        closely: the last removal is, of those that reach the budget, the one of least total score.
        losses: choosing stops at the first neuron whose change of the loss this budget does not allow any more.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    prices = costs.neuron_costs()
    left = [torch.ones(group.width, dtype=torch.bool) for group in groups]
    sizes = [limits.bundles(group) for group in groups]
    while costs.cost > budget:
        moves = {p: _lowest(groups[p], joint.scores[p], left[p], sizes[p][0]) for p in range(len(groups)) if sizes[p]}
        if not moves:
            break
        position = min(moves, key=lambda p: float(joint.scores[p][moves[p]].mean()) / prices[p])
        finishing = [p for p in moves if costs.cost_without(p, len(moves[p])) <= budget]
        if closely and position in finishing:
            position = min(finishing, key=lambda p: float(joint.scores[p][moves[p]].sum()))
        change = float(joint.scores[position][moves[position]].sum())
        if losses is not None and not losses.allows(joint.total + change):
            break
        for neuron in moves[position].tolist():
            joint.remove(position, neuron)
        left[position][moves[position]] = False
        costs.remove(position, sizes[position].pop(0))
    return {p: (~alive).nonzero().flatten() for p, alive in enumerate(left) if not bool(alive.all())}


def _lowest(group: NeuronGroup, score: Tensor, left: Tensor, size: int) -> Tensor:
    """The `size` neurons of lowest score among those left, equally many of each slice."""
    order = removal_order(group, score.masked_fill(~left, torch.inf))
    return order[:size]


def removal_order(group: NeuronGroup, score: Tensor) -> Tensor:
    """Neurons by ascending score; with slices, the lowest of each slice, then the second lowest of each, ..."""
    order = score.argsort(stable=True)
    if group.groups == 1:
        return order
    slices = [order[group.group_of[order] == part] for part in range(group.groups)]
    return torch.stack(slices, dim=1).flatten()


class _Bundle(NamedTuple):
    score: float
    position: int
    start: int
    size: int

    def sum_of(self, ranked: Tensor) -> float:
        """Sum over its neurons of values [neurons] in the order of removal."""
        return float(ranked[self.start : self.start + self.size].sum())


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
