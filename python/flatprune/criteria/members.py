"""Where neurons stand in the layers that have factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.coupling import CONSUMER, Member, NeuronGroup
from kfac_ext.curvature import Curvature
from kfac_ext.layers import Layer

Layers = dict[tuple[str, ...], Layer]  # names of a tensor -> the layer whose weight it is


def layers_of(curvature: Curvature, groups: Sequence[NeuronGroup]) -> Layers:
    """The layers with factors whose weights neurons own parts of."""
    by_weight = {layer.weight_name: layer for layer in curvature.layers.values()}
    found: Layers = {}
    for member in (member for group in groups for member in group.members):
        for name in member.names:
            if name in by_weight:
                found[member.names] = by_weight[name]
    return found


def stands_in(member: Member, layer: Layer, role: str) -> bool:
    """Whether a member's entries are the layer's input channels (consumer) or output channels (producer)."""
    return member.dim == (layer.input_dim if role == CONSUMER else layer.output_dim)


def member_rows(tensor: Tensor, member: Member) -> Tensor:
    """The tensor as a matrix whose rows a member's index counts: [size, rest]."""
    if member.groups == 1:
        return tensor.movedim(member.dim, 0).reshape(member.size, -1)
    return tensor.unflatten(0, (member.groups, -1)).transpose(1, 2).reshape(member.size, -1)


class Reading(NamedTuple):
    """Where neurons of one group stand in one layer (in one group of a grouped convolution).

    Attributes:
        position: of the neuron group.
        layer: name of the layer.
        group: of the convolution, 0 without groups.
        neurons: int64 [n].
        entries: int64 [n, block]: columns of the weight as a matrix that the neurons feed (consumer), or rows that make
            them (producer), within their group.
    """

    position: int
    layer: str
    group: int
    neurons: Tensor
    entries: Tensor


def readings(layers: Layers, groups: Sequence[NeuronGroup], role: str) -> list[Reading]:
    """One reading for each member of a role ("consumer" or "producer") and group of its convolution."""
    found = []
    for position, group in enumerate(groups):
        for member in group.of_role(role):
            layer = layers[member.names]
            if stands_in(member, layer, role):
                found += _readings(position, member, layer, role)
    return found


def _readings(position: int, member: Member, layer: Layer, role: str) -> list[Reading]:
    size = member.size // layer.groups
    own = member.index // size  # [neurons, k], the group of the convolution
    found = []
    for part in range(layer.groups):
        counts = (own == part).sum(dim=1)
        neurons = counts.nonzero().flatten()
        channels = member.index[neurons][own[neurons] == part].view(len(neurons), -1) % size
        entries = input_columns(layer, channels) if role == CONSUMER else channels
        found.append(Reading(position, layer.name, part, neurons, entries))
    return found


def input_columns(layer: Layer, channels: Tensor) -> Tensor:
    """Columns of a layer's matrix that input channels [..., k] (as their group counts them) feed: [..., k area]."""
    return (channels[..., None] * layer.area + torch.arange(layer.area)).flatten(-2)


def lost_channels(
    layers: Layers, groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor], role: str
) -> list[tuple[Layer, Tensor]]:
    """(layer, bool [channels] which of its input (consumer) or output (producer) channels go), where some do."""
    lost: dict[str, Tensor] = {}
    for position, neurons in pruned.items():
        for member in groups[position].of_role(role):
            layer = layers.get(member.names)
            if layer is not None and stands_in(member, layer, role):
                mask = lost.setdefault(layer.name, torch.zeros(member.size, dtype=torch.bool))
                mask[member.index[neurons].flatten()] = True
    by_name = {layer.name: layer for layer in layers.values()}
    return [(by_name[name], mask) for name, mask in lost.items()]
