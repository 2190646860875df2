"""What torch-pruning's dependency graph of a model says about its neurons.

The graph is traced by `torch_pruning.DependencyGraph` (Fang et al. 2023, arXiv 2301.12900). It is read channel by
channel; what it cannot follow, or follows to channels that do not exist, is refused. The heads of an attention are no
channels that it could follow through their reshapes: their groups are built here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops as tp_ops
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

from flatprune.cutting.neurons import (
    CHANNELWISE,
    CONSUMER,
    JOINT_NORMS,
    MATRICES,
    NORMS,
    PRODUCER,
    Member,
    NeuronGroup,
    Refused,
    channels,
    is_attention,
    is_depthwise,
)
from flatprune.cutting.trial import is_float


class _Index(NamedTuple):
    """A channel and the row of the layer asked for that it goes with; torch-pruning's mappings use these names."""

    idx: int
    root_idx: int


def _correct_slices(graph: torch_pruning.DependencyGraph) -> None:
    """Slices of sequences along time: torch-pruning takes the last dimension of [N, C, L] for the channels."""
    for node in graph.module2node.values():
        if not isinstance(node.module, tp_ops._SliceOp):
            continue
        shape, dim = getattr(node.grad_fn, "_saved_self_sym_sizes", ()), node.module.dim
        count = infer_out_channels_recursively(graph, node.inputs[0], [0]) if node.inputs else None
        if len(shape) != 3 or count is None or shape[dim % 3] == count:
            continue
        for dep in (*node.dependencies, *(dep for source in node.inputs for dep in source.dependencies)):
            if node in (dep.source, dep.target) and any(end in node.inputs for end in (dep.source, dep.target)):
                dep.index_mapping[0] = None


