"""Scores that know which neurons went before, for choosing one after the other (`flatprune.pruning.selection`).

Independent scores are right for one neuron; two that stand in for each other both look free. Here the lowest goes, and
what it leaves behind is brought up to date: for "obs" by `kfac_ext.GreedySelection`, so that the scores add up to the
predicted change of the whole removal, 1/2 tr(V_S^T G V_S (H_SS)^-1) for all columns S pruned. For "obd" the same
without compensation: 1/2 tr(V_S^T G V_S A_SS), whose cross terms join the scores of the neurons that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import kfac_ext
from flatprune.coupling import CONSUMER
from flatprune.criteria.members import readings
from flatprune.criteria.saliency import factor_blocks, raw_weight, tensors_of_weight
from kfac_ext.layers.batch_norm import norm_affine
from kfac_ext.ops.greedy import NotDefiniteError

if TYPE_CHECKING:
    from flatprune.criteria.base import ScoringContext

_Part = tuple[str, int]  # a layer, and the group of its convolution


class _Readings:
    """Where the neurons of all groups are read, and sums over it.

    Args:
        context: has the groups and the layers.

    Attributes:
        scores: float64 [neurons] a group, on the CPU.
    """

    def __init__(self, context: ScoringContext) -> None:
        self.all = readings(context.layers, context.groups, CONSUMER)
        self.parts: dict[_Part, list[int]] = {}
        self.of_group: list[list[int]] = [[] for _ in context.groups]
        self._places = []
        for number, reading in enumerate(self.all):
            self.parts.setdefault((reading.layer, reading.group), []).append(number)
            self.of_group[reading.position].append(number)
            places = torch.full((context.groups[reading.position].width,), -1)
            places[reading.neurons] = torch.arange(len(reading.neurons))
            self._places.append(places)
        self.scores = [torch.zeros(group.width, dtype=torch.float64) for group in context.groups]

    def where(self, position: int, neurons: Sequence[int]) -> dict[int, list[int]]:
        """Number of a reading -> which of its neurons these neurons of a group are."""
        found = {}
        for number in self.of_group[position]:
            places = [place for place in self._places[number][list(neurons)].tolist() if place >= 0]
            if places:  # none in another group of a convolution
                found[number] = places
        return found

    def where_all(self, neurons: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        """The same for neurons of several groups, by position."""
        return {
            number: places
            for position, some in neurons.items()
            for number, places in self.where(position, some).items()
        }

    def beside(self, numbers: Sequence[int]) -> set[int]:
        """Positions of the groups that these readings' layers read."""
        parts = {(self.all[number].layer, self.all[number].group) for number in numbers}
        return {self.all[number].position for part in parts for number in self.parts[part]}

    def add_up(self, positions: Sequence[int] | set[int], values: Sequence[Tensor]) -> None:
        """The scores of these groups from one tensor [neurons] a reading."""
        for position in positions:
            total = torch.zeros_like(self.scores[position])
            for number in self.of_group[position]:
                total.index_add_(0, self.all[number].neurons, values[number].double().cpu())
            self.scores[position] = total


