"""Neurons chosen one after the other, each score knowing which neurons went before.

Independent scores are right for one neuron; two that stand in for each other both look free. Here the lowest goes, what
it leaves behind is brought up to date by an update of rank k (the k columns a neuron feeds), and the layers it touched
are scored again. For "obs", with J the columns gone,

    V <- V - V_J (H_JJ)^-1 H_J.        H <- H - H_.J (H_JJ)^-1 H_J.

so that the scores add up to the predicted change of the whole removal, 1/2 tr(V_S^T G V_S (H_SS)^-1) for all columns S
gone (block elimination; Hassibi & Stork 1993, sequentially). For "outgoing" the same without compensation: the products
of V_S A with what is left carry the cross terms of 1/2 tr(V_S^T G V_S A_SS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatprune.costs import CostModel
from flatprune.neurons import CONSUMER, NeuronGroup
from flatprune.saliency import Reading, factor_blocks, readings
from flatprune.selection import Limits, LossBudget, removal_order

if TYPE_CHECKING:
    from flatprune.criteria.base import Evidence


class JointScores:
    """Scores of the neurons that are left, given those that went; the base of `JointObs` and `JointOutgoing`.

    Args:
        evidence: gives A, H, G and the folded weights; it is left as it is.

    Attributes:
        total: the predicted change of the loss of everything that went.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.groups = evidence.groups
        self.total = 0.0
        self._readings = readings(self.groups, CONSUMER)
        self._blocks: dict[tuple[str, int], _Block] = {}
        for reading in self._readings:
            key = (reading.layer, reading.share)
            if key not in self._blocks:
                self._blocks[key] = self._block(evidence, reading)
        self._scores = [torch.zeros(group.width, dtype=torch.float64) for group in self.groups]
        self._values = {i: self._score(reading) for i, reading in enumerate(self._readings)}
        for i, reading in enumerate(self._readings):
            self._scores[reading.position].index_add_(0, reading.neurons, self._values[i])

    @property
    def scores(self) -> Sequence[Tensor]:
        """S_j of every neuron, float64 [neurons] a group on the CPU; those of neurons gone mean nothing."""
        return self._scores

    def remove(self, position: int, neuron: int) -> None:
        """Let one neuron go and score again what reads or is read beside it."""
        self.total += float(self._scores[position][neuron])
        touched = set()
        for reading in self._readings:
            if reading.position != position:
                continue
            for place in (reading.neurons == neuron).nonzero().flatten().tolist():  # one, or none in another share
                key = (reading.layer, reading.share)
                self._blocks[key].remove(reading.entries[place])
                touched.add(key)
        for i, reading in enumerate(self._readings):
            if (reading.layer, reading.share) in touched:
                found = self._score(reading)
                self._scores[reading.position].index_add_(0, reading.neurons, found - self._values[i])
                self._values[i] = found

    def _score(self, reading: Reading) -> Tensor:
        return self._blocks[reading.layer, reading.share].scores(reading.entries).double().cpu()

    def _block(self, evidence: Evidence, reading: Reading) -> _Block:
        raise NotImplementedError


class JointObs(JointScores):
    """Joint scores with compensation by the columns that are left."""

    def _block(self, evidence: Evidence, reading: Reading) -> _Block:
        return _Compensated(*_operands(evidence, reading), evidence.inverses(CONSUMER)[reading.layer][reading.share])


class JointOutgoing(JointScores):
    """Joint scores without compensation."""

    def _block(self, evidence: Evidence, reading: Reading) -> _Block:
        return _Silenced(
            *_operands(evidence, reading), evidence.statistics(CONSUMER).blocks(reading.layer)[reading.share]
        )


def _operands(evidence: Evidence, reading: Reading) -> tuple[Tensor, Tensor]:
    """V and G of a reading's share."""
    G = factor_blocks(evidence.curvature.factors[f"{reading.layer}.G"])[reading.share]
    V = evidence.curvature.folded_weight(reading.layer).unflatten(0, (-1, G.shape[0]))[reading.share]
    return V, G


