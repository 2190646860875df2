"""The groups of many networks, stored neuron by neuron: which entries of which tensors belong to one neuron.

`expected_groups.json` maps network -> group -> members. A member is [names of tensors, dimension, groups, role, index];
its index is "start:count*stride,...;count*stride,..." (steps over the neurons; steps within a neuron) or a list of the
entries of each neuron. Found groups may own more: further tensors, and there may be more of them.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flatprune.coupling import find_coupling
from tests.conftest import thorough
from tests.coupling.known_networks import KNOWN_NETWORKS

EXPECTED = json.loads(Path(__file__).with_name("expected_groups.json").read_text())


class StoredMember(NamedTuple):
    """What each neuron owns along one dimension of a tensor."""

    tensor: str
    dim: int
    groups: int
    role: str
    index: list[list[int]]


def decoded(index: str | list[list[int]]) -> list[list[int]]:
    """[neurons][k] entries of an index as it is stored."""
    if not isinstance(index, str):
        return index
    start, _, steps = index.partition(":")
    neurons, _, inside = steps.partition(";")
    return [[int(start) + row + entry for entry in _offsets(inside)] for row in _offsets(neurons)]


def _offsets(steps: str) -> list[int]:
    """Sums of all combinations of "count*stride,...", the last one fastest."""
    pairs = [step.split("*") for step in steps.split(",") if step]
    return [sum(offsets) for offsets in itertools.product(*(range(0, int(n) * int(s), int(s)) for n, s in pairs))]


def stored_members(entry: dict[str, Any]) -> list[StoredMember]:
    return [
        StoredMember(tensor, dim, groups, role, decoded(index))
        for tensors, dim, groups, role, index in entry["members"]
        for tensor in tensors.split()
    ]


def found_members(group, stored: list[StoredMember]) -> list | None:
    """The members of a found group along the stored tensors and dimensions, None where it lacks one."""
    members = {(name, member.dim): member for member in group.members for name in member.names}
    keys = [(member.tensor, member.dim) for member in stored]
    return [members[key] for key in keys] if all(key in members for key in keys) else None


def neurons_of(indices: list[list[list[int]]]) -> list[tuple]:
    """Neuron by neuron the entries of each member."""
    return [tuple(tuple(sorted(entries)) for entries in neuron) for neuron in zip(*indices)]


def slices_of(neurons: list[tuple], group_of: Tensor | list[int]) -> set[frozenset]:
    """The neurons of each slice."""
    return {
        frozenset(neuron for neuron, other in zip(neurons, group_of) if int(other) == int(number))
        for number in torch.as_tensor(group_of).unique()
    }


def mismatch(group, entry: dict[str, Any]) -> str:
    """Why a found group is not the stored one; "" if it is."""
    stored = stored_members(entry)
    members = found_members(group, stored)
    if members is None:
        return f"group {group.name!r} owns other tensors"
    for member, wanted in zip(members, stored):
        if member.groups != wanted.groups or wanted.role not in member.roles:
            return f"{wanted.tensor} is {member.groups, set(member.roles)}, expected {wanted.groups, wanted.role}"
    expected = neurons_of([member.index for member in stored])
    found = neurons_of([member.index.tolist() for member in members])
    if sorted(found) != sorted(expected):
        return f"group {group.name!r} has neurons such as {found[0]}, expected such as {expected[0]}"
    slices = entry.get("slices", [0] * len(expected))
    group_of = group.group_of if group.groups > 1 else [0] * group.width
    if slices_of(found, group_of) != slices_of(expected, slices):
        return f"group {group.name!r} has {group.groups} slices, expected {max(slices) + 1}"
    return ""


# the depth of a network adds nothing but time
DEEP = (
    "densenet40",
    "mobilenetv2",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "wide_resnet32",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
)


@pytest.mark.parametrize("name", thorough(EXPECTED, seldom=[f"shipped {deep}" for deep in DEEP]))
def test_every_group_is_found_neuron_by_neuron(name):
    model, inputs = KNOWN_NETWORKS[name]()
    coupling = find_coupling(model, inputs)
    for stored, entry in EXPECTED[name].items():
        reasons = [mismatch(group, entry) for group in coupling.groups]
        near = [reason for reason in reasons if "owns other tensors" not in reason]
        assert "" in reasons, f"{stored}: {near or coupling.refused or reasons}"


def test_every_network_has_groups():
    assert set(EXPECTED) == set(KNOWN_NETWORKS)
    assert all(EXPECTED.values())
    assert sum(len(groups) for groups in EXPECTED.values()) == 494
