"""What stays of every tensor when neurons go: `index_select` by tensor and dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flatprune.coupling.neurons import Member, NeuronGroup

Pruned = Mapping[int, Tensor]  # position of a group -> int64 [m] neurons that go


class Cut(NamedTuple):
    """What stays of a tensor along one dimension.

    Attributes:
        dim: the dimension.
        groups: 1, or those of a grouped convolution whose inputs (transposed: outputs) `kept` counts.
        kept: int64 [m], ascending.
        size: entries before.
    """

    dim: int
    groups: int
    kept: Tensor
    size: int

    def within_groups(self) -> Tensor:
        """Kept entries [groups, m / groups] as each group of the convolution counts them."""
        return (self.kept % (self.size // self.groups)).view(self.groups, -1)


def tensor_cuts(groups: Sequence[NeuronGroup], pruned: Pruned) -> dict[str, list[Cut]]:
    """First name of every tensor that loses entries -> what stays, a `Cut` for each dimension.

    Args:
        groups: the groups of the network, as they stand.
        pruned: position of a group -> its neurons that go.
    """
    lost: dict[tuple[str, int, int], list[Tensor]] = {}
    for position, neurons in pruned.items():
        for member in groups[position].members:
            key = (member.name, member.dim, member.groups)
            lost.setdefault(key, []).append(member.index[neurons].flatten())
    sizes = axis_sizes(groups)
    cuts: dict[str, list[Cut]] = {}
    for (name, dim, count), entries in lost.items():
        mask = torch.ones(sizes[name, dim, count], dtype=torch.bool)
        mask[torch.cat(entries)] = False
        cuts.setdefault(name, []).append(Cut(dim, count, mask.nonzero().flatten(), len(mask)))
    return cuts


def cut_tensor(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """A new tensor with the kept entries, in the memory format of `tensor`.

    Example:
        >>> cut_tensor(torch.zeros(8, 4), [Cut(0, 1, torch.tensor([0, 2]), 8)]).shape
        torch.Size([2, 4])
    """
    kept = tensor
    for cut in sorted(cuts, key=lambda cut: (-cut.groups, cut.dim)):  # by groups first, while these are whole
        kept = _selected(kept, cut)
    if tensor.layout != torch.strided:  # the gradient of a sparse embedding
        return kept
    return kept.contiguous(memory_format=_memory_format(tensor))


def cut_shape(tensor: Tensor, cuts: Sequence[Cut]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of `cut_tensor`."""
    shape = list(tensor.shape)
    for cut in cuts:
        shape[cut.dim] = len(cut.kept) // cut.groups
    dims = range(tensor.dim())
    inner_first = (1, 3, 2, 0) if _memory_format(tensor) == torch.channels_last else reversed(dims)
    strides, step = [0] * len(shape), 1
    for d in inner_first:
        strides[d], step = step, step * max(1, shape[d])
    return tuple(shape), tuple(strides)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _selected(tensor: Tensor, cut: Cut) -> Tensor:
    if cut.groups == 1:
        return tensor.index_select(cut.dim, cut.kept.to(tensor.device))
    rows = tensor.unflatten(0, (cut.groups, -1))  # [groups, rows, columns, ...]
    index = cut.within_groups().to(tensor.device)
    index = index.view(cut.groups, 1, -1, *[1] * (rows.dim() - 3)).expand(-1, rows.shape[1], -1, *rows.shape[3:])
    return rows.gather(2, index).flatten(0, 1)


def axis_sizes(groups: Sequence[NeuronGroup]) -> dict[tuple[str, int, int], int]:
    """Entries of each (tensor, dimension, groups) that neurons own parts of: known by whoever made the groups."""
    sizes: dict[tuple[str, int, int], int] = {}
    for group in groups:
        for member in group.members:
            sizes[member.name, member.dim, member.groups] = member.size
    return sizes


def renumbered(member: Member, neurons: Tensor, cut: Cut | None) -> Member:
    """A member for the neurons [m] that stay, once its tensor is cut."""
    index = member.index[neurons]
    if cut is None:
        return Member(member.names, member.dim, member.groups, member.roles, index, member.size)
    position = torch.full((cut.size,), -1, dtype=torch.int64)
    position[cut.kept] = torch.arange(len(cut.kept))
    return Member(member.names, member.dim, member.groups, member.roles, position[index], len(cut.kept))
