"""Which tensors are coupled: the groups of neurons of a network, from torch-pruning's dependency graph.

Removing one output channel of a layer takes other entries along: its batch norm, a depthwise convolution behind it,
every layer whose output is added to it, and the input columns of all layers that read it. All of that together is one
*neuron* here; the neurons of a layer (or of a residual stream) form a `NeuronGroup`. The graph is traced once (see
`flatprune.cutting.dependencies`); afterwards the groups keep their own indices and are renumbered by
`flatprune.cutting.surgery` at every removal.

What the dependency graph gets wrong, or what cannot be cut without changing the function of the other neurons, is
found by a dry run at the start (`flatprune.cutting.trial`), and the group is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatprune.cutting.dependencies import DependencyGraph
from flatprune.cutting.neurons import (
    CHANNELWISE,
    CONSUMER,
    PRODUCER,
    Coupling,
    Member,
    NeuronGroup,
    Refused,
    channels,
    groups_of,
    is_attention,
    is_depthwise,
)
from flatprune.cutting.trial import Trial
from kfac_ext.curvature.modes import module_modes

_LOOKED_UP = "an embedding is left alone: its rows are looked up, so there are no factors to judge them by"
_RECURRENT = "a recurrent layer is left alone: its units feed themselves through stacked gates"
_NEVER = {
    nn.Embedding: _LOOKED_UP,
    nn.EmbeddingBag: _LOOKED_UP,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.MultiheadAttention: "nn.MultiheadAttention cannot lose heads, its embed_dim is num_heads times head_dim and the "
    "width of its inputs at once",
}


def neuron_groups(model: nn.Module, example_inputs: Any, exclude: Sequence[str | type] = ()) -> Coupling:
    """The groups of neurons of `model`, traced with `example_inputs` in evaluation mode.

    Args:
        model: its modes, tensors, gradients and buffers are left as they are.
        example_inputs: what the model is called with: a tensor or a tuple of tensors.
        exclude: layers whose outputs stay: qualified names (of a layer, or of a module that holds it) or types.

    Returns:
        The prunable groups in forward order, and the reason for every other Linear and convolution of the graph, and
        for embeddings, recurrent layers and `nn.MultiheadAttention`.

    Raises:
        KeyError: `exclude` names a module that the model does not have.
    """
    names = {module: name for name, module in model.named_modules()}
    _check_exclude(model, exclude)
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    coupling = Coupling()
    with module_modes(dict.fromkeys(model.modules(), False)):
        graph, trial = DependencyGraph(model, inputs, names), Trial(model, inputs)
        for module in graph.roots():
            affected = [names[module]]
            try:
                for group in graph.groups_of(module):
                    affected = [member.name for member in group.of_role(PRODUCER)]
                    _check_group(model, group, exclude)
                    trial.check(group)
                    coupling.groups.append(group)
            except Refused as refusal:
                coupling.refuse(affected, refusal)
    for module, name in names.items():
        for kind, reason in _NEVER.items():
            if isinstance(module, kind):
                coupling.refuse([name], Refused(reason))
    return coupling


def _check_exclude(model: nn.Module, exclude: Sequence[str | type]) -> None:
    known = dict(model.named_modules())
    for item in exclude:
        if isinstance(item, str) and item not in known:
            raise KeyError(f"exclude: the model has no module named {item!r}; it has {', '.join(filter(None, known))}")


def _is_excluded(member: Member, exclude: Sequence[str | type]) -> bool:
    return any(
        isinstance(member.module, item)
        if isinstance(item, type)
        else member.name == item or item == "" or member.name.startswith(item + ".")
        for item in exclude
    )


def _check_group(model: nn.Module, group: NeuronGroup, exclude: Sequence[str | type]) -> None:
    """Raise Refused for a group whose outputs must stay or whose tensors cannot be replaced; find its slices."""
    if not group.of_role(CONSUMER):
        raise Refused("it is an output of the model", expected=True)
    if any(_is_excluded(member, exclude) for member in group.members if member.role != CONSUMER):
        raise Refused("it is excluded", expected=True)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for member in group.members:
        plain = member.role == CHANNELWISE or isinstance(member.module._parameters.get("weight"), nn.Parameter)
        if hasattr(member.module, "parametrizations") or not plain:
            raise Refused(f"the weight of {member.name!r} is parametrized")
        for parameter in member.module.parameters(recurse=False):
            if len(owners[id(parameter)]) > 1:
                raise Refused(f"{' and '.join(owners[id(parameter)])} share one parameter")
        _check_kind(member)
    _set_groups(group)


def _check_kind(member: Member) -> None:
    """Refuse layers of a known kind whose tensors are laid out otherwise."""
    module = member.module
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        raise Refused(f"LayerNorm {member.name!r} over {tuple(module.normalized_shape)} is not over channels alone")
    if is_attention(module) and [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        raise Refused(f"attention {member.name!r} has parameters or buffers of its own, which may belong to its heads")


def _set_groups(group: NeuronGroup) -> None:
    """Find the slices that grouped convolutions and group norms cut the neurons into, the finest if they are nested."""
    group.groups, group.group_of = 1, torch.zeros(group.width, dtype=torch.int64)
    for member in group.members:
        groups, kind = _slices(member.module)
        if groups == 1:
            continue
        size = channels(member.module, member.role)
        if member.index.shape[1] != 1 or size // groups == 1:
            raise Refused(f"{kind} {member.name!r} with {size // groups} channels a group cannot be cut")
        label = member.index[:, 0] // (size // groups)
        if not torch.equal(label.bincount(minlength=groups), torch.full((groups,), len(label) // groups)):
            raise Refused(f"{kind} {member.name!r}: the neurons are not spread evenly over its groups")
        if _refines(label, group.group_of):
            group.groups, group.group_of = groups, label
        elif not _refines(group.group_of, label):
            raise Refused(f"{kind} {member.name!r} cuts the neurons into other slices than another one")


def _slices(module: nn.Module) -> tuple[int, str]:
    """How many slices a layer cuts its channels into, of which the same number must go; what kind of layer it is."""
    if isinstance(module, nn.GroupNorm):
        whole = module.num_groups == channels(module, CHANNELWISE)  # then each group is one channel, which can go
        return (1 if whole else module.num_groups), "group norm"
    return (1 if is_depthwise(module) else groups_of(module)), "grouped convolution"


def _refines(fine: Tensor, coarse: Tensor) -> bool:
    """Whether each slice of `fine` lies within one slice of `coarse`."""
    return torch.stack([fine, coarse]).unique(dim=1).shape[1] == len(fine.unique())
