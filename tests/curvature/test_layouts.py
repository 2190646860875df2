"""Samples in other places than the first dimension: found by sizes, by a trial, or given."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from kfac_ext import Curvature

KEYS = ("a.A", "a.G", "b.A", "b.G")


class Net(nn.Module):
    """[N, T, D] in, [N, 4] out; `layout` is what the layers between see."""

    def __init__(self, layout="first"):
        super().__init__()
        self.a, self.b, self.head, self.layout = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4), layout

    def forward(self, x):
        n, t, _ = x.shape
        if self.layout == "sequence":
            x = x.transpose(0, 1)
        elif self.layout == "rows":
            x = x.flatten(0, 1)
        elif self.layout == "rows of the sequence":
            x = x.transpose(0, 1).flatten(0, 1)
        elif self.layout == "windows":
            x = x.reshape(2 * n, t // 2, -1)
        elif self.layout == "images":
            x = x.reshape(n, 2, t // 2, -1)
        z = self.b(torch.tanh(self.a(x)))
        z = z.transpose(0, 1) if self.layout == "sequence" else z
        z = z.reshape(t, n, -1).transpose(0, 1) if self.layout == "rows of the sequence" else z.reshape(n, t, -1)
        return self.head(torch.tanh(z).mean(1))


def factors(layout, n, t, **options):
    torch.manual_seed(2)
    model = Net(layout).double()
    generator = torch.Generator().manual_seed(0)
    curvature = Curvature(model, factor_update_steps=1, generator=generator, **options)
    model(torch.randn(n, t, 6, dtype=torch.float64))
    return curvature


LAYOUTS = ("sequence", "rows", "rows of the sequence", "windows", "images")


@pytest.mark.filterwarnings("error:Curvature")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "t"), [(9, 4), (4, 4), (6, 12), (2, 4), (1, 6)])
@pytest.mark.parametrize("mode", ["reduce", "expand"])
def test_factors_are_the_same_wherever_the_samples_stand(layout, n, t, mode):
    expected, found = (factors(kind, n, t, kfac_approx=mode).factors for kind in ("first", layout))
    for key in KEYS:
        torch.testing.assert_close(found[key], expected[key])


def test_what_a_trial_has_told_is_kept():
    curvature = factors("sequence", 4, 4)
    assert curvature._layouts.found["a"].dim == 1
    other = Curvature(Net("sequence").double())
    other.load_state_dict(curvature.state_dict())
    assert other._layouts.found == curvature._layouts.found


class Routed(nn.Module):
    """A layer that sees a choice of all tokens, as experts do."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        chosen = x[..., 0] > 0
        moved = x.clone()
        moved[chosen] = self.a(x[chosen])
        return self.head(moved.mean(1))


def test_what_cannot_be_told_is_said_once_where_it_matters():
    torch.manual_seed(0)
    x = torch.randn(7, 5, 6)
    with pytest.warns(UserWarning, match=r"which rows of what 'a' see belong .*layer_batch_dims.*'expand'"):
        curvature = Curvature(Routed(), factor_update_steps=1)
        curvature.model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature.model(x)
        Curvature(Routed(), kfac_approx="expand").model(x)


@pytest.mark.filterwarnings("error:Curvature. it cannot be told")
@pytest.mark.parametrize("t", [4, 6])
def test_attention_over_the_first_dimension(t):
    """`nn.TransformerEncoder` as it comes; its way to run fast in evaluation mode calls none of its layers."""

    class Encoder(nn.Module):
        def __init__(self, first):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=first)
            self.body, self.head, self.first = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3), first

        def forward(self, x):
            x = self.body(x if self.first else x.transpose(0, 1))
            return self.head(x.mean(1 if self.first else 0))

    found, x = [], torch.randn(4, t, 8, dtype=torch.float64)
    for first in (True, False):
        torch.manual_seed(0)
        curvature = Curvature(Encoder(first).double(), generator=torch.Generator().manual_seed(0))
        curvature.model(x)
        found.append(curvature.factors.buffer)
    torch.testing.assert_close(*found)


def test_dimensions_can_be_given():
    expected = factors("first", 4, 4)
    found = factors("sequence", 4, 4, layer_batch_dims={"^[ab]$": 1})
    for key in KEYS:
        torch.testing.assert_close(found.factors[key], expected.factors[key])
    wrong = factors("sequence", 4, 4, layer_batch_dims={"^a$": 0})
    assert not torch.allclose(wrong.factors["a.A"], expected.factors["a.A"])


def test_a_whole_model_can_be_sequence_first():
    class Whole(Net):
        def forward(self, x):  # [T, N, D] in and out
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    torch.manual_seed(0)
    model, x = Whole().double(), torch.randn(5, 7, 6, dtype=torch.float64)
    found = []
    for inputs, options in ((x, {"batch_dim": 1}), (x.transpose(0, 1), {})):
        curvature = Curvature(model, **options, generator=torch.Generator().manual_seed(0))
        model(inputs)
        curvature.remove()
        assert curvature.recent_calls[0].samples == 7
        found.append(curvature.factors["a.A"])
    torch.testing.assert_close(*found)
