"""From labels to neurons: connected components of what goes together, read off as groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from flatprune.coupling.findings import AxisTable, Findings
from flatprune.coupling.neurons import CHANNELWISE, CONSUMER, PRODUCER, Member, NeuronGroup, Refused, module_of
from flatprune.coupling.slices import Across, Crossed, Uneven, slices_of
from flatprune.coupling.values import JOINT, Axis

_PRIMES = (1_000_003, 7_919, 2_147_483_647)  # of signatures, which wrap around
OUTPUT = "it is an output of the model"
UNITED = "all its channels depend on each other"


@dataclass
class Candidate:
    """A group of neurons that nothing found so far forbids.

    Attributes:
        group: the group.
        labels: flat labels of its neurons [n], those that no tensor has too.
        neuron_of: int64 [n], the neuron of each.
        where: the operator that asks for slices, "" without.
        joint_norms: norms whose statistics run over these neurons.
    """

    group: NeuronGroup
    labels: Tensor
    neuron_of: Tensor
    where: str = ""
    joint_norms: list[str] = field(default_factory=list)

    def labels_of(self, neurons: Tensor) -> Tensor:
        """The flat labels of some neurons [m]."""
        return self.labels[torch.isin(self.neuron_of, neurons)]

    def first_labels(self) -> Tensor:
        """One flat label of each neuron."""
        first = torch.empty(self.group.width, dtype=torch.int64)
        first[self.neuron_of.flip(0)] = self.labels.flip(0)
        return first


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
        balances: pairs of flat labels of neurons which could go together, but not alone.
    """

    def __init__(self, table: AxisTable, findings: Findings, more: Sequence[Tensor] = ()) -> None:
        self.table, self.findings, self.more = table, findings, list(more)
        self._nodes = table.next_node
        self.total = table.next_node + len(table.joints)
        for role in {role for _, role in findings.roles}:
            labels = torch.cat([layer.flatten() for layer, other in findings.roles if other == role])
            for axis in table.owners(labels.unique()):
                axis.roles.add(role)
        findings.roles.clear()
        self._flat_findings = self._with_flat_labels()
        self._reasons: list[str] = []
        self.component, broadcast = self._connect()
        self._reason = torch.full((int(self.component.max()) + 1,), -1, dtype=torch.int64)
        pins = sorted(findings.pins, key=lambda pin: pin[1] != OUTPUT)  # logits stay whatever a loss makes of them
        for labels, why in (*pins, *broadcast):
            self._note_reason(self.component[self.flat(labels)].unique(), why)
        self.candidates: list[Candidate] = []
        self.refused: list[tuple[tuple[str, ...], str]] = []
        self.balances: list[Tensor] = []
        self._read_off()

    def flat(self, labels: Tensor) -> Tensor:
        """Labels as positions from 0 to `total`."""
        return torch.where(labels >= JOINT, labels - JOINT + self._nodes, labels)

    def known(self, layer: Tensor) -> Tensor:
        """Labels as positions, -1 for none."""
        return torch.where(layer > 0, self.flat(layer), -1)

    def _unflat(self, labels: Tensor) -> Tensor:
        return torch.where(labels >= self._nodes, labels - self._nodes + JOINT, labels)

    def _with_flat_labels(self) -> Findings:
        """Grids and slices with flat labels, `total` for none."""

        def flat(array: Tensor) -> Tensor:
            return torch.where(array > 0, self.flat(array), self.total)

        return Findings(
            grids={key: (flat(array), where) for key, (array, where) in self.findings.grids.items()},
            slices=[(flat(array), where) for array, where in self.findings.slices],
        )

    # components

    def _connect(self) -> tuple[Tensor, list[tuple[Tensor, str]]]:
        """Components over hard and soft edges; soft ones are dropped where they would swallow a whole axis.

        First those of broadcast vectors (a rotary table over the heads), then those of heads over their channels. The
        coarse side of an edge that was dropped cannot go: it is returned with the reason.
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
        dropped = []
        for pairs, (_, where) in zip((pairs for pairs, _ in soft), self.findings.soft):
            apart_now = component[pairs[:, 0]] != component[pairs[:, 1]]
            if bool(apart_now.any()):
                dropped.append((self._unflat(pairs[apart_now, 0]), f"it is broadcast over channels ({where})"))
        return component, dropped

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
        count = int(self.component.max()) + 1
        made, used, acted = (self._touched_by(role, count) for role in (PRODUCER, CONSUMER, CHANNELWISE))
        made &= self._owning_parameters(count)  # not the positions of a fixed table alone
        for labels in self.findings.read:
            used[self.component[self.flat(labels)]] = True
        self._note_reason(made & ~used, "nothing reads it")
        made |= acted & used & (self._reason < 0)  # learned positions or queries alone
        eligible = made & (self._reason < 0)
        self._refuse(made & (self._reason >= 0))
        signatures = self._signatures(eligible, counting=True)
        axes: dict[int, list[Axis]] = {}
        for axis in self.table.axes:
            for signature in signatures[self._of(axis)].unique().tolist():
                axes.setdefault(signature, []).append(axis)
        for signature in signatures[eligible].unique().tolist():
            self._add(signature, axes[signature])
        self.candidates.sort(key=lambda candidate: int(candidate.labels.min()))
        _name_apart([candidate.group for candidate in self.candidates])
        self._note_joint_norms()

    def _touched_by(self, role: str, count: int) -> Tensor:
        """Whether a component holds entries of an axis of that role: bool [components]."""
        touched = torch.zeros(count, dtype=torch.bool)
        for axis in self.table.axes:
            if role in axis.roles:
                touched[self._of(axis)] = True
        return touched

    def _owning_parameters(self, count: int) -> Tensor:
        """Whether a component holds an entry of a parameter: bool [components]."""
        owning = torch.zeros(count, dtype=torch.bool)
        parameters = {self.table.names[key][0] for key, t in self.table.tensors.items() if isinstance(t, nn.Parameter)}
        for axis in self.table.axes:
            if axis.names[0] in parameters:
                owning[self._of(axis)] = True
        return owning

    def _of(self, axis: Axis) -> Tensor:
        """The component of each entry of an axis."""
        return self.component[axis.start : axis.start + axis.size]

    def _note_reason(self, where: Tensor, why: str) -> None:
        """Why components (a mask, or their numbers) cannot go; the first reason counts."""
        components = where.nonzero().flatten() if where.dtype == torch.bool else where
        new = components[self._reason[components] < 0]
        if len(new):
            self._reason[new] = len(self._reasons)
            self._reasons.append(why)

    def _signatures(self, wanted: Tensor, *, counting: bool) -> Tensor:
        """A number for the axes that each component owns entries of (and how many): equal for equal ones."""
        signature = torch.zeros_like(self._reason)
        for number, axis in enumerate(self.table.axes):
            if counting or PRODUCER in axis.roles:
                found, counts = self._of(axis).unique(return_counts=True)
                counts, found = counts[wanted[found]], found[wanted[found]]
                term = (number + 1) * _PRIMES[0] + (counts * _PRIMES[1] if counting else 0)
                signature[found] = signature[found] * _PRIMES[2] + term
        self._signature = signature
        return signature

    def _refuse(self, stays: Tensor) -> None:
        """One entry for each set of producers and reason."""
        signature = self._signatures(stays, counting=False)
        seen = set()
        for c in stays.nonzero().flatten()[_first_places(torch.stack([signature, self._reason])[:, stays])].tolist():
            makers = [a.names[0] for a in self.table.axes if PRODUCER in a.roles and bool((self._of(a) == c).any())]
            entry = (tuple(dict.fromkeys(map(module_of, makers))), self._reasons[int(self._reason[c])])
            if entry not in seen:
                seen.add(entry)
                self.refused.append(entry)

    def _add(self, signature: int, axes: Sequence[Axis]) -> None:
        """The group of all components of one signature, which own entries of these axes, or a reason against it."""
        inside = self._signature == signature
        lead = min(axes, key=lambda axis: (PRODUCER not in axis.roles, CHANNELWISE not in axis.roles, axis.start))
        if not any(PRODUCER in axis.roles for axis in axes):  # learned positions or queries make themselves
            lead.roles.add(PRODUCER)
        owners = self._of(lead)[inside[self._of(lead)]]
        neurons = owners[_first_places(owners[None]).sort().values]
        number = torch.full_like(self._reason, -1)
        number[neurons] = torch.arange(len(neurons))
        makers = tuple(dict.fromkeys(module_of(axis.names[0]) for axis in axes if PRODUCER in axis.roles))
        of_label = torch.cat([number[self.component], torch.tensor([-1])])
        members = [self._member(axis, number, len(neurons)) for axis in axes]
        try:
            if len(neurons) < 2:
                raise Refused(UNITED)
            slices, slice_of, where = slices_of(self._flat_findings, of_label, len(neurons))
        except Refused as refusal:
            if isinstance(refusal, Across):  # without these, the others may go
                self._note_reason(neurons[refusal.stay], str(refusal))
                self._signature[neurons[refusal.stay]] = 0
                if (makers, str(refusal)) not in self.refused:
                    self.refused.append((makers, str(refusal)))
                self._add(signature, axes)
                return
            if isinstance(refusal, Uneven):
                self._note_balance(refusal.array)
            elif isinstance(refusal, Crossed):
                self._tie_rows(refusal.array)
            self.refused.append((makers, str(refusal)))
            return
        group = NeuronGroup(module_of(lead.names[0]), members, slices, slice_of, self._multiple(of_label, members))
        labels = (of_label >= 0).nonzero().flatten()
        self.candidates.append(Candidate(group, labels, of_label[labels], where))

    def _note_balance(self, array: Tensor) -> None:
        """Slices of several groups (parts of a concatenation under a group norm): their neurons can go together.

        Args:
            array: flat labels [slices, entries], each slice of one group; or else entries at one place of all slices go
                together.
        """
        if bool((array == self.total).any()):
            return
        owners = self._signature[self.component[array]]
        if bool((owners != owners[:, :1]).any()):
            self._tie_rows(array)
            return
        if bool((self._reason[self.component[array]] >= 0).any()):
            return
        rows = [array[owners[:, 0] == owner] for owner in owners[:, 0].unique()]
        fewest = min(rows, key=len)
        for own in rows:
            if own is not fewest and len(own) % len(fewest) == 0:
                over = fewest.repeat(len(own) // len(fewest), 1)
                self.balances.append(torch.stack([over.flatten(), own.flatten()], dim=1))

    def _tie_rows(self, array: Tensor) -> None:
        """Flat labels in one column [rows, columns] go together."""
        pairs = torch.stack([array[:1].expand_as(array[1:]).flatten(), array[1:].flatten()], dim=1)
        pairs = pairs[(pairs < self.total).all(dim=1)]
        if bool((self.component[pairs[:, 0]] != self.component[pairs[:, 1]]).any()):
            self.balances.append(pairs)

    def _member(self, axis: Axis, number: Tensor, count: int) -> Member:
        of_entry = number[self._of(axis)]
        entries = (of_entry >= 0).nonzero().flatten()
        order = of_entry[entries].argsort(stable=True)
        index = entries[order].view(count, -1)
        return Member(axis.names, axis.dim, axis.groups, frozenset(axis.roles), index, axis.size)

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
                if int(self.component[candidate.labels[0]]) in touched and where not in candidate.joint_norms:
                    candidate.joint_norms.append(where)


def _name_apart(groups: Sequence[NeuronGroup]) -> None:
    """Several groups of one layer (the halves of a gate, say) get numbers behind its name."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = number = seen.get(group.name, 0) + 1
        if number > 1:
            group.name = f"{group.name}#{number}"


def _first_places(columns: Tensor) -> Tensor:
    """Where each different column of [rows, n] stands first."""
    _, place = columns.unique(dim=1, return_inverse=True)
    first = torch.full((int(place.max()) + 1 if len(place) else 0,), len(place), dtype=torch.int64)
    return first.scatter_reduce(0, place, torch.arange(len(place)), "amin")