class JointObs:
    """Joint scores with compensation by the columns that are left.

    Args:
        context: gives H, G and the weights; what it holds of H is used up.

    Attributes:
        total: the predicted change of the loss of everything that went.

    Raises:
        ValueError: here and from `remove`: naming the layer whose H is not positive definite.
    """

    def __init__(self, context: ScoringContext) -> None:
        self.total = 0.0
        self._context, self._readings = context, _Readings(context)
        self._parts = list(self._readings.parts)
        self._touched: set[str] = set()
        if not self._parts:
            return
        inverses = context.take_inverses(CONSUMER)
        operands: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, part in self._parts:
            layer = context.curvature.layers[name]
            H, G = inverses[name][part], factor_blocks(context.curvature.factors[f"{name}.G"])[part]
            if layer.norm is not None:  # then V = s W: the same scores from W and s G s, which gives W as it becomes
                scale = norm_affine(layer.norm)[0].unflatten(0, (layer.groups, -1))[part].to(G.dtype)
                G = scale[:, None] * G * scale
            operands.append((raw_weight(layer, H).unflatten(0, (layer.groups, -1))[part], H, G.to(H.dtype)))
        number_of = {part: number for number, part in enumerate(self._parts)}
        weights, Hs, Gs = (list(column) for column in zip(*operands))
        entries = [reading.entries for reading in self._readings.all]
        layers = [number_of[reading.layer, reading.group] for reading in self._readings.all]
        with self._naming():
            self._selection = kfac_ext.GreedySelection(weights, Hs, Gs, entries, layers, overwrite=True)
        self._readings.add_up(range(len(context.groups)), self._selection.scores)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Errors inside name layers and groups, not numbers."""
        try:
            yield
        except NotDefiniteError as error:
            name, _ = self._parts[error.layer]
            where = "of the neurons that go"
            if error.columns is not None and error.neuron is not None:
                reading = self._readings.all[error.columns]
                group = self._context.groups[reading.position]
                where = f"of neuron {int(reading.neurons[error.neuron])} of {group.name!r}"
            raise ValueError(
                f"{name}: the inverse of the covariance of its inputs is not positive definite at the columns {where}"
            ) from error

    @property
    def scores(self) -> Sequence[Tensor]:
        """S_j of every neuron, float64 [neurons] a group on the CPU; those of pruned neurons mean nothing."""
        return self._readings.scores

    def remove(self, position: int, neurons: Sequence[int]) -> set[int]:
        """Let neurons of one group go, and score again what is read beside them.

        Returns:
            Positions of the groups whose scores may have changed.
        """
        where = self._readings.where(position, neurons)
        with self._naming():
            self.total += self._selection.remove_(where)
        self._touched |= {self._readings.all[number].layer for number in where}
        changed = self._readings.beside(list(where))
        self._readings.add_up(changed, self._selection.scores)
        return changed

    def change(self, neurons: Mapping[int, Sequence[int]]) -> float:
        """See `flatprune.criteria.base.JointScores.change`."""
        with self._naming():
            return self._selection.change(self._readings.where_all(neurons))

    def compensated(self) -> dict[str, Tensor]:
        """Qualified tensor name -> new values of the weights that read the pruned neurons, as the survivors make up."""
        parts = dict(zip(self._parts, self._selection.weights())) if self._touched else {}
        values: dict[str, Tensor] = {}
        for name in self._touched:
            layer = self._context.curvature.layers[name]
            found = [matrix for part, matrix in parts.items() if part[0] == name]
            values.update(tensors_of_weight(self._context.curvature, name, torch.cat(found)))
            assert len(found) == layer.groups
        return values


class JointObd:
    """Joint scores without compensation.

    Args:
        context: gives A, G and the folded weights.

    Attributes:
        total: the predicted change of the loss of everything that went.
    """

    def __init__(self, context: ScoringContext) -> None:
        self.total = 0.0
        self._readings = _Readings(context)
        statistics = context.statistics(CONSUMER)
        self._parts = {
            (name, part): _Silenced(
                context.curvature.folded_weight(name),
                factor_blocks(context.curvature.factors[f"{name}.G"]),
                statistics.blocks(name),
                part,
            )
            for name, part in self._readings.parts
        }
        self._values = [self._parts[r.layer, r.group].scores(r.entries) for r in self._readings.all]
        self._readings.add_up(range(len(context.groups)), self._values)

    @property
    def scores(self) -> Sequence[Tensor]:
        """S_j of every neuron, float64 [neurons] a group on the CPU; those of pruned neurons mean nothing."""
        return self._readings.scores

    def remove(self, position: int, neurons: Sequence[int]) -> set[int]:
        """As `JointObs.remove`."""
        self.total += self.change({position: neurons})
        where = self._readings.where(position, neurons)
        for part, columns in self._columns(where).items():
            self._parts[part].remove(columns)
            for number in self._readings.parts[part]:
                self._values[number] = self._parts[part].scores(self._readings.all[number].entries)
        changed = self._readings.beside(list(where))
        self._readings.add_up(changed, self._values)
        return changed

    def change(self, neurons: Mapping[int, Sequence[int]]) -> float:
        """See `flatprune.criteria.base.JointScores.change`."""
        columns = self._columns(self._readings.where_all(neurons))
        return sum(float(self._parts[part].scores(J[None])) for part, J in columns.items())

    def _columns(self, where: Mapping[int, Sequence[int]]) -> dict[_Part, Tensor]:
        """The columns of each layer (and group of it) that neurons of readings feed."""
        found: dict[_Part, list[Tensor]] = {}
        for number, places in where.items():
            reading = self._readings.all[number]
            found.setdefault((reading.layer, reading.group), []).append(reading.entries[list(places)].flatten())
        return {part: torch.cat(columns) for part, columns in found.items()}

    def compensated(self) -> None:
        """Nothing: the survivors stay as they are."""


class _Silenced:
    """One layer (one group of it): what each column's silence costs, given the columns S that went.

    1/2 tr(V_J^T G V_J A_JJ) of the columns J of a neuron, and for each of these columns c the sum over s in S of
    (V^T G V)_cs A_cs, which is what they cost together beyond that.
    """

    def __init__(self, V: Tensor, Gs: Sequence[Tensor], As: Sequence[Tensor], part: int) -> None:
        self.A = As[part]
        self.V = V.unflatten(0, (len(Gs), -1))[part].to(self.A.dtype)
        self.GV = Gs[part].to(self.A.dtype) @ self.V
        self.together = torch.zeros(len(self.A), dtype=torch.float64, device=self.A.device)

    def scores(self, columns: Tensor) -> Tensor:
        """S of neurons that feed `columns` [n, k]."""
        columns = columns.to(self.A.device)
        left, right = (matrix[:, columns].transpose(0, 1) for matrix in (self.V, self.GV))  # [n, O, k]
        alone = (left.mT @ right).double() * self.A[columns[:, :, None], columns[:, None, :]]
        return 0.5 * alone.sum(dim=(1, 2)) + self.together[columns].sum(dim=1)

    def remove(self, columns: Tensor) -> None:
        """Let neurons go, which feed `columns` [k]."""
        J = columns.to(self.A.device)
        self.together += ((self.V.mT @ self.GV[:, J]).double() * self.A[:, J]).sum(dim=1)
