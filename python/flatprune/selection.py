"""Which neurons go at an event: the lowest scores of the whole network, within the limits, until the budget is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flatprune.neurons import CONSUMER, MATRICES, NeuronGroup, channels, is_depthwise, shares_of, weight_of


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


class ParameterCount:
    """The exact number of parameters of a network while neurons are removed on paper.

    Args:
        model: the network.
        groups: its neuron groups, as they stand.
    """

    def __init__(self, model: nn.Module, groups: Sequence[NeuronGroup]) -> None:
        self._layers: dict[str, _Layer] = {}
        self._shares: list[list[tuple[str, bool, int]]] = []
        for group in groups:
            self._shares.append([(m.name, m.role == CONSUMER, m.index.shape[1]) for m in group.members])
            for member in group.members:
                self._layers[member.name] = _layer_sizes(member.module)
        total = sum(parameter.numel() for parameter in model.parameters())
        self._fixed = total - sum(layer.params for layer in self._layers.values())

    @property
    def params(self) -> int:
        """Parameters of the network now."""
        return self._fixed + sum(layer.params for layer in self._layers.values())

    def remove(self, position: int, neurons: int) -> None:
        """Take `neurons` neurons of the group at `position` away, or give them back if negative."""
        for name, is_input, size in self._shares[position]:
            if is_input:
                self._layers[name].inputs -= size * neurons
            else:
                self._layers[name].outputs -= size * neurons

    def params_without(self, position: int, neurons: int) -> int:
        """Parameters of the network after `neurons` neurons of the group at `position` have gone."""
        self.remove(position, neurons)
        params = self.params
        self.remove(position, -neurons)
        return params


def _layer_sizes(module: nn.Module) -> _Layer:
    vectors = sum(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    outputs = channels(module, "")
    if isinstance(module, MATRICES):
        inputs = 1 if is_depthwise(module) else channels(module, CONSUMER)
        shares = 1 if is_depthwise(module) else shares_of(module)
        return _Layer(outputs, inputs, weight_of(module)[:1, :1].numel(), shares, vectors)
    return _Layer(outputs, 0, 0, 1, vectors)


class Limits(NamedTuple):
    """What a removal must respect.

    Attributes:
        round_to: widths, in channels, become multiples of this.
        min_width: channels that stay in a group at least (of an attention: one head or more of that many together).
        max_fraction: largest share of a group that goes at once.
    """

    round_to: int = 1
    min_width: int = 2
    max_fraction: float = 0.5

    def step(self, group: NeuronGroup) -> int:
        """Neurons that go together: a multiple of the rounding and of the shares of a grouped convolution."""
        rounding = self.round_to // math.gcd(self.round_to, group.unit)
        return math.lcm(rounding, group.partitions)

    def floor(self, group: NeuronGroup) -> int:
        """The smallest width of a group."""
        step, least = self.step(group), -(-max(self.min_width, 1) // group.unit)
        return min(group.width, step * -(-least // step))

    def bundles(self, group: NeuronGroup) -> list[int]:
        """Sizes of the bundles that may go at once, the first one bringing the width to a multiple of the step."""
        step, width = self.step(group), group.width
        removable = min(width - self.floor(group), int(self.max_fraction * width + 1e-9))
        first = width % step or step
        if removable < first:
            return []
        return [first] + [step] * ((removable - first) // step)


class _Bundle(NamedTuple):
    score: float
    position: int
    start: int
    size: int


def smallest_params(model: nn.Module, groups: Sequence[NeuronGroup], limits: Limits) -> int:
    """Parameters that are left when every group is as narrow as the limits allow."""
    count = ParameterCount(model, groups)
    for position, group in enumerate(groups):
        count.remove(position, group.width - limits.floor(group))
    return count.params


def neuron_costs(model: nn.Module, groups: Sequence[NeuronGroup]) -> list[float]:
    """Parameters that go with one neuron of each group: rows, columns, biases and norm entries, at current sizes."""
    count = ParameterCount(model, groups)
    # a grouped convolution loses one neuron a share at least, so the cost is that of a whole round
    return [
        (count.params - count.params_without(position, group.partitions)) / group.partitions
        for position, group in enumerate(groups)
    ]


def select(
    model: nn.Module,
    groups: Sequence[NeuronGroup],
    scores: Sequence[Tensor],
    budget: int,
    limits: Limits,
    *,
    closely: bool = False,
) -> dict[int, Tensor]:
    """The neurons to remove: globally lowest score first until at most `budget` parameters are left.

    Args:
        model: the network.
        groups: its neuron groups.
        scores: one tensor [neurons] a group.
        budget: parameters to get down to.
        limits: how many may go; where they bind, more than `budget` parameters are left.
        closely: end near the budget: the last neuron is, of those that reach it, the one of least total score
            (score times parameters), and neurons of high score stay after all where the budget allows it.

    Returns:
        Position in `groups` -> int64 [m] neurons, ascending; groups that lose none are left out.
    """
    orders = [_removal_order(group, score) for group, score in zip(groups, scores)]
    count = ParameterCount(model, groups)
    taken: list[_Bundle] = []
    params = count.params
    bundles = _bundles(groups, scores, orders, limits)
    for number, bundle in enumerate(bundles):
        if params <= budget:
            break
        if closely and count.params_without(bundle.position, bundle.size) <= budget:
            bundle = _gentlest_finish(count, bundles[number:], budget)
        count.remove(bundle.position, bundle.size)
        params = count.params
        taken.append(bundle)
    if closely and params <= budget:
        taken = _give_back(count, taken, budget)
    ends: dict[int, int] = {}
    for bundle in taken:
        ends[bundle.position] = max(ends.get(bundle.position, 0), bundle.start + bundle.size)
    return {position: orders[position][:end].sort().values for position, end in ends.items()}


def _removal_order(group: NeuronGroup, score: Tensor) -> Tensor:
    """Neurons by ascending score; with shares, the lowest of each share, then the second lowest of each, ..."""
    order = score.argsort(stable=True)
    if group.partitions == 1:
        return order
    shares = [order[group.partition[order] == share] for share in range(group.partitions)]
    return torch.stack(shares, dim=1).flatten()


def _bundles(
    groups: Sequence[NeuronGroup], scores: Sequence[Tensor], orders: Sequence[Tensor], limits: Limits
) -> list[_Bundle]:
    bundles = []
    for position, group in enumerate(groups):
        sizes = limits.bundles(group)
        ranked = scores[position][orders[position]]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        bundles += [
            _Bundle(float(ranked[start : start + size].mean()), position, start, size)
            for start, size in zip(starts, sizes)
        ]
    return sorted(bundles, key=lambda bundle: (bundle.score, bundle.position, bundle.start))


def _gentlest_finish(count: ParameterCount, left: Sequence[_Bundle], budget: int) -> _Bundle:
    """Of the bundles that may go next and reach the budget, the one whose score times parameters is least."""
    params = count.params
    nexts: dict[int, _Bundle] = {}
    for bundle in left:
        nexts.setdefault(bundle.position, bundle)
    after = {position: count.params_without(position, bundle.size) for position, bundle in nexts.items()}
    finishing = [position for position in nexts if after[position] <= budget]
    return nexts[min(finishing, key=lambda position: nexts[position].score * (params - after[position]))]


def _give_back(count: ParameterCount, taken: list[_Bundle], budget: int) -> list[_Bundle]:
    """Drop bundles from the end as long as the budget holds; within a group only the last one can stay."""
    last = {bundle.position: bundle for bundle in taken}
    kept: list[_Bundle] = []
    for bundle in reversed(taken):
        if last[bundle.position] is bundle and count.params_without(bundle.position, -bundle.size) <= budget:
            count.remove(bundle.position, -bundle.size)
            earlier = [other for other in taken if other.position == bundle.position and other.start < bundle.start]
            if earlier:
                last[bundle.position] = earlier[-1]
        else:
            kept.append(bundle)
    return kept[::-1]


def widths(groups: Sequence[NeuronGroup]) -> Mapping[str, int]:
    """Group name -> neurons left."""
    return {group.name: group.width for group in groups}
