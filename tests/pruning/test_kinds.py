"""Kinds of neurons of a transformer: which they are, and how they share what goes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import flatprune
from flatprune import find_coupling
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.kinds import HEADS, REST, STREAM, Proportions, find_kinds
from flatprune.pruning.limits import Limits
from flatprune.pruning.selection import select, select_greedily
from tests.pruning.test_saved_models import NETWORKS, Training
from tests.pruning.test_selection import Fixed
from tests.pruning.test_tied_widths import transformer

EVEN = Limits(1, 1, 0.9)


def coupled(*hidden, heads=6):
    model = transformer(*hidden, heads=heads)
    return model, find_coupling(model, torch.zeros(2, 8, 8)).groups


@pytest.mark.parametrize(
    ("network", "kinds"),
    [
        ("encoder", {STREAM: 1, HEADS: 2, REST: 2}),
        ("encoder_norm_first", {STREAM: 1, HEADS: 2, REST: 2}),
        ("heads", {HEADS: 1, REST: 1}),
        ("convolutions", {REST: 3}),
        ("recurrent", {REST: 2}),
    ],
)
def test_the_kinds_of_networks(network, kinds):
    found = find_kinds(find_coupling(NETWORKS[network]().eval(), torch.randn(2, 8, 8)).groups)
    assert {kind: sum(k.name == kind for k in found.values()) for kind in kinds} == kinds
    assert len(found) == sum(kinds.values())


def test_the_kinds_of_a_transformer_by_name():
    _, groups = coupled(20, 12)
    kinds = {name: tuple(kind) for name, kind in find_kinds(groups).items()}
    assert kinds == {
        "embed": (STREAM, 16),
        "blocks.0.qkv": (HEADS, 6),
        "blocks.0.fc1": (REST, 20),
        "blocks.1.qkv": (HEADS, 6),
        "blocks.1.fc1": (REST, 12),
    }


def test_layers_that_are_pruned_keep_their_kinds():
    model = transformer(20, 12)
    layers = ["embed", "blocks.0.fc1", "blocks.1.fc1"]
    pruner = flatprune.Pruner(
        model,
        None,
        flatprune.Curvature(model),
        torch.zeros(2, 8, 8),
        target=flatprune.Target(0.7),
        total_steps=10,
        layers=layers,
    )
    kinds = {name: kind for name, (kind, _) in pruner.state_dict()["kinds"].items()}
    assert kinds == {"embed": STREAM, "blocks.0.fc1": REST, "blocks.1.fc1": REST}


def expected(groups, scores, exponent, count):
    """The first neurons to go, one by one: the lowest score times (start / left) ** exponent of its kind."""
    kinds = find_kinds(groups)
    start = {kind.name: 0 for kind in kinds.values()}
    for kind in kinds.values():
        start[kind.name] += kind.width
    left, orders = dict(start), [score.argsort(stable=True).tolist() for score in scores]
    gone = [0] * len(groups)
    for _ in range(count):
        ranked = []
        for position, group in enumerate(groups):
            if gone[position] < int(0.9 * group.width):
                kind = kinds[group.name].name
                score = float(scores[position][orders[position][gone[position]]])
                ranked.append((score * (start[kind] / left[kind]) ** exponent, position))
        position = min(ranked)[1]
        left[kinds[groups[position].name].name] -= 1
        gone[position] += 1
    return {p: sorted(orders[p][:n]) for p, n in enumerate(gone) if n}


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 40.0])
def test_scores_of_a_kind_rise_as_it_shrinks(exponent, greedy):
    model, groups = coupled(20, 12)
    generator = torch.Generator().manual_seed(int(exponent))
    scale = {STREAM: 1.0, HEADS: 3.0, REST: 0.02}
    kinds = find_kinds(groups)
    scores = [scale[kinds[g.name].name] * torch.rand(g.width, generator=generator).double() for g in groups]
    widths = {group.name: group.width for group in groups}
    for fraction in (0.9, 0.7, 0.5):
        costs = ParameterCount(model, groups)
        budget, prices = fraction * costs.cost, costs.neuron_costs()
        proportions = Proportions(groups, kinds, widths, exponent)
        if greedy:
            joint = Fixed([score * price for score, price in zip(scores, prices)])
            pruned = select_greedily(costs, groups, joint, budget, EVEN, proportions=proportions)
        else:
            pruned = select(costs, groups, scores, budget, EVEN, proportions=proportions)
        found = {position: neurons.tolist() for position, neurons in pruned.items()}
        assert found == expected(groups, scores, exponent, sum(map(len, found.values())))


def test_a_large_exponent_keeps_the_proportions():
    model, groups = coupled(40, 40, heads=10)
    kinds = find_kinds(groups)
    scores = [torch.rand(group.width).double() ** 6 for group in groups]
    costs = ParameterCount(model, groups)
    proportions = Proportions(groups, kinds, {group.name: group.width for group in groups}, 1000.0)
    pruned = select(costs, groups, scores, 0.4 * costs.cost, EVEN, proportions=proportions)
    lost = dict.fromkeys((STREAM, HEADS, REST), 0)
    for position, neurons in pruned.items():
        lost[kinds[groups[position].name].name] += len(neurons)
    left = {kind: 1 - gone / size for (kind, gone), size in zip(lost.items(), (16, 20, 80))}
    assert all(abs(one - other) <= 1 / 16 for one, other in itertools.combinations(left.values(), 2))


def test_what_was_one_kind_is_ranked_as_before():
    model, groups = coupled(20, 12)
    scores = [torch.rand(group.width).double() for group in groups]
    one, two = ({}, {"proportions": Proportions(groups, find_kinds(groups), {g.name: g.width for g in groups}, 0.0)})
    budget = 0.5 * ParameterCount(model, groups).cost
    first, second = (select(ParameterCount(model, groups), groups, scores, budget, EVEN, **each) for each in (one, two))
    assert all(torch.equal(first[position], second[position]) for position in {*first, *second})


def test_proportions_go_on_after_a_resume():
    options = {"params": 0.15, "min_width": 1, "keep_proportions": 2.0}
    torch.manual_seed(3)
    model = NETWORKS["encoder"]()
    whole = Training(model, **options).train(4)
    state = copy.deepcopy(whole.state())
    assert 1 in state["pruner"]["widths"].values()  # the last head of a layer, which a new search does not see as one
    whole.train(2)
    again = Training.resumed(NETWORKS["encoder"](), state, **options).train(2)
    assert again.pruner.widths() == whole.pruner.widths()
    assert [r.neurons for r in again.pruner.history] == [r.neurons for r in whole.pruner.history]
    other = dict(options, keep_proportions=1.0)
    with pytest.raises(ValueError, match=r"keep_proportions is 2\.0 in the state, expected 1\.0"):
        Training.resumed(NETWORKS["encoder"](), state, **other)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_exponents_that_are_none(value):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"Pruner: keep_proportions is -?\w+(\.\w)?, expected a number of 0 or more"):
        flatprune.Pruner(
            model,
            None,
            flatprune.Curvature(model),
            torch.zeros(2, 4),
            target=flatprune.Target(0.5),
            total_steps=10,
            keep_proportions=value,
        )
