"""Which neurons go in one round of an event: scored, lowest first, within the limits, until the budget is met.

*Independent*: by the scores as they are, over the whole network. *Greedy*: one neuron after the other, each score
knowing which were pruned before. Groups that keep one width (`flatprune.pruning.ties`) lose their lowest neurons
together, and the mean of the scores stands for them. Where groups keep their proportions, the one with most of its
neurons left is next, and scores decide within it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatprune.coupling import NeuronGroup
from flatprune.criteria import CRITERIA, Criterion, Scores, ScoringContext
from flatprune.criteria.base import JointScores
from flatprune.pruning.costs import CostModel
from flatprune.pruning.limits import Limits, LossBudget
from flatprune.pruning.ties import Tie, find_ties

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
        predicted_change: of the loss, in total, calibrated; None if the criterion predicts none.
        joint: what a greedy selection was made by, or None.
    """

    pruned: dict[int, Tensor]
    scores: Scores
    costs: list[float]
    predicted_change: float | None
    joint: JointScores | None


class End(NamedTuple):
    """Where a choice may end.

    Attributes:
        least: the cost that is not to be gone below, if that can be.
        closely: whether the choice is to end at the budget, or between `least` and that; else the lowest score decides
            until the cost would fall below `least`, and what would do that stays.
    """

    least: float = 0.0
    closely: bool = False

    def is_near(self, after: float, budget: float) -> bool:
        """Whether neurons that leave this cost are the last ones, and others may be better ones to end with."""
        return after <= budget and (self.closely or after < self.least)


