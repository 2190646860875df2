"""Taking neurons out of a network, all or nothing: tensors, gradients, optimizer state, averaged copies and factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from flatprune.coupling import Coupling, Cut, Member, NeuronGroup, cut_tensor, tensor_cuts
from flatprune.coupling.attributes import followed, known_attributes, own_shapes
from flatprune.coupling.cuts import renumbered
from flatprune.cutting.ema_models import check_ema_model, named_tensors, unwrapped
from flatprune.cutting.optimizers import as_optimizers
from flatprune.cutting.rehearsal import Seen
from flatprune.cutting.states import check_states, cut_states, rehearsed
from flatprune.moved import refuse_moved
from kfac_ext.curvature import Curvature
from kfac_ext.layers import Layer

Cuts = Mapping[str, Sequence[Cut]]


@dataclass
class Plan:
    """New values for everything that a removal changes; see `plan`.

    Attributes:
        parameters: (parameter, its new data, its new gradient or None).
        buffers: (buffer, its new data).
        states: (holder, key, new value) of what optimizers keep, see `flatprune.cutting.states`.
        attributes: (module, attribute, new value).
        computed: (hook, module) of weights that are computed of others, anew after these were cut.
        members: (group, its new members); `slices`: (group, new slice of each neuron).
        curvature: whose factors are cut, or None; `keep` and `blocks` are the arguments of its `narrow`.
    """

    parameters: list[tuple[nn.Parameter, Tensor, Tensor | None]] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[Any, Any, Any]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    computed: list[tuple[Any, nn.Module]] = field(default_factory=list)
    members: list[tuple[NeuronGroup, list[Member]]] = field(default_factory=list)
    slices: list[tuple[NeuronGroup, Tensor]] = field(default_factory=list)
    curvature: Curvature | None = None
    keep: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def commit(self) -> None:
        """Put every planned value in place; after the factors, which change as a whole or not at all, only assignments.

        Raises:
            RuntimeError: the factors could not be cut (out of memory, say); nothing is changed then.
        """
        if self.curvature is not None:
            self.curvature.narrow(self.keep, self.blocks)
        for parameter, data, grad in self.parameters:
            _replace(parameter, data, grad)
        for buffer, data in self.buffers:
            buffer.data = data
        for holder, key, value in self.states:
            holder[key] = value
        for module, attribute, value in self.attributes:
            setattr(module, attribute, value)
        for hook, module in self.computed:
            hook(module, ())
        for group, members in self.members:
            group.members = members
        for group, group_of in self.slices:
            group.group_of = group_of


def _replace(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    """Give a parameter new data of another shape.

    The loss or the outputs of the last step may still be alive and hold the parameter's gradient accumulator, which
    remembers the old shape and would reject the next gradient. PyTorch drops it only if the dtype (or device)
    changes, so the data passes through an empty tensor of another dtype.
    """
    parameter.grad = None
    other = torch.float32 if data.dtype == torch.float16 else torch.float16
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    parameter.grad = grad


@torch.no_grad()
def plan(
    model: nn.Module,
    coupling: Coupling,
    pruned: Mapping[int, Tensor],
    *,
    optimizer: Any = None,
    curvature: Curvature | None = None,
    replacements: Mapping[str, Tensor] | None = None,
    ema_models: Sequence[nn.Module] = (),
    seen: Seen | None = None,
) -> Plan:
    """Compute everything that a removal of neurons changes; nothing is changed.

    Args:
        model: the network.
        coupling: its neuron groups and the integers that follow them.
        pruned: position of a group -> int64 [m] neurons that go.
        optimizer: one or several, see `flatprune.cutting.optimizers.as_optimizers`; what they keep of a parameter is
            cut along with it.
        curvature: its factors are cut.
        replacements: qualified name of a parameter or buffer -> values of its old shape that it takes before the cut
            (compensated survivors).
        ema_models: copies of the model that are cut alike, see `flatprune.cutting.ema_models`.
        seen: how states lie along parameters, see `flatprune.cutting.states.rehearsed`; None: found out now.

    Returns:
        The plan; call `commit()`.

    Raises:
        ValueError: naming the group, parameter, optimizer state or copy that stands in the way.
        RuntimeError: SAM has moved the parameters.
    """
    refuse_moved(model, "Pruner")
    result, groups = Plan(), coupling.groups
    firsts = _first_names(model)
    replacements = {firsts[name]: value for name, value in (replacements or {}).items()}
    _check_pruned(groups, pruned)
    optimizers = as_optimizers(optimizer)
    seen = rehearsed(model, groups, optimizers) if seen is None else seen
    check_states(model, groups, optimizers, seen)
    for number, ema_model in enumerate(ema_models):
        check_ema_model(model, ema_model, f"ema_models[{number}]")
    cuts = tensor_cuts(groups, pruned)
    removed = {groups[position].name: len(neurons) for position, neurons in pruned.items()}
    own = named_tensors(model)
    for name in {**cuts, **replacements}:
        value = replacements.get(name, own[name])
        _plan_tensor(result, own[name], _checked(name, own[name], value), cuts.get(name, ()))
    result.states = cut_states(own, cuts, optimizers, seen)
    _plan_attributes(result, model, cuts, coupling, removed)
    result.computed = _computed(model)
    for copy in (unwrapped(model, ema_model) for ema_model in ema_models):
        _plan_copy(result, own, copy, cuts, replacements)
        _plan_attributes(result, copy, cuts, coupling, removed)
        result.computed += _computed(copy)
    _plan_groups(result, groups, pruned, cuts)
    if curvature is not None:
        result.curvature = curvature
        for layer in curvature.layers.values():
            _plan_factors(result, curvature, layer, cuts.get(_stored_name(firsts, layer.weight_name) or "", ()))
    return result


def _stored_name(firsts: Mapping[str, str], weight: str) -> str | None:
    """The first name of the tensor behind a weight: itself, or what it is computed of, parametrized or by a hook."""
    module, _, key = weight.rpartition(".")
    parametrized = f"parametrizations.{key}.original"
    originals = (f"{module}.{own}".lstrip(".") for own in (f"{parametrized}1", parametrized, f"{key}_v", f"{key}_orig"))
    return next((firsts[name] for name in (weight, *originals) if name in firsts), None)


def _computed(model: nn.Module) -> list[tuple[Any, nn.Module]]:
    """(hook, module) of weights that torch computes before a forward, by `weight_norm` or `torch.nn.utils.prune`."""
    kinds = (WeightNorm, BasePruningMethod)
    return [
        (h, module) for module in model.modules() for h in module._forward_pre_hooks.values() if isinstance(h, kinds)
    ]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first."""
    firsts = {id(tensor): name for name, tensor in named_tensors(model).items()}
    both = (model.named_parameters, model.named_buffers)
    return {name: firsts[id(t)] for named in both for name, t in named(remove_duplicate=False)}


