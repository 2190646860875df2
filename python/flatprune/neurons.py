"""A neuron of a network: everything that goes when one output channel of a layer goes, as plain indices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
PRODUCER, FOLLOWER, CONSUMER = "producer", "follower", "consumer"


class Refused(Exception):  # noqa: N818 - control flow inside the package, not an error of the user's
    """A group cannot be pruned; the message is the reason.

    Args:
        reason: what stands in the way.
        expected: nobody would expect the group to be prunable, so no warning is due.
    """

    def __init__(self, reason: str, *, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


@dataclass
class Member:
    """What the neurons of a group own in one layer.

    Attributes:
        name: qualified name of the module.
        module: the layer.
        role: "producer" (rows of a weight), "follower" (entries of a norm, PReLU or depthwise convolution) or
            "consumer" (input channels, that is columns of a weight).
        index: int64 [neurons, k] on the CPU, the k output (producer, follower) or input (consumer) channels of
            the layer that belong to each neuron, ascending; k > 1 for example behind a flatten.
    """

    name: str
    module: nn.Module
    role: str
    index: Tensor


@dataclass
class NeuronGroup:
    """Neurons that are coupled over several layers.

    Attributes:
        name: qualified name of the first producer in forward order.
        members: what they own, layer by layer.
        partitions: how many equal shares the neurons fall into, of which the same number must go (grouped
            convolutions); 1 without such a constraint.
        partition: int64 [neurons] on the CPU, the share of each neuron.
    """

    name: str
    members: list[Member]
    partitions: int = 1
    partition: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def width(self) -> int:
        """Neurons that are left."""
        return self.members[0].index.shape[0]

    def of_role(self, role: str) -> list[Member]:
        """The members of one role."""
        return [member for member in self.members if member.role == role]


@dataclass
class Coupling:
    """The groups of a network that can be pruned, and why the others cannot.

    Attributes:
        groups: in forward order.
        refused: name of a producer -> reason.
        expected: names among `refused` that need no warning: the output layer and what the user excluded.
    """

    groups: list[NeuronGroup] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)

    def refuse(self, names: Iterable[str], refusal: Refused) -> None:
        """Note why the layers named stay as they are; a layer's first reason counts."""
        for name in names:
            if name not in self.refused:
                self.refused[name] = str(refusal)
                if refusal.expected:
                    self.expected.add(name)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer is a convolution with exactly one input and one output channel a group."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def channels(module: nn.Module, role: str) -> int:
    """Current number of output (producer, follower) or input (consumer) channels, from the shapes of the tensors."""
    if role == CONSUMER:
        return weight_of(module).shape[1] * shares_of(module)
    for tensor in (module.weight, getattr(module, "running_mean", None)):
        if isinstance(tensor, Tensor):
            return tensor.shape[0]
    return int(module.num_features)  # type: ignore[arg-type] # a norm without tensors


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d."""
    assert isinstance(module.weight, Tensor)
    return module.weight


def shares_of(module: nn.Module) -> int:
    """Groups of a convolution, 1 for other layers."""
    return module.groups if isinstance(module, nn.Conv2d) else 1
