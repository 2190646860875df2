"""A neuron of a network: everything that goes when one output channel of a layer goes, as plain indices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kfac_ext.layers.convolution import TRANSPOSED

MATRICES = (nn.Linear, _ConvNd)  # what produces and reads neurons
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
JOINT_NORMS = (nn.LayerNorm, nn.GroupNorm)  # their statistics run over several channels
PRODUCER, CHANNELWISE, CONSUMER = "producer", "channelwise", "consumer"


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
        role: "producer" (rows of a weight), "channelwise" (entries of a norm, PReLU or depthwise convolution, heads of
            an attention) or "consumer" (input channels, that is columns of a weight).
        index: int64 [neurons, k] on the CPU, the k output (producer, channelwise) or input (consumer) channels of
            the layer that belong to each neuron, ascending; k > 1 for example behind a flatten, or for the heads of
            an attention.
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
        groups: how many equal slices the neurons fall into, of which the same number must go (grouped
            convolutions, group norms); 1 without such a constraint.
        group_of: int64 [neurons] on the CPU, the slice of each neuron.
    """

    name: str
    members: list[Member]
    groups: int = 1
    group_of: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def width(self) -> int:
        """Neurons that are left."""
        return self.members[0].index.shape[0]

    @property
    def unit(self) -> int:
        """Channels that a neuron is: 1, or for example head_dim for the head of an attention."""
        return min(member.index.shape[1] for member in self.members if member.role != CHANNELWISE)

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
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def is_attention(module: nn.Module) -> bool:
    """Whether a module is a self-attention whose heads can go: `num_heads`, `head_dim`, `qkv` and `proj`.

    `qkv` is a Linear to [3, num_heads, head_dim] and `proj` one from [num_heads, head_dim], as in timm's `Attention`
    and `flatprune.models`.
    """
    parts = [getattr(module, name, None) for name in ("num_heads", "head_dim", "qkv", "proj")]
    heads, size, qkv, proj = parts
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(qkv, nn.Linear)):
        return False
    return isinstance(proj, nn.Linear) and qkv.out_features == 3 * heads * size and proj.in_features == heads * size


def channels(module: nn.Module, role: str) -> int:
    """Current number of output (producer, channelwise) or input (consumer) channels, from the shapes of the tensors."""
    if isinstance(module, MATRICES):
        weight, groups = weight_of(module), groups_of(module)
        if is_transposed(module):  # [in, out/groups, kernel]
            return weight.shape[0] if role == CONSUMER else weight.shape[1] * groups
        return weight.shape[1] * groups if role == CONSUMER else weight.shape[0]
    if is_attention(module):
        return module.num_heads  # type: ignore[return-value]
    for tensor in (module.weight, getattr(module, "running_mean", None)):
        if isinstance(tensor, Tensor):
            return tensor.shape[0]
    return _stated_channels(module)


def _stated_channels(module: nn.Module) -> int:
    """Channels of a norm without tensors."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0]
    return module.num_channels if isinstance(module, nn.GroupNorm) else int(module.num_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Linear or convolution."""
    assert isinstance(module.weight, Tensor)
    return module.weight


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of a layer is [in, out/groups, kernel], not [out, in/groups, kernel]."""
    return isinstance(module, TRANSPOSED)


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution, 1 for other layers."""
    return module.groups if isinstance(module, _ConvNd) else 1


def inputs_of_group(module: nn.Module) -> int:
    """Input channels that one group of a convolution (or a Linear) reads."""
    return channels(module, CONSUMER) // groups_of(module)
