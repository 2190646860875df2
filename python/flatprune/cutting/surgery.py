"""Removing neurons from everything at once: first every new tensor is computed and checked, then all are put in place.

A removal touches weights, biases, norms and their running statistics, gradients, the optimizer's state, the Kronecker
factors with their eigenvectors, attributes such as `in_features`, and the indices of the neuron groups. `plan` computes
all of it and changes nothing; `Plan.commit` only assigns. So an error leaves model, optimizer and factors as they were.
Parameters stay the same objects (their `.data` is replaced), so the optimizer's param_groups stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flatprune.cutting.cuts import Cut, LayerCut, layer_cuts, patch_size, renumbered, weight_columns
from flatprune.cutting.ema_models import check_ema_model, named_tensors, unwrapped
from flatprune.cutting.neurons import (
    CONSUMER,
    MATRICES,
    NORMS,
    PRODUCER,
    Member,
    NeuronGroup,
    channels,
    groups_of,
    is_attention,
    is_depthwise,
)
from flatprune.moved import refuse_moved

if TYPE_CHECKING:
    from kfac_ext.curvature import Curvature


@dataclass
class Plan:
    """New values for everything that a removal changes; see `plan`.

    Attributes:
        parameters: (parameter, its new data, its new gradient or None).
        buffers: (buffer, its new data).
        states: (an optimizer state, key, new tensor).
        modules: layers whose attributes follow from the new shapes.
        indices: (member of a group, new index); `group_of`: (group, its new `group_of`).
        curvature: whose factors are cut, or None; `keep` and `blocks` are the arguments of its `narrow`.
    """

    parameters: list[tuple[nn.Parameter, Tensor, Tensor | None]] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    states: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    modules: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    indices: list[tuple[Member, Tensor]] = field(default_factory=list)
    group_of: list[tuple[NeuronGroup, Tensor]] = field(default_factory=list)
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
        for state, key, tensor in self.states:
            state[key] = tensor
        for module, attributes in self.modules:
            for attribute, value in attributes.items():
                setattr(module, attribute, value)
        for member, index in self.indices:
            member.index = index
        for group, group_of in self.group_of:
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
    groups: Sequence[NeuronGroup],
    pruned: Mapping[int, Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    curvature: Curvature | None = None,
    replacements: Mapping[str, Tensor] | None = None,
    ema_models: Sequence[nn.Module] = (),
) -> Plan:
    """Compute everything that a removal of neurons changes; nothing is changed.

    Args:
        model: the network.
        groups: all its neuron groups.
        pruned: position in `groups` -> int64 [m] neurons that go.
        optimizer: its state tensors of a parameter's shape are cut like the parameter.
        curvature: its factors are cut.
        replacements: qualified name of a parameter or buffer -> values of its old shape that it takes before the cut
            (compensated survivors).
        ema_models: copies of the model that are cut alike, see `flatprune.cutting.ema_models`.

    Returns:
        The plan; call `commit()`.

    Raises:
        ValueError: naming the group, parameter, optimizer state or averaged copy that stands in the way.
        RuntimeError: SAM has moved the parameters.
    """
    refuse_moved(model, "Pruner")
    result = Plan()
    _check_pruned(groups, pruned)
    check_states(model, optimizer)
    for number, ema_model in enumerate(ema_models):
        check_ema_model(model, ema_model, f"ema_models[{number}]")
    cuts = layer_cuts(groups, pruned)
    done = set()
    for layer in cuts.values():
        for name, tensor, cut in layer.tensors():
            done.add(name)
            value = tensor if replacements is None else replacements.get(name, tensor)
            _plan_tensor(result, name, tensor, _checked(name, tensor, value), cut, optimizer)
        result.modules.append((layer.module, layer.attributes()))
    own = named_tensors(model)
    for name, value in (replacements or {}).items():
        if name not in done:  # a bias or running mean that keeps its shape
            _plan_tensor(result, name, own[name], _checked(name, own[name], value), Cut(), optimizer)
    for ema_model in ema_models:
        _plan_ema_model(result, model, ema_model, cuts, replacements or {})
    _plan_indices(result, groups, pruned, cuts)
    if curvature is not None:
        result.curvature = curvature
        _plan_factors(result, curvature, cuts)
    return result


def check_states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse an optimizer whose state cannot be cut: tensors of another shape than their parameter's, or lists.

    Raises:
        ValueError: naming the parameter, the state and its shape.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in ({} if optimizer is None else optimizer.state).items():
        for key, entry in state.items():
            is_tensor = isinstance(entry, Tensor)
            if is_tensor and (entry.shape == parameter.shape or entry.numel() == 1):
                continue
            if is_tensor or (isinstance(entry, (list, tuple, dict)) and len(entry) > 0):
                found = f"shape {tuple(entry.shape)}" if is_tensor else f"type {type(entry).__name__}"
                raise ValueError(
                    f"{names.get(parameter, 'a parameter')}: state {key!r} of {type(optimizer).__name__} has {found}, "
                    f"expected shape {tuple(parameter.shape)}; only states of the parameter's shape can be cut"
                )


def _plan_ema_model(
    result: Plan,
    model: nn.Module,
    ema_model: nn.Module,
    cuts: Mapping[str, LayerCut],
    replacements: Mapping[str, Tensor],
) -> None:
    """Cut a copy's tensors as the model's, after moving them by as much as compensation moves the model's."""
    source, copy = named_tensors(model), named_tensors(unwrapped(ema_model))
    planned: dict[str, Cut] = {name: Cut() for name in replacements}
    for layer in cuts.values():
        own = layer._replace(module=unwrapped(ema_model).get_submodule(layer.name))
        planned.update({name: cut for name, _, cut in own.tensors()})
        result.modules.append((own.module, own.attributes()))
    for name, cut in planned.items():
        value = copy[name].detach()
        if name in replacements:
            value = value + (replacements[name] - source[name]).to(value)
        _plan_tensor(result, name, copy[name], _checked(name, copy[name], value), cut, None)


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
                f"{group.name!r}: {counts.tolist()} neurons would go from the {group.groups} slices of a grouped "
                "convolution, expected equally many from each"
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


