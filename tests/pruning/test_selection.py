from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flatprune.coupling import Coupling, find_coupling
from flatprune.cutting import surgery
from flatprune.pruning import selection
from flatprune.pruning.costs import CostModel, ParameterCount, smallest_cost
from flatprune.pruning.limits import Limits
from flatprune.pruning.selection import End
from tests.pruning.pruning_networks import NETWORKS, Grouped, digits, mlp


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def select(model: nn.Module, groups, *arguments, **options) -> dict[int, Tensor]:
    return selection.select(ParameterCount(model, groups), groups, *arguments, **options)


def random_scores(groups, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.width, generator=generator, dtype=torch.float64) for group in groups]


def cut_copy(model: nn.Module, coupling: Coupling, pruned: dict[int, Tensor]) -> nn.Module:
    model, coupling = copy.deepcopy((model, coupling))
    surgery.plan(model, coupling, pruned).commit()
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("closely", [False, True])
def test_the_count_on_paper_is_the_count_after_the_cut(name, closely):
    model = NETWORKS[name]()
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    start = params_of(model)
    assert ParameterCount(model, groups).cost == start
    for seed, fraction in enumerate((0.9, 0.7, 0.5)):
        budget = int(fraction * start)
        pruned = select(
            model, groups, random_scores(groups, seed), budget, Limits(1, 2, 0.75), end=End(closely=closely)
        )
        count = ParameterCount(model, groups)
        for position, neurons in pruned.items():
            count.remove(position, len(neurons))
        left = params_of(cut_copy(model, coupling, pruned))
        assert count.cost == left <= budget


def test_lowest_scores_go_first_over_all_layers():
    model = mlp(10, 10)
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    scores = random_scores(groups)
    pruned = select(model, groups, scores, params_of(model) - 3 * (64 + 1 + 10), Limits(1, 2, 1.0))
    removed = torch.cat([scores[p][n] for p, n in pruned.items()])
    kept = torch.cat([scores[p].index_fill(0, pruned.get(p, torch.tensor([], dtype=torch.int64)), 9.0) for p in (0, 1)])
    assert float(removed.max()) <= float(kept.min())
    assert all(torch.equal(n, n.sort().values) for n in pruned.values())


def test_at_most_half_of_a_layer_and_at_least_two_neurons():
    model = mlp(11, 3)
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    pruned = select(model, groups, random_scores(groups), 0, Limits())
    assert {p: len(n) for p, n in pruned.items()} == {0: 5, 1: 1}
    pruned = select(model, groups, random_scores(groups), 0, Limits(1, 2, 1.0))
    assert {p: len(n) for p, n in pruned.items()} == {0: 9, 1: 1}
    smallest = params_of(cut_copy(model, coupling, pruned))
    assert smallest_cost(ParameterCount(model, groups), groups, Limits()) == smallest


@pytest.mark.parametrize("round_to", [4, 8])
def test_widths_become_multiples(round_to):
    model = mlp(30, 21)
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    for seed in range(5):
        pruned = select(model, groups, random_scores(groups, seed), int(0.6 * params_of(model)), Limits(round_to))
        assert pruned
        for position, neurons in pruned.items():
            left = groups[position].width - len(neurons)
            assert left % round_to == 0
            assert left >= round_to


def test_limits_count_channels_not_heads():
    model = NETWORKS["attention"]()
    stream, heads, hidden = find_coupling(model, digits()[0][:2]).groups
    assert (stream.name, stream.unit) == ("embed", 1)
    assert (heads.unit, hidden.unit) == (4, 1)
    assert Limits(round_to=8, min_width=2).step(heads) == 2  # two heads of four channels
    assert Limits(round_to=8, min_width=2).floor(heads) == 2
    assert Limits(min_width=2).floor(heads) == 1
    assert Limits(min_width=9).floor(heads) == 3
    assert Limits(round_to=8, min_width=2).step(hidden) == 8


