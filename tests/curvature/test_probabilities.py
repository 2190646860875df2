"""Outputs that are probabilities where the loss is of logits: said once, by name, and what mends it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from kfac_ext import Curvature


def net(*after, outputs=3, bias=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs), *after).double()
    nn.init.constant_(model[2].bias, bias)
    return model


def warned(model, steps=8, **options):
    """What is said in some steps of training, as many numbers as there were warnings."""
    said, curvature = [], Curvature(model, factor_update_steps=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            model(torch.randn(9, 6, dtype=torch.float64))
            said += [(step, str(warning.message)) for warning in caught]
            caught.clear()
    assert curvature.step_count == steps
    return said


class Clamped(nn.Module):
    """Probabilities that no operator's name gives away."""

    def forward(self, x):
        return x.clamp(-1, 1) / 2 + 0.5


class Shares(nn.Module):
    """The same for classes."""

    def forward(self, x):
        return x.exp() / x.exp().sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("loss", "after", "step"),
    [
        ("bce", [nn.Sigmoid()], 0),
        ("bce", [nn.Sigmoid(), nn.Unflatten(1, (3, 1))], 0),
        ("bce", [Clamped()], 4),
        (nn.BCEWithLogitsLoss(), [nn.Sigmoid()], 0),
        ("cross_entropy", [nn.Softmax(1)], 0),
        ("cross_entropy", [Shares()], 4),
        (nn.CrossEntropyLoss(), [nn.Softmax(1)], 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
def test_probabilities_are_told_once(loss, after, step, fisher_type):
    ((found, message),) = warned(net(*after), loss=loss, fisher_type=fisher_type)
    name, inverse = ("cross_entropy", "torch.log,") if "ross" in str(loss) else ("bce", "torch.logit,")
    assert found == step and f"loss='{name}' expects logits" in message and f"output={inverse}" in message


@pytest.mark.parametrize(
    ("loss", "after"),
    [
        ("bce", []),
        ("cross_entropy", []),
        ("cross_entropy", [nn.LogSoftmax(1)]),
        ("cross_entropy", [nn.Sigmoid()]),
        ("mse", [nn.Sigmoid()]),
        ("poisson_nll", [nn.Softmax(1)]),
    ],
    ids=str,
)
def test_what_the_loss_expects_is_not_told_of(loss, after):
    assert not warned(net(*after), loss=loss)


def test_logits_may_look_like_probabilities_for_a_while():
    """All lie between 0 and 1 in four updates; then some do not."""
    model = net(outputs=1, bias=0.5)
    nn.init.zeros_(model[2].weight)
    curvature = Curvature(model, factor_update_steps=1, loss="bce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            nn.init.constant_(model[2].bias, 1.5 if step == 4 else 0.5)
            model(torch.randn(9, 6, dtype=torch.float64))
    assert curvature.step_count == 12


def test_of_several_outputs_the_place_is_told():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(outputs=5)

        def forward(self, x):
            z = self.net(x)
            return z[:, :3], z[:, 3:].sigmoid()

    ((step, message),) = warned(Two(), loss=["cross_entropy", "bce"], output=[0, 1])
    assert step == 0 and "loss[1]='bce' expects logits" in message


@pytest.mark.parametrize(
    ("loss", "activation", "output"), [("bce", nn.Sigmoid(), torch.logit), ("cross_entropy", nn.Softmax(1), torch.log)]
)
def test_what_the_warning_names_mends_it(loss, activation, output):
    """G is that of the network without its last module."""
    x, options = torch.randn(9, 6, dtype=torch.float64), {"loss": loss, "factor_update_steps": 1}
    plain, curvatures = net(), []
    for model, more in ((plain, {}), (net(activation), {"output": output})):
        curvatures.append(Curvature(model, generator=torch.Generator().manual_seed(1), **options, **more))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    for key in ("0.G", "2.G"):
        torch.testing.assert_close(curvatures[1].factors[key], curvatures[0].factors[key], rtol=1e-6, atol=1e-12)
