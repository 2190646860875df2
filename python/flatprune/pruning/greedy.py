"""Choosing neurons one after the other, each score knowing which neurons went before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatprune.criteria.base import JointScores
from flatprune.cutting.neurons import NeuronGroup
from flatprune.pruning.costs import CostModel
from flatprune.pruning.selection import Limits, LossBudget, removal_order


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
