"""What a network costs as it stands, in the unit of its target."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flatprune.cutting.neurons import NeuronGroup
from flatprune.pruning.costs import CostModel, MacCount, NeuronCount, ParameterCount, output_positions
from flatprune.pruning.latency import LatencyModel, LatencyTable, batch_of, measure, measure_table
from flatprune.pruning.selection import Limits, smallest_cost
from flatprune.pruning.targets import Target


class CostTracker:
    """Counts, or for a latency target measures, what a network costs; follows its groups when neurons go.

    Args:
        target: gives the unit.
        model: the network; for multiply-accumulates and latency it is run on the inputs, for latency timed (seconds).
        groups: its neuron groups.
        inputs: what the model can be called with.
        limits: how narrow the network may become.
    """

    def __init__(
        self,
        target: Target,
        model: nn.Module,
        groups: Sequence[NeuronGroup],
        inputs: tuple[Any, ...],
        limits: Limits,
    ) -> None:
        self.unit = target.unit
        self._model, self._groups, self._limits = model, groups, limits
        self._positions: dict[str, int] = {}
        self._table: LatencyTable | None = None
        if self.unit in ("macs", "latency"):
            self._positions = output_positions(model, inputs)
        if self.unit == "latency":
            self._inputs = batch_of(inputs, target.latency_batch)
            self._table = measure_table(model, groups, self._inputs, self._positions, limits)

    def on_paper(self) -> CostModel:
        """The network as it stands, for neurons to be removed from on paper."""
        if self.unit == "macs":
            return MacCount(self._model, self._groups, self._positions)
        if self.unit == "neurons":
            return NeuronCount(self._model, self._groups)
        if self._table is not None:
            return LatencyModel(self._model, self._groups, self._positions, self._table)
        return ParameterCount(self._model, self._groups)

    @property
    def cost(self) -> float:
        """What the network costs now; latency is predicted, in seconds."""
        return self.on_paper().cost

    def smallest(self) -> float:
        """The cost that is left when every group is as narrow as the limits allow."""
        return smallest_cost(self.on_paper(), self._groups, self._limits)

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
