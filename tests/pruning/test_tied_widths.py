"""Groups that keep one width: the layers of a transformer, whose configuration has one number for all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from flatprune.coupling import find_coupling
from flatprune.criteria import ScoringContext
from flatprune.criteria.joint import JointObs
from flatprune.pruning.costs import ParameterCount, smallest_cost
from flatprune.pruning.limits import Limits, LossBudget
from flatprune.pruning.selection import End, select, select_greedily
from flatprune.pruning.ties import find_ties, named_ties
from tests.conftest import thorough


class Block(nn.Module):
    """Self-attention of `heads` heads of four channels, then an MLP, both in residual sums."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 12 * heads), nn.Linear(4 * heads, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Transformer(nn.Module):
    """Blocks over eight rows of eight numbers, and a mean over the rows."""

    def __init__(self, *hidden: int, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.Sequential(*[Block(16, heads, width) for width in hidden])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def transformer(*hidden: int, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return Transformer(*hidden, **options)


class Loop:
    """A network and its pruner on random data that depends on the step alone."""

    def __init__(self, model: nn.Module, steps: int = 20, params: float = 0.5, **options: object) -> None:
        self.model, self.step = model.train(), 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.curvature = flatprune.Curvature(model, generator=torch.Generator().manual_seed(0))
        options = {"target": flatprune.Target(params), "total_steps": steps, "measure": False, **options}
        options = {"schedule": flatprune.CubicSchedule(steps, 0.2, 0.9, every=5), **options}
        self.pruner = flatprune.Pruner(model, self.optimizer, self.curvature, torch.zeros(2, 8, 8), **options)

    def train(self, steps: int = 20) -> list:
        records = []
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(16, 8, 8, generator=generator)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), (x[:, 0, :4] * 3 + x[:, 1, :4]).argmax(1)).backward()
            self.optimizer.step()
            records += self.pruner.step()
        return records

    def widths(self, end: str) -> list[int]:
        return [width for name, width in self.pruner.widths().items() if name.endswith(end)]


def test_groups_of_one_kind_are_tied():
    groups = find_coupling(transformer(20, 20, 24), torch.zeros(2, 8, 8)).groups
    assert named_ties(groups, find_ties(groups, False)) == [[group.name] for group in groups]
    assert named_ties(groups, find_ties(groups, True)) == [
        ["embed"],
        ["blocks.0.qkv", "blocks.1.qkv", "blocks.2.qkv"],
        ["blocks.0.fc1", "blocks.1.fc1"],
        ["blocks.2.fc1"],
    ]


def test_patterns_name_the_groups_that_are_tied():
    groups = find_coupling(transformer(20, 20, 16), torch.zeros(2, 8, 8)).groups
    ties = named_ties(groups, find_ties(groups, ["*.[01].fc1"]))
    assert ["blocks.0.fc1", "blocks.1.fc1"] in ties
    assert len(ties) == len(groups) - 1
    ties = named_ties(groups, find_ties(groups, ["*.0.qkv", "blocks.[01].qkv", "blocks.[12].qkv"]))
    assert ["blocks.0.qkv", "blocks.1.qkv", "blocks.2.qkv"] in ties
    with pytest.raises(ValueError, match=r"'\*.mlp' matches no layer that is pruned; there are embed, "):
        find_ties(groups, ["*.mlp"])
    with pytest.raises(ValueError, match=r"'\*.fc1' matches 'blocks.0.fc1' with 20 .* 'blocks.2.fc1' with 16, exp"):
        find_ties(groups, ["*.fc1"])


def test_a_pattern_is_no_list_of_patterns():
    with pytest.raises(TypeError, match=r"tie_widths is '\*.fc1', expected a list of names"):
        Loop(transformer(20, 20), tie_widths="*.fc1")


WAYS = [("independent", False), ("independent", True), ("greedy", False), ("greedy", True)]


