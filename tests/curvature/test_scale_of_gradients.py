"""The table of docs/losses.md, a test a row: A and G against float64 gradients of each sample, taken one by one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.losses import loss_of

N, T, C = 12, 3, 4


class Tokens(nn.Module):
    """Predictions for each token, [N, T, C], from that token alone."""

    def __init__(self, outputs=C):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x)))


def of_samples(model, x, term):
    """A row of gradients at z for each row of x, and A and G of both layers: sums over rows, one by one, over D.

    `term(output, row)`: what the terms of one row add up to, in D times the mean loss; None: it does not count.
    """
    model, found = copy.deepcopy(model), {"hidden": [[], []], "head": [[], []]}
    rows = x.reshape(-1, x.shape[-1])
    for number, row in enumerate(rows):
        hidden = model.hidden(row)
        features = torch.tanh(hidden)
        output = model.head(features)
        value = term(output, number)
        if value is None:
            continue
        grads = torch.autograd.grad(value, [hidden, output])
        for name, a, g in zip(found, (row, features), grads):
            found[name][0].append(torch.cat([a.detach(), torch.ones(1, dtype=a.dtype)]))
            found[name][1].append(g)
    return {name: tuple(torch.stack(part) for part in both) for name, both in found.items()}


def assert_factors(curvature, rows, terms):
    for name, (a, g) in rows.items():
        torch.testing.assert_close(curvature.factors[f"{name}.A"], a.T @ a / len(a))
        torch.testing.assert_close(curvature.factors[f"{name}.G"], g.T @ g / terms)


def make(outputs=C, tokens=True):
    torch.manual_seed(0)
    model = Tokens(outputs).double()
    return model, torch.randn(*((N, T) if tokens else (N,)), 5, dtype=torch.float64)


def watch(model, **options):
    return Curvature(model, kfac_approx="expand", fisher_type="empirical", factor_update_steps=1, **options)


def labels(x, ignored=()):
    y = torch.randint(0, C, x.shape[:-1], generator=torch.Generator().manual_seed(1))
    y.view(-1)[list(ignored)] = -100
    return y


IGNORED = (0, 4, 5, 30, 33, 34, 35)  # rows, among them all of the last sample


def nll(y):
    return lambda output, row: None if y.view(-1)[row] < 0 else F.cross_entropy(output, y.view(-1)[row])


@pytest.mark.parametrize("ignored", [(), IGNORED])
def test_mean_of_cross_entropy(ignored):
    model, x = make()
    y = labels(x, ignored)
    curvature = watch(model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    assert_factors(curvature, of_samples(model, x, nll(y)), N * T - len(ignored))


@pytest.mark.parametrize("ignored", [(), IGNORED])
def test_sum_of_cross_entropy(ignored):
    model, x = make()
    y = labels(x, ignored)
    curvature = watch(model, reduction="sum")
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    assert_factors(curvature, of_samples(model, x, nll(y)), N * T - len(ignored))


def test_accumulation_of_means_of_parts():
    model, x = make()
    y, parts = labels(x, IGNORED), 3
    curvature = watch(model, grad_scale=1 / parts)
    expected = None
    for inputs, targets in zip(x.chunk(parts), y.chunk(parts)):
        (F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / parts).backward()
        g = of_samples(model, inputs, nll(targets))["head"][1]
        new = g.T @ g / len(g)
        expected = new if expected is None else 0.95 * expected + 0.05 * new
        torch.testing.assert_close(curvature.factors["head.G"], expected)


def test_accumulation_by_the_tokens_of_all_parts():
    model, x = make()
    y = labels(x, IGNORED)
    total = int((y >= 0).sum())
    curvature = watch(model, reduction="sum", grad_scale=lambda: 1 / total)
    part = slice(0, 5)
    (F.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten(), reduction="sum") / total).backward()
    rows = of_samples(model, x[part], nll(y[part]))
    assert_factors(curvature, rows, len(rows["head"][1]))


def test_a_scaled_loss():
    model, x = make()
    y = labels(x)
    curvature = watch(model, grad_scale=lambda: 1024.0)
    (1024 * F.cross_entropy(model(x).flatten(0, 1), y.flatten())).backward()
    assert_factors(curvature, of_samples(model, x, nll(y)), N * T)


@pytest.mark.parametrize("ignored", [(), IGNORED])
def test_weights_of_classes_are_those_of_the_mean(ignored):
    model, x = make()
    y, weight = labels(x, ignored), torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    curvature = watch(model, loss=nn.CrossEntropyLoss(weight))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), weight).backward()
    counted = y.flatten()[y.flatten() >= 0]
    share = len(counted) / weight[counted].sum()

    def term(output, row):
        label = y.flatten()[row]
        return None if label < 0 else share * weight[label] * F.cross_entropy(output, label)

    assert_factors(curvature, of_samples(model, x, term), len(counted))


def test_smoothed_labels():
    model, x = make()
    y = labels(x, IGNORED)
    curvature = watch(model, loss=nn.CrossEntropyLoss(label_smoothing=0.1))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(), label_smoothing=0.1).backward()

    def term(output, row):
        label = y.flatten()[row]
        return None if label < 0 else F.cross_entropy(output, label, label_smoothing=0.1)

    assert_factors(curvature, of_samples(model, x, term), N * T - len(IGNORED))


def test_soft_targets():
    model, x = make()
    y = torch.rand(N, T, C, dtype=torch.float64).softmax(-1)
    curvature = watch(model)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten(0, 1)).backward()
    assert_factors(curvature, of_samples(model, x, lambda out, row: F.cross_entropy(out, y.flatten(0, 1)[row])), N * T)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_binary_labels(outputs, reduction):
    model, x = make(outputs, tokens=False)
    y = torch.randint(0, 2, (N, outputs)).double()
    curvature = watch(model, loss=nn.BCEWithLogitsLoss(reduction=reduction))
    F.binary_cross_entropy_with_logits(model(x), y, reduction=reduction).backward()

    def term(output, row):
        return F.binary_cross_entropy_with_logits(output, y[row], reduction="sum")

    assert_factors(curvature, of_samples(model, x, term), N * outputs)


def test_binary_labels_that_are_left_out():
    model, x = make(3, tokens=False)
    y, kept = torch.randint(0, 2, (N, 3)).double(), torch.rand(N, 3) < 0.6
    kept[2] = False
    curvature = watch(model, loss="bce")
    losses = F.binary_cross_entropy_with_logits(model(x), y, reduction="none")
    losses[kept].mean().backward()

    def term(output, row):
        own = F.binary_cross_entropy_with_logits(output, y[row], reduction="none")
        return own[kept[row]].sum() if kept[row].any() else None

    assert_factors(curvature, of_samples(model, x, term), int(kept.sum()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_squared_errors_are_a_mean_within_a_sample(reduction):
    model, x = make(3, tokens=False)
    y = torch.randn(N, 3, dtype=torch.float64)
    curvature = watch(model, loss="mse", reduction=reduction)
    F.mse_loss(model(x), y, reduction=reduction).backward()
    assert_factors(curvature, of_samples(model, x, lambda output, row: F.mse_loss(output, y[row])), N)


@pytest.mark.parametrize("log_input", [True, False])
def test_counts(log_input):
    model, x = make(3, tokens=False)
    model.head.bias.data += 3.0  # rates are positive
    y = torch.poisson(torch.full((N, 3), 2.0, dtype=torch.float64))
    curvature = watch(model, loss=nn.PoissonNLLLoss(log_input=log_input))
    F.poisson_nll_loss(model(x), y, log_input=log_input).backward()

    def term(output, row):
        return F.poisson_nll_loss(output, y[row], log_input=log_input, reduction="sum")

    assert_factors(curvature, of_samples(model, x, term), N * 3)


def test_means_and_variances():
    model, x = make(4, tokens=False)
    y = torch.randn(N, 2, dtype=torch.float64)
    pick = lambda out: (out[..., :2], out[..., 2:].exp())  # noqa: E731
    curvature = watch(model, loss=nn.GaussianNLLLoss(), output=pick)
    mean, variance = pick(model(x))
    F.gaussian_nll_loss(mean, y, variance).backward()

    def term(output, row):
        mean, variance = pick(output)
        return F.gaussian_nll_loss(mean, y[row], variance, reduction="sum")

    assert_factors(curvature, of_samples(model, x, term), N * 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_other_loss_is_over_samples(reduction):
    model, x = make(tokens=False)
    y = labels(x)
    curvature = watch(model, loss=nn.MultiMarginLoss(reduction=reduction))
    F.multi_margin_loss(model(x), y, reduction=reduction).backward()
    assert_factors(curvature, of_samples(model, x, lambda output, row: F.multi_margin_loss(output, y[row])), N)


def test_samples_of_a_list_are_those_that_layers_see():
    """Detectors take a list of images, whose first dimension is none of samples."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, images):
            maps = self.head(torch.stack(images))
            return {"boxes": maps.abs().mean(), "classes": maps.square().mean()}

    torch.manual_seed(0)
    model, images = Detector().double(), [torch.randn(3, 2, 2, dtype=torch.float64) for _ in range(5)]
    curvature = watch(model, loss="other")
    sum(model(images).values()).backward()
    maps = torch.stack([model.head(image) for image in images]).detach()
    g = 5 * ((maps.sign() + 2 * maps) / maps.numel()).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(curvature.factors["head.G"], g.T @ g / 5)


