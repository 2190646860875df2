"""A neuron of a network: everything that goes when one channel goes, as plain indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.coupling.terms import Term

PRODUCER, CHANNELWISE, CONSUMER = "producer", "channelwise", "consumer"


_NAMED = 3  # layers of one refusal that a message names


class Refused(Exception):  # noqa: N818 - control flow inside the package, not an error of the user's
    """A group cannot be pruned; the message is the reason."""


@dataclass
class Member:
    """What the neurons of a group own in one tensor.

    Attributes:
        names: qualified names of a parameter or buffer, as in `state_dict`; several if it is tied.
        dim: the dimension along which entries go.
        groups: 1, or those of a grouped convolution whose input channels (of a transposed one: output channels) are
            meant: `index` counts all of them, group by group, while the tensor holds those of one.
        roles: of "producer" (what makes the channel), "channelwise" (what acts on it alone: biases, norms, depthwise
            convolutions) and "consumer" (what reads it); a tied tensor may have several.
        index: int64 [neurons, k] on the CPU, the entries that belong to each neuron, ascending; k > 1 for the heads of
            an attention, or behind a flatten.
        size: entries of the dimension in all, those of no neuron too; `groups` times the tensor's own size.
    """

    names: tuple[str, ...]
    dim: int
    groups: int
    roles: frozenset[str]
    index: Tensor
    size: int

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def module(self) -> str:
        """Qualified name of the module that owns the tensor."""
        return module_of(self.name)


@dataclass
class NeuronGroup:
    """Neurons that are coupled over several tensors.

    Attributes:
        name: qualified name of the first producer in forward order.
        members: what they own, tensor by tensor.
        groups: equal slices of the neurons, of which the same number must go (grouped convolutions, group norms, heads
            whose channels go); 1 without such a constraint.
        group_of: int64 [neurons] on the CPU, the slice of each neuron.
        multiple: widths that the network's kernels take are multiples of so many neurons.
    """

    name: str
    members: list[Member]
    groups: int = 1
    group_of: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    multiple: int = 1

    @property
    def width(self) -> int:
        """Neurons that are left."""
        return self.members[0].index.shape[0]

    @property
    def unit(self) -> int:
        """Channels that a neuron is: 1, or for example head_dim for the head of an attention."""
        return min(m.index.shape[1] for m in self.members if m.roles & {PRODUCER, CONSUMER})

    def of_role(self, role: str) -> list[Member]:
        """The members of one role."""
        return [member for member in self.members if role in member.roles]

    def producers(self) -> list[str]:
        """The modules that make the neurons, once each."""
        return list(dict.fromkeys(member.module for member in self.of_role(PRODUCER)))


class Refusal(NamedTuple):
    """Neurons that stay.

    Attributes:
        layers: the modules that make them.
        reason: what stands in the way.
        expected: nobody would expect them to be prunable, so no warning is due.
    """

    layers: tuple[str, ...]
    reason: str
    expected: bool = False

    def __str__(self) -> str:
        named = ", ".join(map(repr, self.layers[:_NAMED]))
        more = f" and {len(self.layers) - _NAMED} more" if len(self.layers) > _NAMED else ""
        return f"{named}{more}: {self.reason}"


class Attribute(NamedTuple):
    """An integer that a module holds and that follows the width of a group, such as `num_heads`.

    Attributes:
        module: qualified name.
        key: name of the attribute.
        place: where in it if it is a tuple, list or dict, else None.
        step: by how much it falls
        per: with so many neurons of the group.
    """

    module: str
    key: str
    place: int | str | None
    step: int
    per: int = 1

    def after(self, value: int, neurons: int) -> int:
        """The integer once so many neurons have gone."""
        return value - self.step * neurons // self.per


@dataclass
class Coupling:
    """The groups of a network that can be pruned, and why others cannot.

    Attributes:
        groups: in forward order.
        refusals: what stays, one entry for each group of neurons.
        attributes: name of a group -> integers that follow its width.
        macs: what the multiply-accumulates of the first example in evaluation mode are made of, see
            `flatprune.coupling.products`.
        attention: whether products of activations, summed over some of a neuron's channels, weigh others, as the scores
            of a head do.
    """

    groups: list[NeuronGroup] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    attributes: dict[str, list[Attribute]] = field(default_factory=dict)
    macs: list[Term] = field(default_factory=list)
    attention: bool = False

    def keep(self, positions: Sequence[int]) -> None:
        """Leave only the groups at these positions; what the others own is fixed from now on."""
        widths = [group.width for group in self.groups]
        self.macs = [term.of_groups(positions, widths) for term in self.macs]
        self.groups[:] = [self.groups[position] for position in positions]

    @property
    def refused(self) -> dict[str, str]:
        """Name of a producer -> the first reason why neurons of it stay."""
        found: dict[str, str] = {}
        for refusal in self.refusals:
            for layer in refusal.layers:
                found.setdefault(layer, refusal.reason)
        return found

    @property
    def expected(self) -> set[str]:
        """Those of `refused` that need no warning: the output layer and what the user excluded."""
        surprising = {layer for refusal in self.refusals if not refusal.expected for layer in refusal.layers}
        return set(self.refused) - surprising

    def refuse(self, layers: Iterable[str], reason: str, *, expected: bool = False) -> None:
        """Note why neurons that these layers make stay as they are."""
        refusal = Refusal(tuple(layers), reason, expected)
        if refusal.layers and refusal not in self.refusals:
            self.refusals.append(refusal)


def module_of(tensor: str) -> str:
    """Qualified name of the module that owns a tensor, or the weight that is computed of it (`parametrizations`)."""
    module, parametrized, _ = tensor.partition(".parametrizations.")
    return module if parametrized else tensor.rpartition(".")[0]


def tensor_name(module: str, key: str) -> str:
    """Qualified name of the tensor `key` of a module, as in `state_dict`."""
    return f"{module}.{key}" if module else key