ANYWHERE = End()


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
    ties: Sequence[Tie],
    whole: Sequence[int] | None,
    end: End,
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
        ties: groups that keep one width.
        whole: widths of the groups, of which they keep the same part each; None: they need not.
        end: where the choice may end.

    Raises:
        ValueError: scores are not finite.
    """
    costs = _shared(paper.neuron_costs(), ties)
    options: dict[str, Any] = {"ties": ties, "whole": whole, "end": end, "losses": losses}
    joint: JointScores | None = None
    if selection == "greedy":
        assert criterion.joint is not None
        joint = criterion.joint(context)
        criterion.refuse_not_finite(context, joint.scores)
        scores = [score / cost for score, cost in zip(joint.scores, costs)]
        pruned = select_greedily(paper, context.groups, joint, budget, limits, **options)
        predicted = joint.total if criterion.predicts_loss else None
    else:
        changes = criterion.scores(context)
        scores = [score / cost for score, cost in zip(changes, costs)] if criterion.per_cost else changes
        known = changes if criterion.predicts_loss else None
        pruned = select(paper, context.groups, scores, budget, limits, changes=known, **options)
        predicted = None if known is None else sum(float(known[p][neurons].sum()) for p, neurons in pruned.items())
    if predicted is not None:
        losses.charge(predicted)
        predicted *= losses.calibration
    return Choice(pruned, scores, costs, predicted, joint)


def select(
    costs: CostModel,
    groups: Sequence[NeuronGroup],
    scores: Sequence[Tensor],
    budget: float,
    limits: Limits,
    *,
    ties: Sequence[Tie] | None = None,
    whole: Sequence[int] | None = None,
    end: End = ANYWHERE,
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
        ties: groups that keep one width, see `flatprune.pruning.ties`; None: no two do.
        whole: widths of the groups, of which they keep the same part each; None: they need not.
        end: where the choice may end. Closely: the last neurons are the ones of least total score (score times cost) of
            those that end there, and neurons of high score stay after all where the budget allows it.
        changes: predicted change of the loss by each neuron, one tensor [neurons] a group.
        losses: choosing stops at the first neuron whose change this budget does not allow any more.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    ties = find_ties(groups, False) if ties is None else ties
    orders = [removal_order(group, score) for group, score in zip(groups, scores)]
    taken: list[_Bundle] = []
    change = 0.0
    for bundle in _bundles_to_go(costs, _bundles(groups, scores, orders, limits, ties, whole), budget, end):
        if losses is not None and changes is not None:
            change += sum(bundle.sum_of(changes[position][orders[position]]) for position in bundle.tie)
            if not losses.allows(change):
                break
        costs.remove_from(bundle.tie, bundle.size)
        taken.append(bundle)
    if end.closely and costs.cost <= budget:
        taken = _give_back(costs, taken, budget)
    ends: dict[int, int] = {}
    for bundle in taken:
        for position in bundle.tie:
            ends[position] = max(ends.get(position, 0), bundle.start + bundle.size)
    return {position: orders[position][:end].sort().values for position, end in ends.items()}


def select_greedily(
    costs: CostModel,
    groups: Sequence[NeuronGroup],
    joint: JointScores,
    budget: float,
    limits: Limits,
    *,
    ties: Sequence[Tie] | None = None,
    whole: Sequence[int] | None = None,
    end: End = ANYWHERE,
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
        ties: groups that keep one width, see `flatprune.pruning.ties`; None: no two do.
        whole, end: as for `select`.
        losses: choosing stops at the first neuron whose change of the loss this budget does not allow any more.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    ties = find_ties(groups, False) if ties is None else ties
    losses = LossBudget() if losses is None else losses
    moves = _Moves(groups, ties, joint, limits, _shared(costs.neuron_costs(), ties), whole)
    for move in _moves_to_go(costs, moves, budget, end):
        if losses.limit is not None and not losses.allows(joint.total + joint.change(move.neurons)):
            break
        costs.remove_from(move.tie, move.size)
        moves.make(move)
    return {p: (~alive).nonzero().flatten() for p, alive in enumerate(moves.left) if not bool(alive.all())}


class _Next(NamedTuple):
    """What may go next of a tie: so many neurons of each of its groups, and the change of the loss by all of them."""

    size: int
    change: float


def _finish(costs: CostModel, nexts: Mapping[Tie, _Next], end: End, most: float) -> tuple[Tie, ...]:
    """The ties that lose the last neurons, where one of them brings the cost down to `most`.

    Of single ones and, if there are none, of pairs that end between `end.least` and `most`, those of least change.
    Where none ends there, the single one of least change that ends below if the end is to be close, else none.
    """
    after = {tie: costs.cost_without(tie, found.size) for tie, found in nexts.items()}
    ends: list[tuple[Tie, ...]] = [(tie,) for tie in nexts if end.least <= after[tie] <= most]
    if not ends:
        pairs = itertools.combinations([tie for tie in nexts if after[tie] > most], 2)
        ends = [pair for pair in pairs if end.least <= _cost_after(costs, pair, nexts) <= most]
    if not ends and end.closely:
        ends = [(tie,) for tie in nexts if after[tie] <= most]
    return min(ends, key=lambda ties: sum(nexts[tie].change for tie in ties), default=())


def _cost_after(costs: CostModel, pair: tuple[Tie, Tie], nexts: Mapping[Tie, _Next]) -> float:
    first, second = pair
    costs.remove_from(first, nexts[first].size)
    cost = costs.cost_without(second, nexts[second].size)
    costs.remove_from(first, -nexts[first].size)
    return cost


def _moves_to_go(costs: CostModel, moves: _Moves, budget: float, end: End) -> Iterator[_Move]:
    """One after the other, each to be made before the next is asked for."""
    while costs.cost > budget and moves.nexts:
        move = moves.lowest()
        if end.is_near(costs.cost_without(move.tie, move.size), budget):
            nexts = {tie: _Next(move.size, move.change) for tie, move in moves.nexts.items()}
            yield from (moves.nexts[tie] for tie in _finish(costs, nexts, end, budget))
            return
        yield move


class _Move(NamedTuple):
    """Neurons that may go next, of each group of a tie, and the sum of their scores."""

    tie: Tie
    size: int
    neurons: dict[int, list[int]]
    change: float


class _Moves:
    """What may go next: one move a tie, and a heap of them, in which those that scores have overtaken stay behind.

    Args:
        groups: the neuron groups.
        ties: groups that keep one width.
        joint: their scores.
        limits: how many may go.
        prices: what goes with a neuron of each group.
        whole: as for `select`.

    Attributes:
        nexts: tie -> the move; without those that have none left.
        left: bool [neurons] a group.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        ties: Sequence[Tie],
        joint: JointScores,
        limits: Limits,
        prices: Sequence[float],
        whole: Sequence[int] | None,
    ) -> None:
        self.nexts: dict[Tie, _Move] = {}
        self.left = [torch.ones(group.width, dtype=torch.bool) for group in groups]
        self._groups, self._joint, self._prices, self._whole = groups, joint, prices, whole
        self._sizes = {tie: limits.bundles(*(groups[position] for position in tie))[::-1] for tie in ties}
        self._tie_of = {position: tie for tie in ties for position in tie}
        self._heap: list[tuple[float, float, int, int, _Move]] = []
        self._pushed = itertools.count()
        self._numbers = {tie: number for number, tie in enumerate(ties)}
        for tie in ties:
            self._look_at(tie)

    def lowest(self) -> _Move:
        """The move of lowest mean score by price, or of the tie with most of its neurons left."""
        while self.nexts.get(self._heap[0][-1].tie) is not self._heap[0][-1]:
            heapq.heappop(self._heap)
        return self._heap[0][-1]

    def make(self, move: _Move) -> None:
        """Let its neurons go."""
        changed = set(move.tie)
        for position, neurons in move.neurons.items():
            changed |= self._joint.remove(position, neurons)
            self.left[position][neurons] = False
        self._sizes[move.tie].pop()
        for tie in {self._tie_of[position] for position in changed}:
            self._look_at(tie)

    def _look_at(self, tie: Tie) -> None:
        if not self._sizes[tie]:
            self.nexts.pop(tie, None)
            return
        size = self._sizes[tie][-1]
        scores = {position: self._joint.scores[position] for position in tie}
        neurons = {p: _lowest(self._groups[p], scores[p], self.left[p], size) for p in tie}
        change = sum(float(scores[position][chosen].sum()) for position, chosen in neurons.items())
        move = self.nexts[tie] = _Move(tie, size, neurons, change)
        score = change / (len(tie) * size * self._prices[tie[0]])
        gone = int((~self.left[tie[0]]).sum())
        part = _part_gone(self._groups[tie[0]].width, gone + size / 2, self._whole, tie)
        heapq.heappush(self._heap, (part, score, self._numbers[tie], next(self._pushed), move))  # of equal, the first