def test_grouped_convolutions_lose_alike_from_each_group():
    model = Grouped()
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    scores = [torch.arange(group.width, dtype=torch.float64) for group in groups]  # all low ones in the first slice
    pruned = select(model, groups, scores, int(0.3 * params_of(model)), Limits())
    for position in (0, 1):
        counts = groups[position].group_of[pruned[position]].bincount(minlength=3)
        assert counts.min() == counts.max() > 0
        size = groups[position].width // 3
        lowest = torch.cat([torch.arange(int(counts[0])) + p * size for p in range(3)])
        assert torch.equal(pruned[position], lowest)
    assert params_of(cut_copy(model, coupling, pruned)) <= 0.6 * params_of(model)


def test_the_last_event_comes_nearer_to_the_budget():
    model = mlp(40, 30)
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    nearer = 0
    for seed in range(10):
        # scores that spend most on the small second layer before a large neuron of the first one overshoots
        scores = [torch.linspace(0.5, 1, 40).double(), random_scores(groups, seed)[1]]
        budget = params_of(model) - 700 - 7 * seed
        left = [
            params_of(cut_copy(model, coupling, select(model, groups, scores, budget, Limits(), end=End(closely=flag))))
            for flag in (False, True)
        ]
        assert left[0] <= left[1] <= budget
        nearer += left[1] > left[0]
    assert nearer > 0


class Sizes(CostModel):
    """A neuron of each group costs so much, whatever else is there."""

    def __init__(self, groups, sizes) -> None:
        super().__init__(groups)
        self.sizes = sizes

    @property
    def cost(self) -> float:
        return sum(size * width for size, width in zip(self.sizes, self._widths))


@pytest.mark.parametrize(
    ("sizes", "scores", "expected"),
    [
        ((51, 10, 7), (0.0, 1.0, 2.0), {1: 1}),  # the lowest overshoots, the second ends in the range
        ((51, 6, 4), (0.0, 1.0, 2.0), {1: 1, 2: 1}),  # no single one ends there, two together do
        ((51, 6, 90), (0.0, 0.1, 2.0), {0: 1}),  # none does: the one of least change, score times cost, that ends below
        ((9, 10, 11), (3.0, 2.0, 1.0), {2: 1}),  # all do: the one of least change
    ],
)
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("closely", [False, True])
def test_neurons_that_end_within_the_tolerance_go_last(sizes, scores, expected, greedy, closely):
    if not closely and expected == {0: 1}:
        expected = {}  # an event that is not the last leaves what would end below to it
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    groups = find_coupling(nn.Sequential(*model, nn.Linear(3, 2)), torch.randn(2, 4)).groups
    costs = Sizes(groups, sizes)
    budget = costs.cost - 10
    ranked = [torch.tensor([score, 50.0, 60.0]) for score in scores]
    options = {"end": End(budget - 1.5, closely)}
    if greedy:
        changes = [score * size for score, size in zip(ranked, sizes)]
        pruned = selection.select_greedily(costs, groups, Fixed(changes), budget + 1.5, Limits(1, 1, 1.0), **options)
    else:
        pruned = selection.select(costs, groups, ranked, budget + 1.5, Limits(1, 1, 1.0), **options)
    assert {position: len(neurons) for position, neurons in pruned.items()} == expected
    assert costs.cost == sum(size * (3 - expected.get(p, 0)) for p, size in enumerate(sizes))


class Fixed:
    """Joint scores that do not depend on what went before."""

    total = 0.0

    def __init__(self, scores) -> None:
        self.scores = scores

    def remove(self, position, neurons):
        return set()

    def change(self, neurons):
        return 0.0


def test_the_last_neuron_is_the_one_that_costs_least():
    model = mlp(40, 30)  # 95 parameters go with a neuron of the first layer, 51 with one of the second
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    scores = [torch.linspace(0.5, 1, 40).double(), torch.linspace(0.6, 1, 30).double()]
    budget = params_of(model) - 40
    first = select(model, groups, scores, budget, Limits())
    closest = select(model, groups, scores, budget, Limits(), end=End(closely=True))
    assert {p: n.tolist() for p, n in first.items()} == {0: [0]}  # the lowest score a parameter
    assert {p: n.tolist() for p, n in closest.items()} == {1: [0]}  # 0.6 x 51 is less than 0.5 x 95


def test_a_budget_that_is_met_removes_nothing():
    model = mlp()
    coupling = find_coupling(model, digits()[0][:2])
    groups = coupling.groups
    assert select(model, groups, random_scores(groups), params_of(model), Limits()) == {}
