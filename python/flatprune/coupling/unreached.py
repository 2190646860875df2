"""Layers that the example inputs do not reach: experts that no token was routed to, branches that no value chose.

An expert beside one that was reached, of the same class and shapes, is coupled as that one is. Any other layer that is
not reached, in a module whose code looked at values to decide what runs, may read whatever has its width: that stays.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flatprune.coupling.components import Components
from flatprune.coupling.neurons import tensor_name
from flatprune.coupling.values import Axis


def couple_unreached(
    model: nn.Module, components: Components, called: set[str], read_by_host: set[str]
) -> tuple[list[Tensor], dict[int, str]]:
    """What is known of layers that no trace has called.

    Args:
        model: the network.
        components: of its traces.
        called: names of the modules that ran.
        read_by_host: modules in whose own code values decided what runs.

    Returns:
        Pairs of labels that couple twins, and widths that cannot change, with the reason.
    """
    modules = dict(model.named_modules())
    pairs: list[Tensor] = []
    unsafe: dict[int, str] = {}
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if not name or name in called or (parent in modules and parent not in _alive(modules, called) and parent):
            continue  # its parent is not reached either, and is dealt with
        if _holds_called(name, called) or not any(p.dim() > 1 for p in module.parameters()):
            continue
        if not _decides(modules, name, called, read_by_host):
            continue
        twin = _twin(modules, name, called)
        if twin is not None:
            pairs += _as_twin(components, module, twin)
            continue
        for key, parameter in module.named_parameters():
            for size in parameter.shape:
                reason = f"{tensor_name(name, key)!r} is not reached by the example inputs and may depend on it"
                unsafe.setdefault(size, f"{reason}: give inputs that reach it")
    return pairs, unsafe


def _alive(modules: dict[str, nn.Module], called: set[str]) -> set[str]:
    """Modules that ran, and containers (`ModuleList`) of such."""
    found = set(called)
    for name in called:
        while name:
            name = name.rpartition(".")[0]
            found.add(name)
    return found


def _holds_called(name: str, called: Iterable[str]) -> bool:
    return any(other.startswith(name + ".") for other in called)


def _decides(modules: dict[str, nn.Module], name: str, called: set[str], read_by_host: set[str]) -> bool:
    """Whether it stands beside others that ran in a container, or the module around it looked at values itself."""
    parent = name.rpartition(".")[0]
    if isinstance(modules.get(parent), (nn.ModuleList, nn.ModuleDict)) and _holds_called(parent, called):
        return True  # one of several was chosen
    while name:
        name = name.rpartition(".")[0]
        if name in called or not name:
            return name in read_by_host
    return False


def _twin(modules: dict[str, nn.Module], name: str, called: set[str]) -> nn.Module | None:
    """A sibling that ran, of the same class and shapes."""
    parent = name.rpartition(".")[0]
    module = modules[name]
    shapes = {key: p.shape for key, p in module.named_parameters()}
    for other, candidate in modules.items():
        if other.rpartition(".")[0] != parent or other == name or type(candidate) is not type(module):
            continue
        reached = other in called or _holds_called(other, called)
        if reached and {key: p.shape for key, p in candidate.named_parameters()} == shapes:
            return candidate
    return None


def _as_twin(components: Components, module: nn.Module, twin: nn.Module) -> list[Tensor]:
    """The module's axes, coupled as the twin's: to the same things outside it, to each other inside."""
    table, component = components.table, components.component
    own = {id(t) for t in (*twin.parameters(), *twin.buffers())}
    inside = _components_inside(components, own)
    first: dict[int, int] = {}  # component inside the twin -> label of the module that stands for it
    pairs = []
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for key, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        for axis in table.existing(id(tensor)):
            new = table.axis(id(named[key]), axis.dim, axis.size, axis.groups)
            new.roles |= axis.roles
            for i in range(axis.size):
                c, mine = int(component[axis.start + i]), new.start + i
                if c not in inside:
                    pairs.append((mine, axis.start + i))
                elif first.setdefault(c, mine) != mine:
                    pairs.append((first[c], mine))
    return [torch.tensor(pairs)] if pairs else []


def _components_inside(components: Components, tensors: set[int]) -> set[int]:
    """Components all of whose axes belong to these tensors."""
    own: list[Axis] = [axis for key in tensors for axis in components.table.existing(key)]
    names = {axis.start for axis in own}
    found = {int(c) for axis in own for c in components.component[axis.start : axis.start + axis.size]}
    for axis in components.table.axes:
        if axis.start not in names:
            found -= set(components.component[axis.start : axis.start + axis.size].tolist())
    return found