def _check_pruned(groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor]) -> None:
    for position, neurons in pruned.items():
        group = groups[position]
        unique = neurons.unique()
        if len(unique) != len(neurons) or not bool(((unique >= 0) & (unique < group.width)).all()):
            raise ValueError(f"{group.name!r}: neurons to remove must be distinct and in [0, {group.width})")
        if len(neurons) >= group.width:
            raise ValueError(f"{group.name!r}: {len(neurons)} of {group.width} neurons cannot go, one must stay")
        counts = group.group_of[neurons].bincount(minlength=group.groups)
        if int(counts.min()) != int(counts.max()):
            raise ValueError(
                f"{group.name!r}: {counts.tolist()} neurons would go from its {group.groups} slices, expected equally "
                "many from each"
            )


def _checked(name: str, tensor: Tensor, value: Tensor) -> Tensor:
    if value is tensor:
        return tensor
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise ValueError(
            f"{name}: replacement is {tuple(value.shape)} {value.dtype}, expected {tuple(tensor.shape)} {tensor.dtype}"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: its compensated values are not finite")
    return value


def _plan_tensor(result: Plan, tensor: Tensor, value: Tensor, cuts: Sequence[Cut]) -> None:
    if value is not tensor:  # laid out alike, as fused optimizers want parameter, gradient and states
        value = torch.empty_like(tensor).copy_(value)
    data = cut_tensor(value.detach(), cuts)
    if isinstance(tensor, nn.Parameter):
        result.parameters.append((tensor, data, None if tensor.grad is None else cut_tensor(tensor.grad, cuts)))
    else:
        result.buffers.append((tensor, data))


def _plan_copy(
    result: Plan, source: Mapping[str, Tensor], ema_model: nn.Module, cuts: Cuts, replacements: Mapping[str, Tensor]
) -> None:
    """Cut a copy's tensors as the model's, after moving them by as much as compensation moves the model's."""
    copy = named_tensors(ema_model)
    for name in {**cuts, **replacements}:
        value = copy[name].detach()
        if name in replacements:
            value = value + (replacements[name] - source[name]).to(value)
        _plan_tensor(result, copy[name], _checked(name, copy[name], value), cuts.get(name, ()))


def _plan_attributes(
    result: Plan, model: nn.Module, cuts: Cuts, coupling: Coupling, removed: Mapping[str, int]
) -> None:
    """Sizes that layers state, and integers that were found to follow a width."""
    modules = dict(model.named_modules())
    cut_ids = {id(tensor): name for name, tensor in named_tensors(model).items() if name in cuts}
    for module in modules.values():
        own = {**module._parameters, **module._buffers}
        names = {
            key: cut_ids[id(tensor)] for key, tensor in own.items() if tensor is not None and id(tensor) in cut_ids
        }
        if names:
            shapes = {**own_shapes(module), **{key: _shape_after(own[key], cuts[name]) for key, name in names.items()}}
            result.attributes += [(module, *item) for item in known_attributes(module, shapes).items()]
    for name, values in followed(modules, coupling.attributes, removed).items():
        result.attributes += [(modules[name], key, value) for key, value in values.items()]


def _shape_after(tensor: Tensor | None, cuts: Sequence[Cut]) -> tuple[int, ...]:
    assert tensor is not None
    shape = list(tensor.shape)
    for cut in cuts:
        shape[cut.dim] = len(cut.kept) // cut.groups
    return tuple(shape)


def _plan_groups(result: Plan, groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor], cuts: Cuts) -> None:
    for position, group in enumerate(groups):
        stay = torch.ones(group.width, dtype=torch.bool)
        if position in pruned:
            stay[pruned[position]] = False
        neurons = stay.nonzero().flatten()
        if position in pruned:
            result.slices.append((group, group.group_of[neurons]))
        found = []
        for member in group.members:
            own = [c for c in cuts.get(member.name, ()) if (c.dim, c.groups) == (member.dim, member.groups)]
            found.append(renumbered(member, neurons, own[0] if own else None))
        result.members.append((group, found))


