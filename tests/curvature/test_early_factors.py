"""A and G that are made as a backward proceeds, in place of the inputs and gradients that it could not let go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from kfac_ext.curvature import updates


class Net(nn.Module):
    """Small factors beside large activations, a layer called twice, one whose factors are larger than what it sees."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.twice, self.grouped = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, groups=2)
        self.head = nn.Linear(96, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(self.grouped(x).flatten(1))


@pytest.fixture
def held(monkeypatch):
    """Layer -> sizes of the inputs that are held once its gradient has been taken down."""
    sizes = {}
    make_early = updates.make_early

    def noting(layer, capture, *rest):
        make_early(layer, capture, *rest)
        sizes[layer.name] = [x.numel() for x in capture._inputs[layer.name]]

    monkeypatch.setattr(updates, "make_early", noting)
    return sizes


def trained(mode, **options):
    """Factors after three steps of sums of losses over batches of which one counts for nothing."""
    torch.manual_seed(0)
    model = Net().double()
    curvature = Curvature(
        model, fisher_type="empirical", factor_update_steps=1, kfac_approx=mode, reduction="sum", **options
    )
    for step in range(4):
        x, y = torch.randn(9, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (9,))
        x[0, 0, 0, 0] = torch.nan if step == 2 else 1.0
        loss = F.cross_entropy(model(x), y, reduction="sum")
        model.zero_grad()
        loss.backward()
    return curvature


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("mode", ["expand", "reduce"])
def test_they_are_those_of_the_whole(held, mode):
    """Of one that watches for outliers, which has to see everything first."""
    early = trained(mode)
    assert held == {"first": [], "grouped": [], "twice": [9 * 4 * 36] * 2}  # not of the head, made with the output
    held.clear()
    late = trained(mode, outlier_factor=1e9)
    assert not held and early.left_out == late.left_out == {"output": 1}
    torch.testing.assert_close(early.factors.buffer, late.factors.buffer, rtol=1e-10, atol=1e-14)
    assert early.factors["first.A"].abs().max() > 0


def test_predictions_that_are_left_out_are_not_in_them(held):
    """The first layers would have counted them otherwise."""
    found = []
    for options in ({}, {"outlier_factor": 1e9}):
        torch.manual_seed(0)
        model = Net().double()
        curvature = Curvature(model, fisher_type="empirical", factor_update_steps=1, kfac_approx="expand", **options)
        y = torch.tensor([0, -100, 2, 1, 1, -100, 0, 2])
        F.cross_entropy(model(torch.randn(8, 3, 8, 8, dtype=torch.float64)), y).backward()
        found.append(curvature.factors.buffer)
    assert not held
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e200])
def test_a_gradient_that_is_not_finite_changes_nothing(held, bad):
    """Seen in a layer's own G, after those of other layers have been made."""
    torch.manual_seed(0)
    model = Net().double()
    curvature = Curvature(model, fisher_type="empirical", factor_update_steps=1, kfac_approx="expand")
    x, y = torch.randn(9, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (9,))
    F.cross_entropy(model(x), y).backward()
    before = curvature.factors.buffer.clone()
    hook = model.norm.register_forward_hook(lambda _m, _a, z: z.register_hook(lambda g: g * bad) and None)
    F.cross_entropy(model(x), y).backward()
    hook.remove()
    assert "grouped" in held and torch.equal(curvature.factors.buffer, before)
    assert list(curvature.left_out) == ["first"]
    F.cross_entropy(model(x), y).backward()
    assert not torch.equal(curvature.factors.buffer, before)
