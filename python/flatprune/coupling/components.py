"""From labels to neurons: connected components of what goes together, read off as groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from flatprune.coupling.findings import AxisTable, Findings
from flatprune.coupling.neurons import CONSUMER, PRODUCER, Member, NeuronGroup, Refused, module_of
from flatprune.coupling.slices import slices_of
from flatprune.coupling.values import JOINT, Axis

OUTPUT = "it is an output of the model"
UNITED = "all its channels depend on each other"


@dataclass
class Candidate:
    """A group of neurons that nothing found so far forbids.

    Attributes:
        group: the group.
        nodes: of each neuron, all its flat labels, those that no tensor has too.
        where: the operator that asks for slices, "" without.
        joint_norms: norms whose statistics run over these neurons.
    """

    group: NeuronGroup
    nodes: list[Tensor]
    where: str = ""
    joint_norms: list[str] = field(default_factory=list)


class Components:
    """The neurons of a model, by what its traces have found.

    Args:
        table: the axes.
        findings: what goes together.
        more: further hard pairs of flat labels, such as pieces that must go together after all.

    Attributes:
        component: int64 [flat labels], of each label; a flat label counts joint ones after those of tensors.
        candidates: groups in forward order.
        refused: (modules that make neurons which stay, reason) of each set of coupled axes.
    """

    def __init__(self, table: AxisTable, findings: Findings, more: Sequence[Tensor] = ()) -> None:
        self.table, self.findings, self.more = table, findings, list(more)
        self._nodes = table.next_node
        self.total = table.next_node + table.next_joint - JOINT
        for layer, role in findings.roles:
            for axis in table.owners(layer.unique()):
                axis.roles.add(role)
        findings.roles.clear()
        self._flat_findings = self._with_flat_labels()
        self._reasons: dict[int, str] = {}
        self.component = self._connect()
        for labels, why in findings.pins:
            for c in self.component[self.flat(labels)].unique().tolist():
                self._reasons.setdefault(c, why)
        self.candidates: list[Candidate] = []
        self.refused: list[tuple[tuple[str, ...], str]] = []
        self._read_off()

    def flat(self, labels: Tensor) -> Tensor:
        """Labels as positions from 0 to `total`."""
        return torch.where(labels >= JOINT, labels - JOINT + self._nodes, labels)

    def _with_flat_labels(self) -> Findings:
        """Grids and slices with flat labels, `total` for none."""

        def flat(array: Tensor) -> Tensor:
            return torch.where(array > 0, self.flat(array), self.total)

        return Findings(
            grids={key: (flat(array), where) for key, (array, where) in self.findings.grids.items()},
            slices=[(flat(array), where) for array, where in self.findings.slices],
        )

    # components

    def _connect(self) -> Tensor:
        """Components over hard and soft edges; soft ones are dropped where they would swallow a whole axis.

        First those of broadcast vectors (a rotary table over the heads), then those of heads over their channels. The
        coarse side of an edge that was dropped cannot go.
        """
        hard = [*(self.flat(pairs) for pairs in self.findings.hard), *self.more]
        soft = [(self.flat(pairs), where) for pairs, where in self.findings.soft]
        apart = self._components(hard)
        is_score = torch.zeros(int(apart.max()) + 1, dtype=torch.bool)
        is_score[apart[self._nodes :]] = True
        of_heads = [pairs for pairs, _ in soft if bool(is_score[apart[pairs[:, 0]]].all())]
        of_vectors = [pairs for pairs, _ in soft if not bool(is_score[apart[pairs[:, 0]]].all())]
        component = self._components([*hard, *of_heads, *of_vectors])
        for level in ([*hard, *of_heads], [*hard, *of_vectors], hard):
            swallowed = self._swallowed(component, apart)
            if not bool(swallowed.any()):
                break
            inside = swallowed[component]
            finer = self._components([p[inside[p[:, 0]] & inside[p[:, 1]]] for p in level])
            component = torch.where(inside, finer + int(component.max()) + 1, component)
            component = component.unique(return_inverse=True)[1]
        for pairs, where in soft:
            dropped = pairs[component[pairs[:, 0]] != component[pairs[:, 1]]]
            for c in component[dropped[:, 0]].unique().tolist():
                self._reasons.setdefault(c, f"it is broadcast over channels ({where})")
        return component

    def _components(self, pairs: Iterable[Tensor]) -> Tensor:
        found = [p for p in pairs if len(p)]
        edges = torch.cat(found).numpy() if found else np.zeros((0, 2), np.int64)
        graph = coo_matrix((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), (self.total, self.total))
        return torch.from_numpy(connected_components(graph, directed=False)[1].astype(np.int64))

    def _swallowed(self, component: Tensor, apart: Tensor) -> Tensor:
        """Components that hold a whole axis whose entries hard edges alone keep apart."""
        swallowed = torch.zeros(int(component.max()) + 1, dtype=torch.bool)
        for axis in self.table.axes:
            entries = slice(axis.start, axis.start + axis.size)
            c, a = component[entries], apart[entries]
            if bool((c == c[0]).all()) and bool((a != a[0]).any()):
                swallowed[c[0]] = True
        return swallowed

    # groups

    def _read_off(self) -> None:
        """Neurons that own the same axes and counts form a group."""
        read = set()
        for labels in self.findings.read:
            read.update(self.component[self.flat(labels)].unique().tolist())
        groups: dict[tuple[tuple[int, int], ...], list[tuple[int, list[tuple[Axis, Tensor]]]]] = defaultdict(list)
        refused: dict[tuple[tuple[str, ...], str], None] = {}
        for c, owned in self._owned().items():
            roles = set().union(*(axis.roles for axis, _ in owned))
            why = self._reasons.get(c)
            if why is None and PRODUCER not in roles:
                continue  # nothing makes it: no neuron
            if why is None and CONSUMER not in roles and c not in read:
                why = "nothing reads it"
            if why is None:
                groups[tuple((axis.start, len(entries)) for axis, entries in owned)].append((c, owned))
            elif PRODUCER in roles:
                refused.setdefault((_makers(owned), why))
        members = self.component.argsort(stable=True)
        bounds = torch.searchsorted(self.component[members].contiguous(), torch.arange(int(self.component.max()) + 2))
        for neurons in groups.values():
            try:
                self.candidates.append(self._candidate(neurons, members, bounds))
            except Refused as refusal:
                refused.setdefault((_makers(neurons[0][1]), str(refusal)))
        self.candidates.sort(key=lambda candidate: candidate.nodes[0][0].item())
        _name_apart([candidate.group for candidate in self.candidates])
        self.refused = list(refused)
        self._note_joint_norms()

    def _owned(self) -> dict[int, list[tuple[Axis, Tensor]]]:
        """Component -> the entries of each axis that it holds."""
        owned: dict[int, list[tuple[Axis, Tensor]]] = defaultdict(list)
        for axis in self.table.axes:
            c = self.component[axis.start : axis.start + axis.size]
            order = c.argsort(stable=True)
            values, counts = c[order].unique_consecutive(return_counts=True)
            for value, entries in zip(values.tolist(), order.split(counts.tolist())):
                owned[value].append((axis, entries))
        return owned

    def _candidate(
        self, neurons: list[tuple[int, list[tuple[Axis, Tensor]]]], members: Tensor, bounds: Tensor
    ) -> Candidate:
        if len(neurons) < 2:
            raise Refused(UNITED)
        axes = [axis for axis, _ in neurons[0][1]]
        lead = next(i for i, axis in enumerate(axes) if PRODUCER in axis.roles)
        neurons = sorted(neurons, key=lambda neuron: int(neuron[1][lead][1][0]))
        parts = [
            Member(
                axis.names,
                axis.dim,
                axis.groups,
                frozenset(axis.roles),
                torch.stack([neuron[1][i][1] for neuron in neurons]),
                axis.size,
            )
            for i, axis in enumerate(axes)
        ]
        number = torch.full((self.total + 1,), -1, dtype=torch.int64)
        nodes = [members[bounds[c] : bounds[c + 1]] for c, _ in neurons]
        for j, labels in enumerate(nodes):
            number[labels] = j
        count, slice_of, where = slices_of(self._flat_findings, number, len(neurons))
        group = NeuronGroup(module_of(axes[lead].names[0]), parts, count, slice_of, self._multiple(number, parts))
        return Candidate(group, nodes, where)

    def _multiple(self, number: Tensor, members: Sequence[Member]) -> int:
        unit = min(member.index.shape[1] for member in members)
        wanted = [
            multiple // math.gcd(multiple, unit)
            for labels, multiple in self.findings.multiples
            if bool((number[self.flat(labels)] >= 0).any())
        ]
        return math.lcm(*wanted) if wanted else 1

    def _note_joint_norms(self) -> None:
        for labels, where in self.findings.joint_norms:
            touched = set(self.component[self.flat(labels)].unique().tolist())
            for candidate in self.candidates:
                if int(self.component[candidate.nodes[0][0]]) in touched and where not in candidate.joint_norms:
                    candidate.joint_norms.append(where)


def _name_apart(groups: Sequence[NeuronGroup]) -> None:
    """Several groups of one layer (the halves of a gate, say) get numbers behind its name."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = number = seen.get(group.name, 0) + 1
        if number > 1:
            group.name = f"{group.name}#{number}"


def _makers(owned: Iterable[tuple[Axis, Tensor]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(module_of(axis.names[0]) for axis, _ in owned if PRODUCER in axis.roles))
