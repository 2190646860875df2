"""Which tensors are coupled: the groups of neurons of a network, from torch-pruning's dependency graph.

Removing one output channel of a layer takes other entries along: its batch norm, a depthwise convolution behind it,
every layer whose output is added to it, and the input columns of all layers that read it. All of that together is one
*neuron* here; the neurons of a layer (or of a residual stream) form a `NeuronGroup`. The graph itself is traced by
`torch_pruning.DependencyGraph` (Fang et al. 2023, arXiv 2301.12900) once; afterwards the groups keep their own
indices and are renumbered by `flatprune.surgery` at every removal.

What the dependency graph gets wrong, or what cannot be cut without changing the function of the other neurons, is
found by a dry run at the start, and the group is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops as tp_ops

from flatprune.cuts import dry_run
from flatprune.neurons import (
    CONSUMER,
    FOLLOWER,
    NORMS,
    PRODUCER,
    Coupling,
    Member,
    NeuronGroup,
    Refused,
    channels,
    is_depthwise,
    shares_of,
)


def neuron_groups(model: nn.Module, example_inputs: Any, exclude: Sequence[str | type] = ()) -> Coupling:
    """The groups of neurons of `model`, traced with `example_inputs` in evaluation mode.

    Args:
        model: its modes, tensors, gradients and buffers are left as they are.
        example_inputs: what the model is called with: a tensor or a tuple of tensors.
        exclude: layers whose outputs stay: qualified names (of a layer, or of a module that holds it) or types.

    Returns:
        The prunable groups in forward order, and the reason for every other Linear and Conv2d of the graph.

    Raises:
        KeyError: `exclude` names a module that the model does not have.
    """
    names = {module: name for name, module in model.named_modules()}
    _check_exclude(model, exclude)
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    coupling = Coupling()
    with _evaluation_mode(model):
        graph = _Graph(model, inputs, names)
        for module in graph.roots():
            affected = [names[module]]
            try:
                for group in graph.groups_of(module):
                    affected = [member.name for member in group.of_role(PRODUCER)]
                    _check_group(model, group, exclude)
                    dry_run(model, group, inputs)
                    coupling.groups.append(group)
            except Refused as refusal:
                coupling.refuse(affected, refusal)
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
    """Raise Refused for a group whose outputs must stay or whose tensors cannot be replaced; find its partition."""
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
        plain = member.role == FOLLOWER or isinstance(member.module._parameters.get("weight"), nn.Parameter)
        if hasattr(member.module, "parametrizations") or not plain:
            raise Refused(f"the weight of {member.name!r} is parametrized")
        for parameter in member.module.parameters(recurse=False):
            if len(owners[id(parameter)]) > 1:
                raise Refused(f"{' and '.join(owners[id(parameter)])} share one parameter")
    _set_partition(group)


def _set_partition(group: NeuronGroup) -> None:
    """Find the shares that grouped convolutions cut the neurons into."""
    for member in group.members:
        groups = shares_of(member.module)
        if groups == 1 or is_depthwise(member.module):
            continue
        size = channels(member.module, member.role)
        if member.index.shape[1] != 1 or size // groups == 1:
            raise Refused(f"grouped convolution {member.name!r} with {size // groups} channels a group cannot be cut")
        label = member.index[:, 0] // (size // groups)
        if group.partitions != 1 and not torch.equal(label, group.partition):
            raise Refused(f"grouped convolution {member.name!r} cuts the neurons into other shares than another one")
        if not torch.equal(label.bincount(minlength=groups), torch.full((groups,), len(label) // groups)):
            raise Refused(f"grouped convolution {member.name!r}: the neurons are not spread evenly over its groups")
        group.partitions, group.partition = groups, label
    if group.partitions == 1:
        group.partition = torch.zeros(group.width, dtype=torch.int64)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Graph:
    """torch-pruning's dependency graph of a model and the groups read off it."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], names: dict[nn.Module, str]) -> None:
        self.names = names
        self.covered: dict[nn.Module, Tensor] = {}
        # Inputs that require gradients leave a trace in the graph: what is added to one cannot change its width.
        self.inputs = [value.detach().clone().requires_grad_(True) if _is_float(value) else value for value in inputs]
        with torch.enable_grad():
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                model, tuple(self.inputs), forward_fn=lambda net, args: net(*args), verbose=False
            )

    def roots(self) -> list[nn.Module]:
        """Linear and Conv2d layers of the graph that are no depthwise convolution, in forward order.

        Layers that the forward pass never calls are not in the graph; torch-pruning raises for them.
        """
        traced = [m for m in self.graph.module2node if isinstance(m, (nn.Linear, nn.Conv2d)) and m in self.names]
        order = {module: i for i, module in enumerate(self.names)}
        return sorted((m for m in traced if not is_depthwise(m)), key=order.__getitem__)

    def groups_of(self, module: nn.Module) -> Iterator[NeuronGroup]:
        """The group of the rows of `module` that no earlier group holds."""
        count = channels(module, PRODUCER)
        covered = self.covered.setdefault(module, torch.zeros(count, dtype=torch.bool))
        rows = (~covered).nonzero().flatten().tolist()
        if not rows:
            return
        covered[rows] = True
        units = self._units(module, rows)
        members = [
            Member(self.names[layer], layer, role, torch.tensor([unit[layer, role] for unit in units]))
            for layer, role in self._common_keys(units)
        ]
        for member in members:
            if int(member.index.max()) >= channels(member.module, member.role):
                raise Refused(f"torch-pruning finds channels in {member.name!r} that it does not have")
            if member.role == PRODUCER:
                seen = torch.zeros(channels(member.module, PRODUCER), dtype=torch.bool)
                self.covered.setdefault(member.module, seen)[member.index.flatten()] = True
        yield NeuronGroup(self.names[module], members)

    def _units(self, module: nn.Module, rows: list[int]) -> list[dict[tuple[nn.Module, str], list[int]]]:
        """What each neuron owns: (layer, role) -> channels. Rows that are coupled to each other are one neuron."""
        together = self._query(module, rows)
        probes = sorted({rows[0], rows[len(rows) // 2], rows[-1]})
        if all(self._query(module, [row]).get(row) == together.get(row) for row in probes):
            return [together[row] for row in rows]
        units: dict[tuple[int, ...], dict[tuple[nn.Module, str], list[int]]] = {}
        for row in rows:  # one query a row: slow, but needed only where rows depend on each other
            unit = self._query(module, [row])[row]
            units.setdefault(tuple(unit[module, PRODUCER]), unit)
        if sum(map(len, units)) != len(rows):
            raise Refused("its channels depend on each other in a way that cannot be split into neurons")
        return list(units.values())

    def _query(self, module: nn.Module, rows: list[int]) -> dict[int, dict[tuple[nn.Module, str], list[int]]]:
        """Row -> what goes with it, by one query for all rows."""
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        owned: dict[int, dict[tuple[nn.Module, str], set[int]]] = {row: {} for row in rows}
        for item in self.graph.get_pruning_group(module, prune, rows):
            key = self._classify(item.dep)
            if key is None:
                continue
            for index, root in zip(item.idxs, item.root_idxs):
                if root not in owned:
                    raise Refused("torch-pruning lost track of its channels")
                owned[root].setdefault(key, set()).add(index)
        return {row: {key: sorted(found) for key, found in unit.items()} for row, unit in owned.items()}

    def _classify(self, dep: Any) -> tuple[nn.Module, str] | None:
        """(layer, role) of one item of a group, None for operations without tensors; raises Refused."""
        module = dep.target.module
        if isinstance(module, tp_ops._OutputOp):
            raise Refused("it is an output of the model", expected=True)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not is_depthwise(module):
            producer = dep.handler == self.graph.get_pruner_of_module(module).prune_out_channels
            if not producer and self._reads_input(dep.target):
                raise Refused("it is coupled to the input of the model")
            return module, PRODUCER if producer else CONSUMER
        if self._reads_input(dep.target):
            raise Refused("it is coupled to the input of the model")
        if isinstance(module, NORMS) or is_depthwise(module):
            return module, FOLLOWER
        if isinstance(module, nn.PReLU):
            return (module, FOLLOWER) if module.num_parameters > 1 else None
        if module in self.names:
            raise Refused(f"{type(module).__name__} {self.names[module]!r} depends on it, which cannot be cut")
        if isinstance(module, nn.Parameter):
            raise Refused("a bare parameter depends on it, which cannot be cut")
        return None

    def _reads_input(self, node: Any) -> bool:
        leaves = [getattr(edge, "variable", None) for edge, _ in getattr(node.grad_fn, "next_functions", ())]
        return any(leaf is value for leaf in leaves if leaf is not None for value in self.inputs)

    @staticmethod
    def _common_keys(units: list[dict[tuple[nn.Module, str], list[int]]]) -> list[tuple[nn.Module, str]]:
        """The (layer, role) pairs, which every neuron must own equally many channels of."""
        first = units[0]
        shape = {key: len(found) for key, found in first.items()}
        if any({key: len(found) for key, found in unit.items()} != shape for unit in units):
            raise Refused("its neurons do not all feed the same layers")
        return list(first)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