def _plan_factors(result: Plan, curvature: Curvature, layer: Layer, cuts: Sequence[Cut]) -> None:
    """Rows and columns of A and G that stay."""
    factors = curvature.factors
    if not cuts or f"{layer.name}.A" not in factors:
        return
    device = factors.buffer.device
    columns, rows = factors[f"{layer.name}.A"].shape[-1], factors[f"{layer.name}.G"].shape[-1]
    if columns - layer.patch_size not in (0, 1) or rows * layer.groups != layer.outputs:
        raise ValueError(f"{layer.name}: its factors are for {columns} inputs and {rows} outputs, not for this layer")
    inputs = next((cut for cut in cuts if cut.dim == layer.input_dim), None)
    outputs = next((cut for cut in cuts if cut.dim == layer.output_dim), None)
    if layer.groups > 1 and layer.inputs == layer.groups:  # one input a group: whole groups go
        (cut,) = cuts
        per = cut.size // layer.groups
        result.blocks[f"{layer.name}.A"] = result.blocks[f"{layer.name}.G"] = cut.kept[::per].to(device) // per
        return
    if inputs is not None:
        if layer.groups > 1 and inputs.size < layer.inputs:  # of a computed weight: the same of each group
            kept = inputs.kept.expand(layer.groups, -1)
        else:
            kept = inputs.kept if layer.groups == 1 else _within(inputs, layer.groups)
        result.keep[f"{layer.name}.A"] = _patch_entries(layer, kept, columns).to(device)
    if outputs is not None:
        kept = outputs.kept if layer.groups == 1 else _within(outputs, layer.groups)
        result.keep[f"{layer.name}.G"] = kept.to(device)


def _within(cut: Cut, groups: int) -> Tensor:
    """Kept channels [groups, m / groups] as each group of a convolution counts them."""
    return (cut.kept % (cut.size // groups)).view(groups, -1)


def _patch_entries(layer: Layer, kept: Tensor, size: int) -> Tensor:
    """Rows of A that stay: the patch entries of the kept input channels, then the constant if A has one.

    [m], or [groups, m] for a grouped convolution.
    """
    columns = (kept[..., None] * layer.area + torch.arange(layer.area)).flatten(-2)
    constant = torch.arange(layer.patch_size, size).expand(*columns.shape[:-1], -1)
    return torch.cat([columns, constant], dim=-1)


def sync_attributes(model: nn.Module) -> None:
    """Set in_features, out_channels, num_features, normalized_shape, ... of every layer from the shapes of its tensors.

    For a freshly built network whose tensors were replaced by those of a pruned one. A convolution that was depthwise
    stays so; other grouped convolutions and group norms keep their number of groups, attentions their head_dim.

    Args:
        model: changed in place: attributes of layers whose kind `flatprune.coupling.attributes` knows.
    """
    for module in model.modules():
        shapes = own_shapes(module)
        if shapes:
            for key, value in known_attributes(module, shapes).items():
                setattr(module, key, value)