class DependencyGraph:
    """torch-pruning's dependency graph of a model and the groups read off it.

    Args:
        model: in evaluation mode.
        inputs: its positional arguments.
        names: qualified name of every module.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], names: dict[nn.Module, str]) -> None:
        self.names = names
        self.order = {module: i for i, module in enumerate(names)}
        layers = [module for module in names if isinstance(module, MATRICES)]
        self.most_channels = max((channels(m, role) for m in layers for role in (PRODUCER, CONSUMER)), default=0)
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self.attentions = {module.qkv: module for module in names if is_attention(module)}
        self.covered: dict[nn.Module, Tensor] = {}
        # Inputs that require gradients leave a trace in the graph: what is added to one cannot change its width.
        self.inputs = [value.detach().clone().requires_grad_(True) if is_float(value) else value for value in inputs]
        with torch.enable_grad():
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                model, tuple(self.inputs), forward_fn=lambda net, args: net(*args), verbose=False
            )
        _correct_slices(self.graph)

    def roots(self) -> list[nn.Module]:
        """Linear and convolution layers of the graph, without the depthwise ones, in forward order.

        Layers that the forward pass never calls are not in the graph; torch-pruning raises for them.
        """
        traced = [m for m in self.graph.module2node if isinstance(m, MATRICES) and m in self.names]
        return sorted((m for m in traced if not is_depthwise(m)), key=self.order.__getitem__)

    def groups_of(self, module: nn.Module) -> Iterator[NeuronGroup]:
        """The group of the rows of `module` that no earlier group holds."""
        count = channels(module, PRODUCER)
        covered = self.covered.setdefault(module, torch.zeros(count, dtype=torch.bool))
        rows = (~covered).nonzero().flatten().tolist()
        if not rows:
            return
        covered[rows] = True
        if module in self.attentions:
            yield self._heads(self.attentions[module])
            return
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

    def _heads(self, attention: Any) -> NeuronGroup:
        """The heads of an attention: their rows of q, k and v, and the columns of the projection that read them."""
        count, size = attention.num_heads, attention.head_dim
        heads = torch.arange(count * size).view(count, size)
        rows = torch.cat([heads + part * count * size for part in range(3)], dim=1)
        members = [
            Member(self.names[attention.qkv], attention.qkv, PRODUCER, rows),
            Member(self.names[attention], attention, CHANNELWISE, torch.arange(count)[:, None]),
            Member(self.names[attention.proj], attention.proj, CONSUMER, heads),
        ]
        return NeuronGroup(self.names[attention.qkv], members)

    def _units(self, module: nn.Module, rows: list[int]) -> list[dict[tuple[nn.Module, str], list[int]]]:
        """What each neuron owns: (layer, role) -> channels. Rows that are coupled to each other are one neuron."""
        units: dict[tuple[int, ...], dict[tuple[nn.Module, str], list[int]]] = {}
        for unit in self._query(module, rows).values():
            units.setdefault(tuple(unit[module, PRODUCER]), unit)
        if sum(map(len, units)) != len(rows):
            raise Refused("its channels depend on each other in a way that cannot be split into neurons")
        return list(units.values())

    def _query(self, module: nn.Module, rows: list[int]) -> dict[int, dict[tuple[nn.Module, str], list[int]]]:
        """Row -> what goes with it."""
        owned: dict[int, dict[tuple[nn.Module, str], set[int]]] = {row: {} for row in rows}
        for node, handler, indices in self._walk(module, rows):
            key = self._classify(node, handler)
            if key is None:
                continue
            for index, root in indices:
                if root not in owned:
                    raise Refused("torch-pruning lost track of its channels")
                owned[root].setdefault(key, set()).add(index)
        return {row: {key: sorted(found) for key, found in unit.items()} for row, unit in owned.items()}

    def _walk(self, module: nn.Module, rows: list[int]) -> list[tuple[Any, Any, set[_Index]]]:
        """(node, pruning function, its channels with the rows they go with) of all that goes with rows of a layer.

        `DependencyGraph.get_pruning_group` follows the same edges, but compares whole lists of channels, which never
        ends where its mappings grow without bound, and keeps one row for each channel.
        """
        found: dict[tuple[Any, Any], set[_Index]] = {}
        start = self.graph.module2node[module], self.graph.get_pruner_of_module(module).prune_out_channels
        todo = [(*start, [_Index(row, row) for row in rows])]
        while todo:
            node, handler, indices = todo.pop()
            seen = found.setdefault((node, handler), set())
            new = [index for index in indices if index not in seen]
            if any(not 0 <= index.idx < self.most_channels for index in new):
                raise Refused("torch-pruning finds channels that no layer has")
            seen.update(new)
            for dep in node.dependencies if new else ():
                if dep.is_triggered_by(handler):
                    todo.append((dep.target, dep.handler, _mapped(dep.index_mapping, new)))
        return [(node, handler, indices) for (node, handler), indices in found.items()]

    def _classify(self, node: Any, handler: Any) -> tuple[nn.Module, str] | None:
        """(layer, role) of what a pruning function does to a node, None without tensors; raises Refused."""
        module = node.module
        if isinstance(module, tp_ops._OutputOp):
            raise Refused("it is an output of the model", expected=True)
        if isinstance(module, MATRICES) and not is_depthwise(module):
            producer = handler == self.graph.get_pruner_of_module(module).prune_out_channels
            if not producer and self._reads_input(node):
                raise Refused("it is coupled to the input of the model")
            return module, PRODUCER if producer else CONSUMER
        if self._reads_input(node):
            raise Refused("it is coupled to the input of the model")
        if isinstance(module, (*NORMS, *JOINT_NORMS)) or is_depthwise(module):
            return module, CHANNELWISE
        if isinstance(module, nn.PReLU):
            return (module, CHANNELWISE) if module.num_parameters > 1 else None
        if module in self.names:
            raise Refused(f"{type(module).__name__} {self.names[module]!r} depends on it, which cannot be cut")
        if isinstance(module, nn.Parameter):
            raise Refused(f"bare parameter {self.parameters.get(id(module), '')!r} depends on it, which cannot be cut")
        return None

    def _reads_input(self, node: Any) -> bool:
        leaves = [getattr(edge, "variable", None) for edge, _ in getattr(node.grad_fn, "next_functions", ())]
        return any(leaf is value for leaf in leaves if leaf is not None for value in self.inputs)

    def _common_keys(self, units: list[dict[tuple[nn.Module, str], list[int]]]) -> list[tuple[nn.Module, str]]:
        """The (layer, role) pairs in forward order, of which every neuron must own equally many channels."""
        first = units[0]
        shape = {key: len(found) for key, found in first.items()}
        if any({key: len(found) for key, found in unit.items()} != shape for unit in units):
            raise Refused("its neurons do not all feed the same layers")
        return sorted(first, key=lambda key: self.order[key[0]])


def _mapped(mappings: Sequence[Any], indices: list[_Index]) -> list[_Index]:
    try:
        for mapping in mappings:
            indices = indices if mapping is None else mapping(indices)
    except (IndexError, KeyError, TypeError) as error:  # a split of a recurrent cell's gates, for one
        raise Refused(f"torch-pruning cannot follow its channels ({type(error).__name__}: {error})") from error
    return indices