def _shared(prices: Sequence[float], ties: Sequence[Tie]) -> list[float]:
    """What goes with a neuron of each group, where tied groups share it."""
    means = {position: sum(prices[p] for p in tie) / len(tie) for tie in ties for position in tie}
    return [means[position] for position in range(len(prices))]


def _lowest(group: NeuronGroup, score: Tensor, left: Tensor, size: int) -> list[int]:
    """The `size` neurons of lowest score among those left, equally many of each slice."""
    score = score.masked_fill(~left, torch.inf)
    if size == 1:
        return [int(score.numpy().argmin())]  # of equal ones the first
    return removal_order(group, score)[:size].tolist()


def removal_order(group: NeuronGroup, score: Tensor) -> Tensor:
    """Neurons by ascending score; with slices, the lowest of each slice, then the second lowest of each, ..."""
    order = score.argsort(stable=True)
    if group.groups == 1:
        return order
    slices = [order[group.group_of[order] == part] for part in range(group.groups)]
    return torch.stack(slices, dim=1).flatten()


class _Bundle(NamedTuple):
    """Neurons `start` to `start + size` in the order of removal, of each group of a tie; their mean score."""

    score: float
    tie: Tie
    start: int
    size: int

    def sum_of(self, ranked: Tensor) -> float:
        """Sum over its neurons of values [neurons] in the order of removal."""
        return float(ranked[self.start : self.start + self.size].sum())


def _bundles(
    groups: Sequence[NeuronGroup],
    scores: Sequence[Tensor],
    orders: Sequence[Tensor],
    limits: Limits,
    ties: Sequence[Tie],
    whole: Sequence[int] | None,
) -> list[_Bundle]:
    """All that may go, in the order in which they do."""
    bundles: list[tuple[float, _Bundle]] = []
    for tie in ties:
        sizes = limits.bundles(*(groups[position] for position in tie))
        ranked = torch.stack([scores[position][orders[position]] for position in tie]).mean(dim=0)
        for size, start in zip(sizes, itertools.accumulate(sizes, initial=0)):
            part = _part_gone(groups[tie[0]].width, start + size / 2, whole, tie)
            bundles.append((part, _Bundle(float(ranked[start : start + size].mean()), tie, start, size)))
    bundles.sort(key=lambda entry: (entry[0], entry[1].score, entry[1].tie, entry[1].start))
    return [bundle for _, bundle in bundles]


def _part_gone(width: int, gone: float, whole: Sequence[int] | None, tie: Tie) -> float:
    """The part of a group's whole width that is missing once so many neurons have gone; 0 if it does not matter."""
    return 0.0 if whole is None else 1.0 - (width - gone) / whole[tie[0]]


def _bundles_to_go(costs: CostModel, bundles: Sequence[_Bundle], budget: float, end: End) -> Iterator[_Bundle]:
    """One after the other, each to be taken from the costs before the next is asked for."""
    for number, bundle in enumerate(bundles):
        if costs.cost <= budget:
            return
        if end.is_near(costs.cost_without(bundle.tie, bundle.size), budget):
            firsts: dict[Tie, _Bundle] = {}
            for other in bundles[number:]:
                firsts.setdefault(other.tie, other)
            nexts = {
                tie: _Next(first.size, first.score * (costs.cost - costs.cost_without(tie, first.size)))
                for tie, first in firsts.items()
            }
            yield from (firsts[tie] for tie in _finish(costs, nexts, end, budget))
            return
        yield bundle


def _give_back(costs: CostModel, taken: list[_Bundle], budget: float) -> list[_Bundle]:
    """Drop bundles from the end as long as the budget holds; within a tie only the last one can stay."""
    last = {bundle.tie: bundle for bundle in taken}
    kept: list[_Bundle] = []
    for bundle in reversed(taken):
        if last[bundle.tie] is bundle and costs.cost_without(bundle.tie, -bundle.size) <= budget:
            costs.remove_from(bundle.tie, -bundle.size)
            earlier = [other for other in taken if other.tie == bundle.tie and other.start < bundle.start]
            if earlier:
                last[bundle.tie] = earlier[-1]
        else:
            kept.append(bundle)
    return kept[::-1]