@pytest.mark.parametrize(("selection", "compensate"), thorough(WAYS, but=[("independent", False), ("greedy", True)]))
def test_the_widths_of_a_kind_stay_equal(selection, compensate):
    loop = Loop(transformer(24, 24, 24), tie_widths=True, selection=selection, compensate=compensate)
    records = loop.train()
    assert loop.pruner.params <= 1.01 * 0.5 * loop.pruner.params_start
    assert len(set(loop.widths("fc1"))) == len(set(loop.widths("qkv"))) == 1
    assert loop.widths("fc1")[0] < 24 and loop.widths("qkv")[0] < 6
    own = {r.neurons for r in records if r.layer.endswith("fc1") and r.step == records[0].step}
    assert len(own) > 1  # as many from each, but from each its own
    free = Loop(transformer(24, 24, 24), selection=selection, compensate=compensate, keep_proportions=False)
    free.train()
    assert len(set(free.widths("fc1"))) > 1


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"neurons": 0.5}])
def test_other_targets_reach_their_goal(target):
    loop = Loop(transformer(24, 24), target=flatprune.Target(**target), tie_widths=True)
    loop.train()
    assert loop.pruner.cost <= 1.01 * loop.pruner.goal
    assert len(set(loop.widths("fc1"))) == len(set(loop.widths("qkv"))) == 1


def test_widths_are_rounded_together():
    layers = ["blocks.0.fc1", "blocks.1.fc1"]
    loop = Loop(transformer(27, 27), params=0.85, tie_widths=["*.fc1"], round_to=8, layers=layers)
    loop.train()
    assert set(loop.widths("fc1")) in ({8}, {16})


@pytest.mark.parametrize("closely", [False, True])
def test_a_bundle_is_the_lowest_of_every_tied_group(closely):
    model = transformer(20, 20, 20)
    groups = find_coupling(model, torch.zeros(2, 8, 8)).groups
    ties = find_ties(groups, ["*.fc1"])
    tie = next(tie for tie in ties if len(tie) == 3)
    start = ParameterCount(model, groups).cost
    for seed, fraction in itertools.product(range(5), (0.95, 0.8, 0.6)):
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(group.width, generator=generator) for group in groups]
        costs = ParameterCount(model, groups)
        budget = int(fraction * start)
        pruned = select(costs, groups, scores, budget, Limits(1, 2, 0.9), ties=ties, end=End(closely=closely))
        counts = {len(pruned.get(position, ())) for position in tie}
        assert len(counts) == 1
        assert costs.cost <= budget
        for position in set(tie) & pruned.keys():
            count = len(pruned[position])
            assert torch.equal(pruned[position], scores[position].argsort()[:count].sort().values)


def test_the_mean_score_stands_for_a_bundle():
    model = transformer(4, 4, 4)
    groups = find_coupling(model, torch.zeros(2, 8, 8)).groups
    groups = [group for group in groups if group.name.endswith("fc1")]
    scores = [torch.tensor([1.0, 9, 9, 9]), torch.tensor([9.0, 9, 1, 9]), torch.tensor([4.0, 3, 9, 9])]
    cost = ParameterCount(model, groups).cost
    pruned = select(ParameterCount(model, groups), groups, scores, cost - 1, Limits(), ties=[(0, 1), (2,)])
    assert {p: n.tolist() for p, n in pruned.items()} == {0: [0], 1: [2]}  # mean of 1, before the 3
    scores[1][2] = 6.0
    pruned = select(ParameterCount(model, groups), groups, scores, cost - 1, Limits(), ties=[(0, 1), (2,)])
    assert {p: n.tolist() for p, n in pruned.items()} == {2: [1]}  # mean of 3.5, after the 3


def test_a_budget_of_predicted_loss_counts_all_tied_groups():
    model = transformer(6, 6)
    groups = [g for g in find_coupling(model, torch.zeros(2, 8, 8)).groups if g.name.endswith("fc1")]
    changes = [torch.arange(1.0, 7), torch.arange(1.0, 7)]
    for limit, removed in ((1.9, 0), (2.0, 1), (5.9, 1), (6.0, 2)):
        losses, costs = LossBudget(limit), ParameterCount(model, groups)
        pruned = select(costs, groups, changes, 0, Limits(), ties=[(0, 1)], changes=changes, losses=losses)
        assert losses.exceeded
        assert [len(pruned.get(p, ())) for p in (0, 1)] == [removed, removed]


