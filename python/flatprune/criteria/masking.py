"""The network without some neurons, while all tensors keep their shapes: for criteria that try many coalitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from flatprune.coupling import CHANNELWISE, Member, NeuronGroup

_JOINT_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # their statistics run over several channels


def masked_tensors(
    tensors: Mapping[str, Tensor], groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """All parameters that neurons own parts of, with zeros there, by qualified name.

    A model that runs with them (`torch.func.functional_call`), and with `survivors_only`, computes what it does without
    the neurons.

    Args:
        tensors: the network's parameters by name.
        groups: the neuron groups.
        pruned: position in `groups` -> int64 [m] neurons.
    """
    masked: dict[str, Tensor] = {}
    for position, neurons in pruned.items():
        for member in groups[position].members:
            name = next((name for name in member.names if name in tensors), None)
            if name is not None:
                source = masked.get(name)
                source = tensors[name].detach().clone() if source is None else source
                for alias in member.names:
                    masked[alias] = source
                _silence(source, member, member.index[neurons].flatten().to(source.device))
    return masked


def _silence(tensor: Tensor, member: Member, entries: Tensor) -> None:
    """Zeros at entries [m] of a member's dimension."""
    if member.groups == 1:
        tensor.movedim(member.dim, 0)[entries] = 0
        return
    size = member.size // member.groups
    tensor.unflatten(0, (member.groups, -1)).transpose(1, 2)[entries // size, entries % size] = 0


@contextmanager
def survivors_only(model: nn.Module, groups: Sequence[NeuronGroup], pruned: Mapping[int, Tensor]) -> Iterator[None]:
    """Layer, group and RMS norms give zeros for the pruned channels and take statistics over the others."""
    modules = dict(model.named_modules())
    lost: dict[str, Tensor] = {}
    for position, neurons in pruned.items():
        for member in groups[position].of_role(CHANNELWISE):
            if isinstance(modules[member.module], _JOINT_NORMS):
                stays = lost.setdefault(member.module, torch.ones(member.size, dtype=torch.bool))
                stays[member.index[neurons].flatten()] = False
    with ExitStack() as stack:
        for name, stays in lost.items():
            norm = modules[name]
            stack.enter_context(norm.register_forward_hook(_survivor_norm(norm, stays.nonzero().flatten())))
        yield


def _survivor_norm(norm: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm, kept: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, axis = args[0], (1 if isinstance(norm, nn.GroupNorm) else output.dim() - 1)
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        stay = torch.zeros(x.shape[axis], dtype=x.dtype, device=x.device)
        stay = stay.index_fill(0, kept.to(x.device), 1.0).view(shape)
        rows, alive = _statistics_rows(norm, x), _statistics_rows(norm, stay.expand_as(x))
        count = alive.sum(dim=-1, keepdim=True).clamp_min(1)
        if not isinstance(norm, nn.RMSNorm):
            rows = rows - (alive * rows).sum(dim=-1, keepdim=True) / count
        square = (alive * rows.square()).sum(dim=-1, keepdim=True) / count
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        values = (rows * (square + eps).rsqrt()).view(x.shape)
        own = (module.weight, getattr(module, "bias", None))
        weight, bias = (t if t is None else t.view(shape) for t in own)  # type: ignore[operator]
        values = values if weight is None else values * weight
        return stay * (values if bias is None else values + bias)

    return hook


def _statistics_rows(norm: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    """x [..., entries that share a mean and a variance]."""
    return x.reshape(len(x), norm.num_groups, -1) if isinstance(norm, nn.GroupNorm) else x