class _Block:
    """One layer (one share of it): V [O, d], G V, and a matrix [d, d], in float64 so that many updates stay exact."""

    def __init__(self, V: Tensor, G: Tensor, matrix: Tensor) -> None:
        self.V, self.matrix = V.double(), matrix.double().clone()
        self.GV = G.double() @ self.V

    def scores(self, columns: Tensor) -> Tensor:
        """S of neurons that feed `columns` [n, k]."""
        raise NotImplementedError

    def remove(self, columns: Tensor) -> None:
        """Let one neuron go, which feeds `columns` [k]."""
        raise NotImplementedError

    def _forms(self, columns: Tensor) -> Tensor:
        """V_J^T G V_J [n, k, k]."""
        left, right = self.V[:, columns], self.GV[:, columns]  # [O, n, k]
        return torch.einsum("onk,onl->nkl", left, right)


class _Compensated(_Block):
    """`matrix` is H of the columns that are left; rows and columns of those gone are zero."""

    def __init__(self, V: Tensor, G: Tensor, matrix: Tensor) -> None:
        super().__init__(V, G, matrix)
        self.alive = torch.ones(len(self.matrix), dtype=torch.bool, device=self.matrix.device)

    def scores(self, columns: Tensor) -> Tensor:
        columns = columns.to(self.matrix.device)
        blocks = self.matrix[columns[:, :, None], columns[:, None, :]]  # H_JJ [n, k, k]
        gone = ~self.alive[columns]  # their V_J is zero: any definite block gives them the score 0
        blocks = blocks + torch.diag_embed(gone.to(blocks.dtype))
        return 0.5 * torch.linalg.solve(blocks, self._forms(columns)).diagonal(dim1=1, dim2=2).sum(dim=1)

    def remove(self, columns: Tensor) -> None:
        J = columns.to(self.matrix.device)
        update = torch.linalg.solve(self.matrix[J][:, J], self.matrix[J])  # (H_JJ)^-1 H_J.
        self.V = self.V - self.V[:, J] @ update
        self.GV = self.GV - self.GV[:, J] @ update
        self.matrix = self.matrix - self.matrix[:, J] @ update
        self.alive[J] = False
        self.V[:, J] = self.GV[:, J] = 0.0
        self.matrix[J] = self.matrix[:, J] = 0.0


class _Silenced(_Block):
    """`matrix` is A, and `error` = V_S A [O, d] of the columns S gone: what their silence does beside each column."""

    def __init__(self, V: Tensor, G: Tensor, matrix: Tensor) -> None:
        super().__init__(V, G, matrix)
        self.error = torch.zeros_like(self.V)

    def scores(self, columns: Tensor) -> Tensor:
        columns = columns.to(self.matrix.device)
        blocks = self.matrix[columns[:, :, None], columns[:, None, :]]
        own = 0.5 * (self._forms(columns) * blocks).sum(dim=(1, 2))
        return own + (self.GV * self.error).sum(dim=0)[columns].sum(dim=1)

    def remove(self, columns: Tensor) -> None:
        J = columns.to(self.matrix.device)
        self.error = self.error + self.V[:, J] @ self.matrix[J]
        self.V[:, J] = self.GV[:, J] = 0.0


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
            neuron before the first one has gone.
        groups: its neuron groups.
        joint: their joint scores; it knows of the removal afterwards.
        budget: cost to get down to.
        limits: how many may go; where they bind, more than `budget` is left.
        closely: the last removal is, of those that reach the budget, the one of least total score.
        losses: choosing stops at the first neuron whose change of the loss this budget does not allow any more.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    shares = costs.neuron_costs()
    left = [torch.ones(group.width, dtype=torch.bool) for group in groups]
    sizes = [limits.bundles(group) for group in groups]
    while costs.cost > budget:
        moves = {p: _lowest(groups[p], joint.scores[p], left[p], sizes[p][0]) for p in range(len(groups)) if sizes[p]}
        if not moves:
            break
        position = min(moves, key=lambda p: float(joint.scores[p][moves[p]].mean()) / shares[p])
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
    """The `size` neurons of lowest score among those left, equally many of each share."""
    order = removal_order(group, score.masked_fill(~left, torch.inf))
    return order[:size]
