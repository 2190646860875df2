"""What a network costs, in the unit of a target: parameters, multiply-accumulates, neurons or seconds.

A `CostModel` removes neurons on paper; `CostTracker` gives one of the network as it stands whenever it is asked.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flatprune.coupling import Coupling, NeuronGroup
from flatprune.coupling.products import parameter_terms
from flatprune.coupling.terms import Term
from flatprune.pruning.latency import REST, LatencyTable, batch_of, measure, measure_table
from flatprune.pruning.limits import Limits
from flatprune.pruning.targets import Target
from flatprune.pruning.ties import Tie, find_ties


class CostModel(ABC):
    """The cost of a network in one unit while neurons are removed on paper; the network itself stays as it is.

    Args:
        groups: its neuron groups, as they stand.
    """

    def __init__(self, groups: Sequence[NeuronGroup]) -> None:
        self._widths = [group.width for group in groups]
        self._rounds = [math.lcm(group.groups, group.multiple) for group in groups]

    @property
    @abstractmethod
    def cost(self) -> float:
        """What the network costs now."""

    def remove(self, position: int, neurons: int) -> None:
        """Take `neurons` neurons of the group at `position` away, or give them back if negative."""
        self._widths[position] -= neurons

    def remove_from(self, tie: Tie, neurons: int) -> None:
        """Take `neurons` neurons away from each group of a tie."""
        for position in tie:
            self.remove(position, neurons)

    def cost_without(self, position: int | Tie, neurons: int) -> float:
        """The cost after `neurons` neurons of the group at `position`, or of each of several, have been pruned."""
        tie = (position,) if isinstance(position, int) else position
        self.remove_from(tie, neurons)
        cost = self.cost
        self.remove_from(tie, -neurons)
        return cost

    def neuron_costs(self) -> list[float]:
        """What goes with one neuron of each group, at current sizes; scores are divided by it."""
        # where several must go together, the cost is that of a whole round
        return [(self.cost - self.cost_without(p, count)) / count for p, count in enumerate(self._rounds)]


class TermCount(CostModel):
    """A cost that is a sum of products of widths, see `flatprune.coupling.terms`.

    Args:
        groups: the neuron groups, as they stand.
        terms: of the network at these widths.
    """

    def __init__(self, groups: Sequence[NeuronGroup], terms: Sequence[Term]) -> None:
        super().__init__(groups)
        self.terms = terms
        self._values = [term.value(self._widths) for term in terms]
        self._total = sum(self._values)
        self._of_group: list[list[int]] = [[] for _ in groups]
        for number, term in enumerate(terms):
            for position in {position for width in term.widths for position, _, _ in width.per_neuron}:
                self._of_group[position].append(number)

    @property
    def cost(self) -> int:
        """The sum now."""
        return self._total

    def remove(self, position: int, neurons: int) -> None:
        """Only the terms of that group change."""
        super().remove(position, neurons)
        for number in self._of_group[position]:
            value = self.terms[number].value(self._widths)
            self._total += value - self._values[number]
            self._values[number] = value


class ParameterCount(TermCount):
    """The exact number of parameters: with a neuron go rows, columns, biases and norm entries.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
        super().__init__(groups, parameter_terms(model, groups))


class MacCount(TermCount):
    """The exact number of multiply-accumulates for one sample, counted by operator.

    Matrix products, convolutions, and the products of an attention between its own inputs.

    Args:
        groups: the neuron groups, as they stand.
        terms: `flatprune.coupling.Coupling.macs`.
    """


class NeuronCount(CostModel):
    """The number of neurons of all groups."""

    @property
    def cost(self) -> int:
        """Neurons now."""
        return sum(self._widths)


