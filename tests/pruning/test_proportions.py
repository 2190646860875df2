"""Groups that keep their proportions: each loses the same part of its neurons, the lowest ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import flatprune
from flatprune import find_coupling
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.limits import Limits
from flatprune.pruning.selection import select, select_greedily
from flatprune.pruning.ties import find_ties
from tests.pruning.test_saved_models import NETWORKS, Training
from tests.pruning.test_selection import Fixed
from tests.pruning.test_tied_widths import Loop, transformer

LIMITS = Limits(1, 1, 0.9)


class SqueezeExcite(nn.Module):
    """Channels that are weighed by means of theirs, and a product of activations: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "size", "attention"),
    [
        (NETWORKS["encoder"], (8, 8), True),
        (NETWORKS["heads"], (8, 8), True),
        (lambda: transformer(12, 8), (8, 8), True),
        (NETWORKS["convolutions"], (8, 8), False),
        (NETWORKS["recurrent"], (8, 8), False),
        (SqueezeExcite, (3, 8, 8), False),
    ],
    ids=["encoder", "explicit", "sdpa", "convolutions", "recurrent", "squeeze-excite"],
)
def test_networks_with_attention_are_told(model, size, attention):
    assert find_coupling(model().eval(), torch.randn(2, *size)).attention == attention


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.35])
@pytest.mark.parametrize("tied", [False, True])
def test_each_group_loses_the_same_part(fraction, greedy, tied):
    model = transformer(24, 24, heads=12)
    groups = find_coupling(model, torch.zeros(2, 8, 8)).groups
    ties = find_ties(groups, tied)
    generator = torch.Generator().manual_seed(0)
    scores = [10.0**p * torch.rand(group.width, generator=generator).double() for p, group in enumerate(groups)]
    costs, whole = ParameterCount(model, groups), [group.width for group in groups]
    budget, prices = fraction * costs.cost, costs.neuron_costs()
    if greedy:
        joint = Fixed([score * price for score, price in zip(scores, prices)])
        pruned = select_greedily(costs, groups, joint, budget, LIMITS, ties=ties, whole=whole)
    else:
        pruned = select(costs, groups, scores, budget, LIMITS, ties=ties, whole=whole)
    parts = [len(pruned.get(position, ())) / group.width for position, group in enumerate(groups)]
    assert max(parts) - min(parts) <= 1 / 12 and costs.cost <= budget and max(parts) > 0
    for position, neurons in pruned.items():
        assert neurons.tolist() == sorted(scores[position].argsort()[: len(neurons)].tolist())


def test_later_events_count_from_the_whole_widths():
    model = transformer(24, 12)
    groups = find_coupling(model, torch.zeros(2, 8, 8)).groups
    whole = [4 * group.width if group.name == "blocks.0.fc1" else group.width for group in groups]
    costs, scores = ParameterCount(model, groups), [torch.zeros(group.width).double() for group in groups]
    pruned = select(costs, groups, scores, 0.7 * costs.cost, LIMITS, whole=whole)
    assert len(pruned) == 4 and [group.name for group in groups].index("blocks.0.fc1") not in pruned


@pytest.mark.parametrize(("asked", "kept"), [("auto", True), (True, True), (False, False)])
def test_a_transformer_keeps_its_proportions(asked, kept):
    loop = Loop(transformer(40, 40, heads=6), params=0.3, keep_proportions=asked, criterion="random")
    start = loop.pruner.widths()
    loop.train()
    parts = [width / start[name] for name, width in loop.pruner.widths().items()]
    assert loop.pruner.keep_proportions == kept
    assert (max(parts) - min(parts) <= 1.01 / 6) == kept


def test_proportions_go_on_after_a_resume():
    options = {"params": 0.15, "min_width": 1}
    torch.manual_seed(3)
    whole = Training(NETWORKS["encoder"](), **options).train(4)
    state = copy.deepcopy(whole.state())
    assert 1 in state["pruner"]["widths"].values()  # the last head of a layer, which a new search does not see as one
    whole.train(2)
    again = Training.resumed(NETWORKS["encoder"](), state, **options).train(2)
    assert again.pruner.widths() == whole.pruner.widths() and again.pruner.keep_proportions
    assert [r.neurons for r in again.pruner.history] == [r.neurons for r in whole.pruner.history]
    with pytest.raises(ValueError, match=r"keep_proportions is True in the state, expected False"):
        Training.resumed(NETWORKS["encoder"](), state, **options, keep_proportions=False)


@pytest.mark.parametrize("value", [2.0, "on", None])
def test_what_is_no_choice_is_refused(value):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"Pruner: keep_proportions is .*, expected 'auto', True or False"):
        flatprune.Pruner(
            model,
            None,
            flatprune.Curvature(model),
            torch.zeros(2, 4),
            target=flatprune.Target(0.5),
            total_steps=10,
            keep_proportions=value,
        )
