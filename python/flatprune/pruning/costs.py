"""What a network costs, in the unit of a target: parameters, multiply-accumulates, neurons or seconds.

A `CostModel` removes neurons on paper; `CostTracker` gives one of the network as it stands whenever it is asked.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.cutting.neurons import (
    CONSUMER,
    MATRICES,
    PRODUCER,
    NeuronGroup,
    channels,
    groups_of,
    is_depthwise,
    weight_of,
)
from flatprune.pruning.latency import REST, LatencyTable, batch_of, measure, measure_table
from flatprune.pruning.limits import Limits
from flatprune.pruning.targets import Target
from kfac_ext.curvature.modes import module_modes, undisturbed
from kfac_ext.layers.convolution import TRANSPOSED


@dataclass
class _Layer:
    outputs: int
    inputs: int  # 1 for layers without a matrix
    area: int  # weights an input, times the groups that use them
    groups: int
    vectors: int  # parameters an output besides the matrix: bias, or weight and bias of a norm

    @property
    def params(self) -> int:
        return self.outputs * (self.inputs * self.area // self.groups + self.vectors)

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs * self.area // self.groups)


def _layer_sizes(module: nn.Module) -> _Layer:
    vectors = sum(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    outputs = channels(module, "")
    if isinstance(module, MATRICES):
        inputs = 1 if is_depthwise(module) else channels(module, CONSUMER)
        groups = 1 if is_depthwise(module) else groups_of(module)
        return _Layer(outputs, inputs, weight_of(module)[:1, :1].numel(), groups, vectors)
    return _Layer(outputs, 0, 0, 1, vectors)


class CostModel(ABC):
    """The cost of a network in one unit while neurons are removed on paper; the network itself stays as it is.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
        self._layers: dict[str, _Layer] = {}
        self._members: list[list[tuple[str, bool, int]]] = []
        self._widths = [group.width for group in groups]
        self._slices = [group.groups for group in groups]
        for group in groups:
            self._members.append([(m.name, m.role == CONSUMER, m.index.shape[1]) for m in group.members])
            for member in group.members:
                self._layers[member.name] = _layer_sizes(member.module)

    @property
    @abstractmethod
    def cost(self) -> float:
        """What the network costs now."""

    def remove(self, position: int, neurons: int) -> None:
        """Take `neurons` neurons of the group at `position` away, or give them back if negative."""
        self._widths[position] -= neurons
        for name, is_input, size in self._members[position]:
            if is_input:
                self._layers[name].inputs -= size * neurons
            else:
                self._layers[name].outputs -= size * neurons

    def cost_without(self, position: int, neurons: int) -> float:
        """The cost after `neurons` neurons of the group at `position` have been pruned."""
        self.remove(position, neurons)
        cost = self.cost
        self.remove(position, -neurons)
        return cost

    def neuron_costs(self) -> list[float]:
        """What goes with one neuron of each group, at current sizes; scores are divided by it."""
        # a grouped convolution loses one neuron a slice at least, so the cost is that of a whole round
        return [
            (self.cost - self.cost_without(position, slices)) / slices for position, slices in enumerate(self._slices)
        ]


class ParameterCount(CostModel):
    """The exact number of parameters: with a neuron go rows, columns, biases and norm entries."""

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
        super().__init__(model, groups)
        total = sum(parameter.numel() for parameter in model.parameters())
        self._fixed = total - sum(layer.params for layer in self._layers.values())

    @property
    def cost(self) -> int:
        """Parameters of the network now."""
        return self._fixed + sum(layer.params for layer in self._layers.values())


class MacCount(CostModel):
    """The exact number of multiply-accumulates of the linear and convolution layers for one sample.

    A layer does its weights times its output positions; a grouped or depthwise convolution only what it does.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
        positions: what `output_positions` found, at any widths.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup], positions: Mapping[str, int]) -> None:
        super().__init__(model, groups)
        modules = dict(model.named_modules())
        self._positions = {name: count for name, count in positions.items() if name in self._layers}
        others = [name for name in positions if name not in self._layers]
        self._fixed = sum(positions[name] * modules[name].weight.numel() for name in others)  # type: ignore[operator,union-attr]

    @property
    def cost(self) -> int:
        """Multiply-accumulates of the network now, for one sample."""
        return self._fixed + sum(count * self._layers[name].weights for name, count in self._positions.items())


class NeuronCount(CostModel):
    """The number of neurons of all groups."""

    @property
    def cost(self) -> int:
        """Neurons now."""
        return sum(self._widths)


class LatencyModel(CostModel):
    """Predicted latency in seconds while neurons are removed on paper.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
        positions: what `output_positions` found.
        table: what was measured.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[NeuronGroup], positions: Mapping[str, int], table: LatencyTable
    ) -> None:
        super().__init__(model, groups)
        modules = dict(model.named_modules())
        self._positions, self._table = positions, table
        self._fixed = {name: modules[name] for name in positions if name not in self._layers}

    def work(self) -> dict[str, float]:
        """Multiply-accumulates of every layer, and under "" the outputs of all of them, for one sample."""
        work = {name: float(self._positions[name] * weight_of(module).numel()) for name, module in self._fixed.items()}
        outputs = sum(self._positions[name] * channels(module, PRODUCER) for name, module in self._fixed.items())
        for name, layer in self._layers.items():
            if name in self._positions:
                work[name] = float(self._positions[name] * layer.weights)
                outputs += self._positions[name] * layer.outputs
        work[REST] = float(outputs)
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
        halves = [max(p, w // 2 // p * p) for w, p in zip(self._widths, self._slices)]
        costs = [(now - self.cost_without(position, half)) / half for position, half in enumerate(halves)]
        least = 1e-3 * sum(costs) / len(costs) or 1.0
        return [max(cost, least) for cost in costs]


def smallest_cost(costs: CostModel, groups: Sequence[NeuronGroup], limits: Limits) -> float:
    """The cost that is left when every group is as narrow as the limits allow; `costs` is left at that."""
    for position, group in enumerate(groups):
        costs.remove(position, group.width - limits.floor(group))
    return costs.cost


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
            self._table = measure_table(model, groups, self._inputs, list(self._positions), limits, self._work)

    def _work(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> dict[str, float]:
        return LatencyModel(model, groups, self._positions, LatencyTable()).work()

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


@torch.no_grad()
def output_positions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """How often each Linear and convolution applies its weights to one sample: positions, summed over its calls.

    One forward in evaluation mode; model, random streams and buffers are left as they are.

    Args:
        model: the network.
        inputs: what it is called with; the first tensor's first dimension counts the samples.

    Returns:
        Layer name -> positions, of the layers that the forward calls. Pruning does not change them.
    """
    samples = len(inputs[0])
    found: dict[str, int] = {}

    def counter(name: str) -> Any:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            # a transposed convolution applies its weights to every input position
            tensor, role = (inputs[0], CONSUMER) if isinstance(module, TRANSPOSED) else (output, PRODUCER)
            # a layer that does not see the samples (its input is a parameter, say) counts whole
            found[name] = found.get(name, 0) + -(-tensor.numel() // (channels(module, role) * samples))

        return count

    layers = {name: module for name, module in model.named_modules() if isinstance(module, MATRICES)}
    handles = [module.register_forward_hook(counter(name)) for name, module in layers.items()]
    try:
        with module_modes(dict.fromkeys(model.modules(), False)), undisturbed(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