class LatencyModel(CostModel):
    """Predicted latency in seconds while neurons are removed on paper.

    Args:
        groups: the neuron groups, as they stand.
        terms: the network's multiply-accumulates.
        layers: modules that are timed one by one.
        table: what was measured.
    """

    def __init__(
        self, groups: Sequence[NeuronGroup], terms: Sequence[Term], layers: Sequence[str], table: LatencyTable
    ) -> None:
        super().__init__(groups)
        self._terms, self._layers, self._table = terms, layers, table

    def work(self) -> dict[str, float]:
        """Multiply-accumulates of every layer, and under "" the outputs of all products, for one sample."""
        work = dict.fromkeys(self._layers, 0.0)
        for term in self._terms:
            if term.module in work:
                work[term.module] += term.value(self._widths)
        work[REST] = float(sum(term.outputs(self._widths) for term in self._terms))
        return work

    @property
    def cost(self) -> float:
        """Predicted latency now, in seconds."""
        return self._table.seconds(self.work())

    def neuron_costs(self) -> list[float]:
        """Seconds that go with one neuron: the mean over half of its group, since single steps drown in the noise.

        Where even that gives nothing, a thousandth of the mean over all groups, so that scores stay comparable.
        """
        now = self.cost
        halves = [max(p, w // 2 // p * p) for w, p in zip(self._widths, self._rounds)]
        costs = [(now - self.cost_without(position, half)) / half for position, half in enumerate(halves)]
        least = 1e-3 * sum(costs) / len(costs) or 1.0
        return [max(cost, least) for cost in costs]


def smallest_cost(
    costs: CostModel, groups: Sequence[NeuronGroup], limits: Limits, ties: Sequence[Tie] | None = None
) -> float:
    """The cost that is left when every group is as narrow as the limits allow; `costs` is left at that."""
    for tie in find_ties(groups, False) if ties is None else ties:
        tied = [groups[position] for position in tie]
        costs.remove_from(tie, tied[0].width - limits.floor(*tied))
    return costs.cost


class CostTracker:
    """Counts, or for a latency target measures, what a network costs; follows its groups when neurons go.

    Args:
        target: gives the unit.
        model: the network; for a latency target it is timed on the inputs (seconds).
        coupling: its neuron groups, and what its multiply-accumulates are made of.
        inputs: what the model can be called with.
        limits: how narrow the network may become.
        ties: groups that keep one width, see `flatprune.pruning.ties`; not copied.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module,
        coupling: Coupling,
        inputs: tuple[Any, ...],
        limits: Limits,
        ties: Sequence[Tie],
    ) -> None:
        self.unit, self._ties = target.unit, ties
        self._model, self._groups, self._limits, self._terms = model, coupling.groups, limits, coupling.macs
        self._table: LatencyTable | None = None
        if self.unit == "latency":
            leaves = {name for name, module in model.named_modules() if next(module.children(), None) is None}
            self._layers = list(dict.fromkeys(term.module for term in self._terms if term.module in leaves))
            self._inputs = batch_of(inputs, target.latency_batch)
            self._table = measure_table(model, coupling, self._inputs, self._layers, limits, self._work)

    def _work(self, groups: Sequence[NeuronGroup]) -> dict[str, float]:
        return LatencyModel(groups, self._terms, self._layers, LatencyTable()).work()

    def on_paper(self) -> CostModel:
        """The network as it stands, for neurons to be removed from on paper."""
        if self.unit == "macs":
            return MacCount(self._groups, self._terms)
        if self.unit == "neurons":
            return NeuronCount(self._groups)
        if self._table is not None:
            return LatencyModel(self._groups, self._terms, self._layers, self._table)
        return ParameterCount(self._model, self._groups)

    @property
    def cost(self) -> float:
        """What the network costs now; latency is predicted, in seconds."""
        return self.on_paper().cost

    def smallest(self) -> float:
        """The cost that is left when every group is as narrow as the limits allow."""
        return smallest_cost(self.on_paper(), self._groups, self._limits, self._ties)

    def calibrate(self) -> None:
        """Time the network itself and scale what is predicted accordingly; nothing to do in other units."""
        if self._table is not None:
            self._table.scale *= self.measured_latency() / self.cost

    def measured_latency(self) -> float:
        """Seconds of one forward of the network as it is, measured now; only for a latency target."""
        return measure(copy.deepcopy(self._model), self._inputs)

    def state_dict(self) -> dict[str, Any] | None:
        """What was measured, in plain values; None if nothing was."""
        return None if self._table is None else self._table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what was measured then."""
        if self._table is not None and state is not None:
            self._table = LatencyTable.from_state(state)