def _plan_tensor(
    result: Plan, name: str, tensor: Tensor, value: Tensor, cut: Cut, optimizer: torch.optim.Optimizer | None
) -> None:
    if value is not tensor:  # laid out alike, as fused optimizers want parameter, gradient and states
        value = torch.empty_like(tensor).copy_(value)
    data = cut.apply(value.detach())
    if not isinstance(tensor, nn.Parameter):
        result.buffers.append((tensor, data))
        return
    result.parameters.append((tensor, data, None if tensor.grad is None else cut.apply(tensor.grad)))
    if data.shape == tensor.shape or optimizer is None or tensor not in optimizer.state:
        return
    state = optimizer.state[tensor]
    for key, entry in state.items():
        if isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape == tensor.shape:
            result.states.append((state, key, cut.apply(entry)))


def _plan_indices(
    result: Plan, groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor], cuts: Mapping[str, LayerCut]
) -> None:
    for position, group in enumerate(groups):
        stay = torch.ones(group.width, dtype=torch.bool)
        if position in pruned:
            stay[pruned[position]] = False
        neurons = stay.nonzero().flatten()
        if position in pruned:
            result.group_of.append((group, group.group_of[neurons]))
        for member in group.members:
            if member.name in cuts:
                result.indices.append((member, renumbered(member, neurons, cuts[member.name])))


def _plan_factors(result: Plan, curvature: Curvature, cuts: Mapping[str, LayerCut]) -> None:
    factors = curvature.factors
    device = factors.buffer.device
    for name, cut in cuts.items():
        if f"{name}.A" not in factors:
            continue
        groups = groups_of(cut.module)
        columns, rows = factors[f"{name}.A"].shape[-1], factors[f"{name}.G"].shape[-1]
        if columns - patch_size(cut.module) not in (0, 1) or rows * groups != channels(cut.module, PRODUCER):
            raise ValueError(f"{name}: its factors are for {columns} inputs and {rows} outputs, not for this layer")
        if is_depthwise(cut.module):
            assert cut.outputs is not None
            result.blocks[f"{name}.A"] = result.blocks[f"{name}.G"] = cut.outputs.to(device)
            continue
        if cut.inputs is not None:
            result.keep[f"{name}.A"] = _factor_columns(cut, columns).to(device)
        if cut.outputs is not None:
            kept = cut.outputs if groups == 1 else (cut.outputs % rows).view(groups, -1)
            result.keep[f"{name}.G"] = kept.to(device)


def _factor_columns(cut: LayerCut, size: int) -> Tensor:
    """Rows of A that stay: the patch entries of the kept input channels, then the constant if A has one.

    [m], or [groups, m] for a grouped convolution.
    """
    assert cut.inputs is not None
    groups = groups_of(cut.module)
    columns = weight_columns(cut.module, cut.inputs if groups == 1 else cut.inputs.view(groups, -1))
    constant = torch.arange(patch_size(cut.module), size).expand(*columns.shape[:-1], -1)
    return torch.cat([columns, constant], dim=-1)


def sync_attributes(model: nn.Module) -> None:
    """Set in_features, out_channels, num_features, num_heads, ... of every layer from the shapes of its tensors.

    For a freshly built network whose tensors were replaced by those of a pruned one. A convolution that was depthwise
    stays so; other grouped convolutions and group norms keep their number of groups, attentions their head_dim.

    Args:
        model: changed in place: attributes of Linear, convolutions, norms, PReLU and attentions (see
            `flatprune.cutting.neurons.is_attention`).
    """
    attentions = [module for module in model.modules() if is_attention(module)]
    for module in model.modules():
        tensors = (getattr(module, name, None) for name in ("weight", "running_mean"))
        if any(isinstance(tensor, Tensor) for tensor in tensors):
            _sync_layer(module)
    for attention in attentions:
        attention.num_heads = attention.proj.in_features // attention.head_dim  # type: ignore[union-attr,operator,assignment]


def _sync_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = channels(module, PRODUCER), channels(module, CONSUMER)
    elif isinstance(module, MATRICES) and is_depthwise(module):
        module.out_channels = module.in_channels = module.groups = len(module.weight)
    elif isinstance(module, MATRICES):
        module.out_channels, module.in_channels = channels(module, PRODUCER), channels(module, CONSUMER)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        module.normalized_shape = (len(module.weight),)
    elif isinstance(module, nn.GroupNorm):
        size = len(module.weight)
        whole = module.num_groups == module.num_channels or size < module.num_groups  # one channel a group
        module.num_groups, module.num_channels = size if whole else module.num_groups, size
    elif isinstance(module, NORMS):
        module.num_features = channels(module, "")
