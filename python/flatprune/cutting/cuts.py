"""Kept indices of every tensor, and the attributes of every layer, when neurons go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatprune.cutting.neurons import (
    CONSUMER,
    MATRICES,
    Member,
    NeuronGroup,
    channels,
    groups_of,
    inputs_of_group,
    is_attention,
    is_depthwise,
    is_transposed,
    weight_of,
)


class Cut(NamedTuple):
    """What stays of a tensor.

    Attributes:
        rows: int64 [m] kept indices of dimension 0, or None for all.
        columns: int64 [m] kept indices of dimension 1, or [groups, m] of each group of rows; None for all.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """A new tensor with the kept entries, in the memory format of `tensor`."""
        kept = tensor
        if self.columns is not None and self.columns.dim() == 2:
            groups = self.columns.shape[0]
            kept = kept.unflatten(0, (groups, -1))  # [groups, rows, columns, ...]
            index = self.columns.to(tensor.device).view(groups, 1, -1, *[1] * (kept.dim() - 3))
            index = index.expand(-1, kept.shape[1], -1, *kept.shape[3:])
            kept = kept.gather(2, index).flatten(0, 1)
        elif self.columns is not None:
            kept = kept.index_select(1, self.columns.to(tensor.device))
        if self.rows is not None:
            kept = kept.index_select(0, self.rows.to(tensor.device))
        if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return kept.contiguous(memory_format=torch.channels_last)
        return kept.contiguous()


class LayerCut(NamedTuple):
    """Kept channels of one layer: int64 [m] each, None for all.

    Attributes:
        name: qualified name of the layer.
        module: the layer.
        outputs: kept output channels (of a norm or depthwise convolution: channels; of an attention: heads).
        inputs: kept input channels.
    """

    name: str
    module: nn.Module
    outputs: Tensor | None
    inputs: Tensor | None

    def tensors(self) -> Iterator[tuple[str, Tensor, Cut]]:
        """(qualified name, tensor, cut) of every parameter and buffer of the layer that loses entries."""
        own = {**self.module._parameters, **self.module._buffers}
        for key, tensor in own.items():
            if tensor is None or tensor.dim() == 0:
                continue
            cut = self._weight_cut() if key == "weight" and tensor.dim() > 1 else Cut(self.outputs)
            if cut.rows is not None or cut.columns is not None:
                yield tensor_name(self.name, key), tensor, cut

    def _weight_cut(self) -> Cut:
        """Rows and columns that stay of a matrix, of which a transposed convolution's rows are the inputs."""
        rows, columns = (self.inputs, self.outputs) if is_transposed(self.module) else (self.outputs, self.inputs)
        if is_depthwise(self.module):
            return Cut(self.outputs)
        groups = groups_of(self.module)
        if columns is not None and groups > 1:
            columns = (columns % weight_of(self.module).shape[1]).view(groups, -1)
        return Cut(rows, columns)

    def attributes(self) -> dict[str, Any]:
        """Attributes of the layer after the cut, as its forward and its repr use them."""
        module, outputs, inputs = self.module, *(None if kept is None else len(kept) for kept in self[2:])
        values: dict[str, Any]
        if isinstance(module, nn.Linear):
            values = {"out_features": outputs, "in_features": inputs}
        elif is_depthwise(module):
            values = {"out_channels": outputs, "in_channels": outputs, "groups": outputs}
        elif isinstance(module, MATRICES):
            values = {"out_channels": outputs, "in_channels": inputs}
        elif is_attention(module):
            values = {"num_heads": outputs}
        elif isinstance(module, nn.PReLU):
            values = {"num_parameters": outputs}
        elif isinstance(module, nn.LayerNorm):
            values = {"normalized_shape": (outputs,)}
        elif isinstance(module, nn.GroupNorm):
            whole = module.num_groups == channels(module, "")
            values = {"num_channels": outputs, "num_groups": outputs if whole else None}
        else:
            values = {"num_features": outputs}
        return {key: value for key, value in values.items() if value is not None}


def layer_cuts(groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor]) -> dict[str, LayerCut]:
    """Name -> kept channels of every layer that loses some.

    Args:
        groups: the groups of the network.
        pruned: position of a group -> indices [m] of its neurons that go.
    """
    lost: dict[tuple[str, bool], list[Tensor]] = {}
    modules: dict[str, nn.Module] = {}
    for position, neurons in pruned.items():
        for member in groups[position].members:
            modules[member.name] = member.module
            lost.setdefault((member.name, member.role == CONSUMER), []).append(member.index[neurons].flatten())
    cuts = {}
    for name, module in modules.items():
        outputs, inputs = (
            _kept(channels(module, CONSUMER if side else ""), lost[name, side]) if (name, side) in lost else None
            for side in (False, True)
        )
        cuts[name] = LayerCut(name, module, outputs, inputs)
    return cuts


def weight_columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """Columns of a layer's matrix [O, d] that input channels [..., k] feed: [..., k kh kw], within their group."""
    area = weight_of(module)[0, 0].numel()
    return ((inputs % inputs_of_group(module))[..., None] * area + torch.arange(area)).flatten(-2)


def patch_size(module: nn.Module) -> int:
    """d of a layer's matrix [O, d]."""
    return inputs_of_group(module) * weight_of(module)[0, 0].numel()


def tensor_name(layer: str, key: str) -> str:
    """Qualified name of the tensor `key` of a layer, as in `state_dict`."""
    return f"{layer}.{key}" if layer else key


def _kept(size: int, lost: Iterable[Tensor]) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[torch.cat(list(lost))] = False
    return mask.nonzero().flatten()


def renumbered(member: Member, neurons: Tensor, cut: LayerCut) -> Tensor:
    """The index of a member after the cut, for the neurons [m] that stay."""
    kept = cut.inputs if member.role == CONSUMER else cut.outputs
    index = member.index[neurons]
    if kept is None:
        return index
    position = torch.full((channels(member.module, member.role),), -1, dtype=torch.int64)
    position[kept] = torch.arange(len(kept))
    return position[index]
