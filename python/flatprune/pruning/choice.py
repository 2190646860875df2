"""What goes in one round of a removal event, by which scores, and what the loss is predicted to do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.criteria import Criterion, Scores, ScoringContext
from flatprune.pruning.costs import CostModel
from flatprune.pruning.greedy import select_greedily
from flatprune.pruning.selection import Limits, LossBudget, select


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
