"""Sizes of networks, layer by layer."""

import re

import pytest
import torch
from torch import nn

import flatprune
from flatprune.inspection import LayerSize
from flatprune.models import multiply_accumulates, parameter_count


class Residual(nn.Module):
    """A layer called twice, one by its weight alone, a weight shared, and products that belong to no layer."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(4, width, bias=False)
        self.head.weight = self.first.weight

    def forward(self, x):
        h = self.body(self.body(self.first(x)))
        return (h @ h.mT) @ h + self.head(x)


def test_each_module_counts_what_is_its_own():
    model, x = Residual(), torch.randn(2, 5, 4)
    found = {layer.name: layer for layer in flatprune.summary(model, x).layers}
    assert found["first"] == LayerSize("first", "Linear", 6, 30, 2 * 5 * 24)
    assert found["body.0"] == LayerSize("body.0", "Linear", 6, 42, 2 * 2 * 5 * 36)
    assert found["head"] == LayerSize("head", "Linear", 6, 0, 2 * 5 * 24)  # its weight counts where it came first
    assert found[""] == LayerSize("", "Residual", None, 0, 2 * 2 * 5 * 5 * 6)
    assert set(found) == {"", "first", "body.0", "head"}


def test_the_sums_are_those_of_the_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).train()
    x = torch.randn(2, 3, 8, 8)
    found = flatprune.summary(model, x)
    assert (found.params, found.macs) == (parameter_count(model), multiply_accumulates(model, x))
    assert found.latency > 0 and all(module.training for module in model.modules())


def test_before_and_after_stand_side_by_side():
    dense = flatprune.summary(Residual(6), torch.randn(2, 5, 4))
    text = str(flatprune.summary(Residual(3), torch.randn(2, 5, 4), before=dense))
    line = next(line for line in text.splitlines() if line.startswith("first"))
    assert re.split(r"\s{2,}", line) == ["first", "Linear", "6 -> 3", "30 -> 15", "240 -> 120"]
    assert "all" in text and text.splitlines()[-1].startswith("latency")


def test_keywords_and_bad_inputs():
    model = nn.Linear(3, 2)
    assert flatprune.summary(model, {"input": torch.randn(4, 3)}).macs == 24
    with pytest.raises(TypeError, match="example_inputs"):
        flatprune.summary(model, None)
    with pytest.raises(TypeError, match="before is 3"):
        flatprune.summary(model, torch.randn(4, 3), before=3)


def test_the_width_of_a_transposed_convolution_is_what_it_makes():
    (layer,) = flatprune.summary(nn.ConvTranspose2d(3, 8, 2), torch.randn(1, 3, 4, 4)).layers
    assert layer.width == 8
