"""An oracle without labels: a network cut must compute what it does with the columns that read the neurons at zero.

It knows nothing of how neurons were found: of each group only which entries make it and which read it. Layer, group and
root mean square norms take their statistics over the survivors, as they will after the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from flatprune.coupling import CONSUMER, Coupling, cut_tensor, tensor_cuts
from flatprune.coupling.attributes import followed, known_attributes, own_shapes

JOINT_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
Pruned = Mapping[int, Tensor]


def some_of(group: Any, share: float, generator: torch.Generator) -> Tensor:
    """Random neurons of a group, the same number from each of its slices, never all."""
    group_of = group.group_of if group.groups > 1 else torch.zeros(group.width, dtype=torch.int64)
    found = []
    for part in range(group.groups):
        neurons = (group_of == part).nonzero().flatten()
        count = min(max(1, round(share * len(neurons))), len(neurons) - 1)
        found.append(neurons[torch.randperm(len(neurons), generator=generator)[:count]])
    return torch.cat(found).sort().values


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every name of a parameter or buffer -> the tensor."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(tensors)


def cut(model: nn.Module, coupling: Coupling, pruned: Pruned) -> nn.Module:
    """A copy without the neurons."""
    model = copy.deepcopy(model)
    tensors, modules = tensors_of(model), dict(model.named_modules())
    for name, cuts in tensor_cuts(coupling.groups, pruned).items():
        tensors[name].data = cut_tensor(tensors[name].data, cuts)
    for module in modules.values():
        for key, value in known_attributes(module, own_shapes(module)).items():
            setattr(module, key, value)
    removed = {coupling.groups[position].name: len(neurons) for position, neurons in pruned.items()}
    for name, attributes in followed(modules, coupling.attributes, removed).items():
        for key, value in attributes.items():
            setattr(modules[name], key, value)
    return model


def masked(model: nn.Module, coupling: Coupling, pruned: Pruned) -> nn.Module:
    """A copy that is masked, see `mask`."""
    model = copy.deepcopy(model)
    mask(model, coupling, pruned)
    return model


def mask(model: nn.Module, coupling: Coupling, pruned: Pruned, where_made: bool = False) -> list[RemovableHandle]:
    """Zeros where consumers read the neurons, if `where_made` or without consumers where they are made too.

    Returns:
        The hooks of the norms.
    """
    tensors, modules = tensors_of(model), dict(model.named_modules())
    lost: dict[str, list[Tensor]] = {}
    for position, neurons in pruned.items():
        group = coupling.groups[position]
        for member in group.members if where_made else group.of_role(CONSUMER) or group.members:
            set_to_zero(tensors[member.names[0]], member, member.index[neurons].flatten())
        for member in group.members:
            owner = member.names[0].rpartition(".")[0]
            if isinstance(modules[owner], JOINT_NORMS) and member.names[0].endswith("weight"):
                lost.setdefault(owner, []).append(member.index[neurons].flatten())
    return [modules[n].register_forward_hook(_over_survivors(modules[n], torch.cat(e))) for n, e in lost.items()]


@torch.no_grad()
def set_to_zero(tensor: Tensor, member: Any, entries: Tensor) -> None:
    """Zeros at these entries of a member; those of a grouped convolution count all channels, group by group."""
    if member.groups == 1:
        tensor.data.index_fill_(member.dim, entries, 0)
        return
    size = tensor.shape[member.dim]
    by_group = tensor.data.unflatten(0, (member.groups, -1)).movedim(member.dim + 1, 1)  # a view [groups, size, ...]
    by_group[entries // size, entries % size] = 0


def _over_survivors(norm: nn.Module, lost: Tensor) -> Callable[..., Tensor]:
    """A hook that gives what a norm computes without the channels lost, and zeros for them."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        x = args[0]
        dim = 1 if isinstance(norm, nn.GroupNorm) else x.dim() - 1
        kept = torch.ones(x.shape[dim], dtype=torch.bool)
        kept[lost] = False
        kept = kept.nonzero().flatten()
        weight, bias = (None if t is None else t[kept] for t in (norm.weight, getattr(norm, "bias", None)))
        y = x.index_select(dim, kept)
        if isinstance(norm, nn.GroupNorm):
            groups = len(kept) if norm.num_groups == norm.num_channels else norm.num_groups
            y = nn.functional.group_norm(y, groups, weight, bias, norm.eps)
        elif isinstance(norm, nn.RMSNorm):
            y = nn.functional.rms_norm(y, (len(kept),), weight, norm.eps)
        else:
            y = nn.functional.layer_norm(y, (len(kept),), weight, bias, norm.eps)
        return torch.zeros_like(x).index_copy(dim, kept, y)

    return hook


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def assert_cut_equals_masked(model: nn.Module, coupling: Coupling, inputs: tuple[Any, ...], pruned: Pruned) -> float:
    """Both networks compute the same in evaluation mode, in float64; returns what the neurons were worth."""
    full, expected = outputs(model, inputs), outputs(masked(model, coupling, pruned), inputs)
    found = outputs(cut(model, coupling, pruned), inputs)
    assert len(found) == len(expected) > 0
    worth = 0.0
    for whole, wanted, given in zip(full, expected, found):
        assert given.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max()))
        assert float((given - wanted).abs().max()) < 1e-9 * scale
        worth = max(worth, float((wanted - whole).abs().max()) / scale)
    return worth


def assert_every_group_is_right(model: nn.Module, coupling: Coupling, *inputs: Any, seed: int = 0) -> None:
    """Each group alone, several of its neurons and one; then different numbers of all groups at once."""
    generator = torch.Generator().manual_seed(seed)
    for position, group in enumerate(coupling.groups):
        for share in (0.6, 0.0):
            assert_cut_equals_masked(model, coupling, inputs, {position: some_of(group, share, generator)})
    shares = torch.rand(len(coupling.groups), generator=generator).tolist()
    several = {i: some_of(group, shares[i], generator) for i, group in enumerate(coupling.groups) if shares[i] > 0.2}
    if several:
        assert_cut_equals_masked(model, coupling, inputs, several)


def assert_what_is_left_runs(model: nn.Module, coupling: Coupling, *calls: tuple[Any, ...]) -> None:
    """Each group alone, and all, cut by half: the network runs in both modes and has gradients, for all these calls."""
    generator = torch.Generator().manual_seed(0)
    halves = {position: some_of(group, 0.5, generator) for position, group in enumerate(coupling.groups)}
    for pruned in (*({position: neurons} for position, neurons in halves.items()), halves):
        small = cut(model, coupling, pruned)
        for inputs in calls:
            small.eval()
            shapes = [t.shape for t in outputs(small, inputs)]
            assert shapes == [t.shape for t in outputs(copy.deepcopy(model).eval(), inputs)]
            leaves = [t for t in tree_leaves(small.train()(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            sum(t.sum() for t in leaves).backward()  # type: ignore[union-attr]