DRAWN = {  # what is drawn, and a term for it, of outputs [C]
    "cross_entropy": lambda out, y: F.cross_entropy(out, y),
    "bce": lambda out, y: F.binary_cross_entropy_with_logits(out, y, reduction="sum"),
    "mse": lambda out, y: F.mse_loss(out, y),
    "poisson_nll": lambda out, y: F.poisson_nll_loss(out, y, reduction="sum"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_labels(name):
    model, x = make(tokens=False)
    curvature = Curvature(model, loss=name, generator=torch.Generator().manual_seed(3))
    output = model(x)
    loss = loss_of(name)
    y = loss.draw(output, Draws(torch.Generator().manual_seed(3)))
    rows = of_samples(model, x, lambda out, row: DRAWN[name](out, y[row]))
    assert_factors(curvature, rows, loss.terms(output))


EXACT = {  # the Hessian of a term at the output f, and terms a sample
    "cross_entropy": (lambda f: torch.diag(f.softmax(0)) - torch.outer(f.softmax(0), f.softmax(0)), 1),
    "bce": (lambda f: torch.diag(f.sigmoid() * (1 - f.sigmoid())), 3),
    "mse": (lambda f: torch.eye(3, dtype=f.dtype) * 2 / 3, 1),
    "poisson_nll": (lambda f: torch.diag(f.exp()), 3),
}


@pytest.mark.parametrize("name", EXACT)
def test_drawn_labels_estimate_the_hessian_of_the_mean_loss(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(60_000, 4, dtype=torch.float64) / 2
    curvature = Curvature(model, loss=name, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = torch.stack([EXACT[name][0](f) for f in model(x[:4000])]).mean(0) / EXACT[name][1]
    model(x)
    torch.testing.assert_close(curvature.factors[".G"], exact, rtol=0.04, atol=0.01)


def test_drawn_values_estimate_the_fisher_of_gaussians():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x = torch.randn(60_000, 4, dtype=torch.float64) / 2
    pick = lambda out: (out[:, 0], out[:, 1].exp())  # noqa: E731
    curvature = Curvature(model, loss="gaussian_nll", output=pick, generator=torch.Generator().manual_seed(0))
    variance = pick(model(x).detach())[1]
    exact = torch.diag(torch.stack([(1 / variance).mean(), torch.tensor(0.5, dtype=torch.float64)]))  # v^2 / (2 v^2)
    torch.testing.assert_close(curvature.factors[".G"], exact, rtol=0.04, atol=0.02)


def test_several_outputs_add_up():
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()
    x = torch.randn(40_000, 4, dtype=torch.float64) / 2
    pick = lambda out: (out[:, :3], out[:, 3:])  # noqa: E731
    curvature = Curvature(model, loss=["cross_entropy", "bce"], output=pick, generator=torch.Generator().manual_seed(0))
    model(x)
    with torch.no_grad():
        parts = [pick(f[None]) for f in model(x[:4000])]
        first = torch.stack([EXACT["cross_entropy"][0](a[0]) for a, _ in parts]).mean(0)
        second = torch.stack([EXACT["bce"][0](b[0]) for _, b in parts]).mean(0) / 2
    exact = torch.block_diag(first, second)
    torch.testing.assert_close(curvature.factors[".G"], exact, rtol=0.05, atol=0.01)