def test_greedy_selection_ends_at_a_predicted_loss_in_lockstep():
    loop = Loop(transformer(12, 12), tie_widths=True)
    loop.train(3)
    groups, ties = loop.pruner.groups, loop.pruner.ties
    context = ScoringContext(loop.model, groups, loop.curvature)
    totals: list[float] = []
    for fraction in (None, 0.5, 0.05):
        limit = None if fraction is None else fraction * totals[0]
        joint, losses, costs = JointObs(context), LossBudget(limit), ParameterCount(loop.model, groups)
        pruned = select_greedily(costs, groups, joint, 0, Limits(), ties=ties, losses=losses)
        for tie in ties:
            assert len({len(pruned.get(position, ())) for position in tie}) == 1
        assert limit is None or joint.total <= limit
        totals.append(joint.total)
    assert totals[0] > totals[1] > totals[2] > 0.0


def test_the_smallest_cost_is_that_of_tied_groups():
    loop = Loop(transformer(24, 24), params=0.01, tie_widths=True, min_width=6)
    smallest = loop.pruner.reachable_params()
    with pytest.warns(UserWarning, match="out of reach"):
        loop.train()
    assert loop.pruner.params == smallest
    assert set(loop.widths("fc1")) == {6}
    assert set(loop.widths("qkv")) == {2}  # eight channels, since one head has less than six


def test_groups_that_lose_in_different_steps_take_a_common_one():
    groups = find_coupling(transformer(24, 24, heads=24), torch.zeros(2, 8, 8)).groups
    pair = [group for group in groups if group.name in ("blocks.0.qkv", "blocks.0.fc1")]
    limits = Limits(round_to=8)
    assert sorted(limits.step(group) for group in pair) == [2, 8]
    assert limits.step(*pair) == limits.floor(*pair) == 8
    costs = ParameterCount(transformer(24, 24, heads=24), pair)
    smallest_cost(costs, pair, limits, [(0, 1)])
    assert costs._widths == [8, 8]


def test_ties_outlast_a_resume():
    """Widths that meet by chance must not be tied by a pruner that is made of the pruned network."""
    whole = Loop(transformer(24, 24, 16), tie_widths=True)
    whole.train(20)
    first = Loop(transformer(24, 24, 16), tie_widths=True)
    first.train(10)
    state = {"pruner": first.pruner.state_dict(), "model": first.model.state_dict()}
    fresh = transformer(24, 24, 16)
    flatprune.take_tensors(fresh, state["model"], attributes=state["pruner"]["attributes"])
    again = Loop(fresh, tie_widths=True)
    again.pruner.ties[:] = [tuple(range(len(again.pruner.groups)))]
    again.pruner.load_state_dict(state["pruner"])
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.curvature.load_state_dict(first.curvature.state_dict())
    again.step = first.step
    assert again.pruner.ties == first.pruner.ties
    again.train(10)
    assert again.pruner.widths() == whole.pruner.widths()
    for mine, other in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(mine, other)


def test_keywords_as_example_inputs():
    class Keywords(Transformer):
        def forward(self, *, rows: Tensor) -> Tensor:
            return super().forward(rows)

    model, inputs = Keywords(20, 20), {"rows": torch.randn(2, 8, 8)}
    options = {"total_steps": 10, "tie_widths": True}
    pruner = flatprune.Pruner(model, None, flatprune.Curvature(model), inputs, target=flatprune.Target(0.5), **options)
    assert set(pruner.widths().values()) == {16, 6, 20}
    with pytest.raises(ValueError, match=r"has keywords \(rows\), a latency target needs positional ones"):
        target = flatprune.Target(latency=0.5)
        flatprune.Pruner(model, None, flatprune.Curvature(model), inputs, target=target, **options)
