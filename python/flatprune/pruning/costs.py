"""What a network costs while neurons are removed on paper: its parameters, multiply-accumulates or neurons."""

from __future__ import annotations

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
    is_depthwise,
    shares_of,
    weight_of,
)
from kfac_ext.curvature.modes import module_modes, undisturbed
from kfac_ext.layers.convolution import TRANSPOSED


@dataclass
class _Layer:
    outputs: int
    inputs: int  # 1 for layers without a matrix
    area: int  # weights an input, times the groups that share them
    shares: int
    vectors: int  # parameters an output besides the matrix: bias, or weight and bias of a norm

    @property
    def params(self) -> int:
        return self.outputs * (self.inputs * self.area // self.shares + self.vectors)

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs * self.area // self.shares)


def _layer_sizes(module: nn.Module) -> _Layer:
    vectors = sum(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    outputs = channels(module, "")
    if isinstance(module, MATRICES):
        inputs = 1 if is_depthwise(module) else channels(module, CONSUMER)
        shares = 1 if is_depthwise(module) else shares_of(module)
        return _Layer(outputs, inputs, weight_of(module)[:1, :1].numel(), shares, vectors)
    return _Layer(outputs, 0, 0, 1, vectors)


class CostModel(ABC):
    """The cost of a network in one unit while neurons are removed on paper; the network itself stays as it is.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
        self._layers: dict[str, _Layer] = {}
        self._shares: list[list[tuple[str, bool, int]]] = []
        self._widths = [group.width for group in groups]
        self._partitions = [group.partitions for group in groups]
        for group in groups:
            self._shares.append([(m.name, m.role == CONSUMER, m.index.shape[1]) for m in group.members])
            for member in group.members:
                self._layers[member.name] = _layer_sizes(member.module)

    @property
    @abstractmethod
    def cost(self) -> float:
        """What the network costs now."""

    def remove(self, position: int, neurons: int) -> None:
        """Take `neurons` neurons of the group at `position` away, or give them back if negative."""
        self._widths[position] -= neurons
        for name, is_input, size in self._shares[position]:
            if is_input:
                self._layers[name].inputs -= size * neurons
            else:
                self._layers[name].outputs -= size * neurons

    def cost_without(self, position: int, neurons: int) -> float:
        """The cost after `neurons` neurons of the group at `position` have gone."""
        self.remove(position, neurons)
        cost = self.cost
        self.remove(position, -neurons)
        return cost

    def neuron_costs(self) -> list[float]:
        """What goes with one neuron of each group, at current sizes; scores are divided by it."""
        # a grouped convolution loses one neuron a share at least, so the cost is that of a whole round
        return [
            (self.cost - self.cost_without(position, partitions)) / partitions
            for position, partitions in enumerate(self._partitions)
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


class FlopCount(CostModel):
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
