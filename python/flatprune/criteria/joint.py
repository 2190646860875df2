"""Scores that know which neurons went before, for choosing one after the other (`flatprune.pruning.selection`).

Independent scores are right for one neuron; two that stand in for each other both look free. Here the lowest goes, what
it leaves behind is brought up to date by an update of rank k (the k columns a neuron feeds), and the layers it touched
are scored again. For "obs", with J the pruned columns,

    V <- V - V_J (H_JJ)^-1 H_J.        H <- H - H_.J (H_JJ)^-1 H_J.

so that the scores add up to the predicted change of the whole removal, 1/2 tr(V_S^T G V_S (H_SS)^-1) for all columns S
pruned (block elimination; Hassibi & Stork 1992, sequentially). For "obd" the same without compensation: the products
of V_S A with what is left carry the cross terms of 1/2 tr(V_S^T G V_S A_SS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatprune.criteria.saliency import Reading, factor_blocks, readings
from flatprune.cutting.neurons import CONSUMER

if TYPE_CHECKING:
    from flatprune.criteria.base import ScoringContext


class ColumnScores:
    """Scores of the neurons that are left, given those that went; the base of `JointObs` and `JointObd`.

    Args:
        context: gives A, H, G and the folded weights; it is left as it is.

    Attributes:
        total: the predicted change of the loss of everything that went.
    """

    def __init__(self, context: ScoringContext) -> None:
        self.groups = context.groups
        self.total = 0.0
        self._readings = readings(self.groups, CONSUMER)
        self._blocks: dict[tuple[str, int], _Block] = {}
        for reading in self._readings:
            key = (reading.layer, reading.group)
            if key not in self._blocks:
                self._blocks[key] = self._block(context, reading)
        self._scores = [torch.zeros(group.width, dtype=torch.float64) for group in self.groups]
        self._values = {i: self._score(reading) for i, reading in enumerate(self._readings)}
        for i, reading in enumerate(self._readings):
            self._scores[reading.position].index_add_(0, reading.neurons, self._values[i])

    @property
    def scores(self) -> Sequence[Tensor]:
        """S_j of every neuron, float64 [neurons] a group on the CPU; those of pruned neurons mean nothing."""
        return self._scores

    def remove(self, position: int, neuron: int) -> None:
        """Let one neuron go and score again what reads or is read beside it."""
        self.total += float(self._scores[position][neuron])
        touched = set()
        for reading in self._readings:
            if reading.position != position:
                continue
            for place in (reading.neurons == neuron).nonzero().flatten().tolist():  # one, or none in another group
                key = (reading.layer, reading.group)
                self._blocks[key].remove(reading.entries[place])
                touched.add(key)
        for i, reading in enumerate(self._readings):
            if (reading.layer, reading.group) in touched:
                found = self._score(reading)
                self._scores[reading.position].index_add_(0, reading.neurons, found - self._values[i])
                self._values[i] = found

    def _score(self, reading: Reading) -> Tensor:
        return self._blocks[reading.layer, reading.group].scores(reading.entries).double().cpu()

    def _block(self, context: ScoringContext, reading: Reading) -> _Block:
        raise NotImplementedError


class JointObs(ColumnScores):
    """Joint scores with compensation by the columns that are left."""

    def _block(self, context: ScoringContext, reading: Reading) -> _Block:
        return _Compensated(*_operands(context, reading), context.inverses(CONSUMER)[reading.layer][reading.group])


class JointObd(ColumnScores):
    """Joint scores without compensation."""

    def _block(self, context: ScoringContext, reading: Reading) -> _Block:
        return _Silenced(
            *_operands(context, reading), context.statistics(CONSUMER).blocks(reading.layer)[reading.group]
        )


def _operands(context: ScoringContext, reading: Reading) -> tuple[Tensor, Tensor]:
    """V and G of a reading's group."""
    G = factor_blocks(context.curvature.factors[f"{reading.layer}.G"])[reading.group]
    V = context.curvature.folded_weight(reading.layer).unflatten(0, (-1, G.shape[0]))[reading.group]
    return V, G


class _Block:
    """One layer (one group of it): V [O, d], G V, and a matrix [d, d], in float64 so that many updates stay exact."""

    def __init__(self, V: Tensor, G: Tensor, matrix: Tensor) -> None:
        self.V, self.matrix = V.to(torch.float64, copy=True), matrix.to(torch.float64, copy=True)
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
    """`matrix` is H of the columns that are left; rows and columns of those pruned are zero."""

    def __init__(self, V: Tensor, G: Tensor, matrix: Tensor) -> None:
        super().__init__(V, G, matrix)
        self.alive = torch.ones(len(self.matrix), dtype=torch.bool, device=self.matrix.device)

    def scores(self, columns: Tensor) -> Tensor:
        columns = columns.to(self.matrix.device)
        blocks = self.matrix[columns[:, :, None], columns[:, None, :]]  # H_JJ [n, k, k]
        pruned = ~self.alive[columns]  # their V_J is zero: any definite block gives them the score 0
        blocks = blocks + torch.diag_embed(pruned.to(blocks.dtype))
        return 0.5 * torch.linalg.solve(blocks, self._forms(columns)).diagonal(dim1=1, dim2=2).sum(dim=1)

    def remove(self, columns: Tensor) -> None:
        J = columns.to(self.matrix.device)
        update = torch.linalg.solve(self.matrix[J][:, J], self.matrix[J])  # (H_JJ)^-1 H_J.
        for held in (self.V, self.GV, self.matrix):
            held.addmm_(held[:, J], update, alpha=-1.0)
        self.alive[J] = False
        self.V[:, J] = self.GV[:, J] = 0.0
        self.matrix[J] = self.matrix[:, J] = 0.0


class _Silenced(_Block):
    """`matrix` is A, and `error` = V_S A [O, d] of the pruned columns S: what their silence does beside each column."""

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
        self.error.addmm_(self.V[:, J], self.matrix[J])
        self.V[:, J] = self.GV[:, J] = 0.0
