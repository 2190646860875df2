"""Greedy selection as it is defined: whole matrices updated and everything scored again after each neuron."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flatprune.coupling import NeuronGroup
from flatprune.criteria import ScoringContext
from flatprune.criteria.members import Reading, readings
from flatprune.criteria.saliency import factor_blocks
from flatprune.pruning.costs import CostModel
from flatprune.pruning.limits import Limits, LossBudget
from flatprune.pruning.selection import End
from flatprune.pruning.ties import Tie


class DirectObs:
    """What `JointObs` is to give: V <- V - V_J (H_JJ)^-1 H_J., H <- H - H_.J (H_JJ)^-1 H_J. on folded weights."""

    def __init__(self, context: ScoringContext) -> None:
        self.total, self.groups = 0.0, context.groups
        self.readings = readings(context.layers, context.groups, "consumer")
        self.layers: dict[tuple[str, int], list[Tensor]] = {}
        self.gone: set[tuple[int, int]] = set()
        inverses = context.inverses("consumer")
        for reading in self.readings:
            G = factor_blocks(context.curvature.factors[f"{reading.layer}.G"])[reading.group]
            V = context.curvature.folded_weight(reading.layer).unflatten(0, (-1, len(G)))[reading.group]
            H = inverses[reading.layer][reading.group]
            self.layers[reading.layer, reading.group] = [V.double().clone(), G.double(), H.double().clone()]

    @property
    def scores(self) -> Sequence[Tensor]:
        found = [torch.zeros(group.width, dtype=torch.float64) for group in self.groups]
        for reading in self.readings:
            for neuron, columns in zip(reading.neurons.tolist(), reading.entries):
                if (reading.position, neuron) not in self.gone:
                    found[reading.position][neuron] += self._score(reading, columns)
        return found

    def _score(self, reading: Reading, J: Tensor) -> Tensor:
        V, G, H = self.layers[reading.layer, reading.group]
        return 0.5 * torch.linalg.solve(H[J][:, J], V[:, J].T @ G @ V[:, J]).trace()

    def remove(self, position: int, neuron: int) -> None:
        self.total += float(self.scores[position][neuron])
        self.gone.add((position, neuron))
        for reading in self.readings:
            for J in reading.entries[reading.neurons == neuron] if reading.position == position else ():
                V, _, H = self.layers[reading.layer, reading.group]
                update = torch.linalg.solve(H[J][:, J], H[J])
                V -= V[:, J] @ update
                H -= H[:, J] @ update

    def change(self, neurons: Mapping[int, Sequence[int]]) -> float:
        other = copy.copy(self)
        other.gone, other.layers = set(self.gone), {part: list(found) for part, found in self.layers.items()}
        for found in other.layers.values():
            found[0], found[2] = found[0].clone(), found[2].clone()
        for position, some in neurons.items():
            for neuron in some:
                other.remove(position, neuron)
        return other.total - self.total


def select_directly(
    costs: CostModel,
    groups: Sequence[NeuronGroup],
    joint: DirectObs,
    budget: float,
    limits: Limits,
    *,
    ties: Sequence[Tie],
    end: End,
    losses: LossBudget,
) -> dict[int, list[int]]:
    """As `flatprune.pruning.selection.select_greedily`, by a look at everything before each removal."""
    prices = costs.neuron_costs()
    pruned: dict[int, list[int]] = {position: [] for position in range(len(groups))}
    sizes = {tie: limits.bundles(*(groups[p] for p in tie)) for tie in ties}
    while costs.cost > budget and any(sizes.values()):
        scores, moves = joint.scores, {}
        for tie in ties:
            if sizes[tie]:
                neurons = {p: _lowest(groups[p], scores[p], pruned[p], sizes[tie][0]) for p in tie}
                change = sum(float(scores[p][n]) for p, chosen in neurons.items() for n in chosen)
                price = sum(prices[p] for p in tie) / len(tie)
                moves[tie] = (change / (price * sizes[tie][0] * len(tie)), change, neurons)
        best = min(moves, key=lambda tie: moves[tie][0])
        finishing = [tie for tie in moves if costs.cost_without(tie, sizes[tie][0]) <= budget]
        if end.closely and best in finishing:
            best = min(finishing, key=lambda tie: moves[tie][1])
        if not losses.allows(joint.total + joint.change(moves[best][2])):
            break
        for position, chosen in moves[best][2].items():
            for neuron in chosen:
                joint.remove(position, neuron)
            pruned[position] += chosen
        costs.remove_from(best, sizes[best].pop(0))
    return {position: sorted(neurons) for position, neurons in pruned.items() if neurons}


def _lowest(group: NeuronGroup, score: Tensor, gone: list[int], size: int) -> list[int]:
    left = [n for n in score.argsort(stable=True).tolist() if n not in gone]
    slices = [[n for n in left if int(group.group_of[n]) == part] for part in range(group.groups)]
    return [n for part in slices for n in part[: size // group.groups]]
