"""The functions of docs/recipes.md, against the libraries that they are for where these are installed."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kfac_ext

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
N = 6


@pytest.fixture(scope="module")
def recipes():
    """The functions that the page defines, by name."""
    found = {}
    for block in re.findall(r"```python\n(def .*?)```", PAGE.read_text(), flags=re.S):
        exec(block, found)
    return found


def network():
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, (1, 2), bias=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))


def measured():
    """A network in float64 and a batch, with the factors of its mean loss."""
    torch.manual_seed(0)
    model = network().double()
    x, y = torch.randn(N, 2, 5, 7, dtype=torch.float64), torch.arange(N) % 3
    curvature = kfac_ext.Curvature(model, fisher_type="empirical", kfac_approx="expand", fold_norms=False)
    F.cross_entropy(model(x), y).backward()
    return curvature, model, x, y


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("separate", [False, True])
def test_factors_for_curvlinops(recipes, reduction, separate):
    curvlinops = pytest.importorskip("curvlinops")
    curvature, model, x, y = measured()
    params, loss = list(model.parameters()), nn.CrossEntropyLoss(reduction=reduction)
    made = {"fisher_type": "empirical", "separate_weight_and_bias": separate, "check_deterministic": False}
    theirs, ours = (curvlinops.KFACLinearOperator(model, loss, params, [(x, y)], **made) for _ in range(2))
    theirs.compute_kronecker_factors()
    recipes["into_curvlinops"](curvature, ours, N)
    for found, expected in (
        (ours._input_covariances, theirs._input_covariances),
        (ours._gradient_covariances, theirs._gradient_covariances),
    ):
        assert set(found) == set(expected) == {"0", "2", "5", "7"}
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    vector = [torch.randn_like(p) for p in params]
    for found, expected in zip(ours @ vector, theirs @ vector, strict=True):
        torch.testing.assert_close(found, expected)
    inverse = [curvlinops.KFACInverseLinearOperator(operator, damping=1e-2) @ vector for operator in (ours, theirs)]
    for found, expected in zip(*inverse, strict=True):
        torch.testing.assert_close(found, expected)


def by_their_formula(layer, a, g):
    """kfac-pytorch 0.4: rows of patches and of gradients, both divided by the positions, over the number of rows."""
    positions = 1
    if isinstance(layer, nn.Conv2d):
        positions = g[0, 0].numel()
        a = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2).flatten(0, 1)
        g = g.flatten(2).transpose(1, 2).flatten(0, 1)
    if layer.bias is not None:
        a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    a, g = a / positions, g / positions
    return a.T @ a / len(a), g.T @ g / len(g)


def by_their_code(layer, a, g):
    modules = pytest.importorskip("kfac.layers.modules", reason="kfac-pytorch is not installed")
    kind = modules.Conv2dModuleHelper if isinstance(layer, nn.Conv2d) else modules.LinearModuleHelper
    return kind(layer).get_a_factor(a.detach()), kind(layer).get_g_factor(g)


@pytest.mark.parametrize("factors_of", [by_their_formula, by_their_code])
def test_factors_for_kfac_pytorch(recipes, factors_of):
    curvature, model, x, y = measured()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _layer, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with curvature.paused():
        loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    for (name, (a, output)), g in zip(seen.items(), gradients, strict=True):
        found = recipes["as_kfac_pytorch"](curvature, name, N, output[0, 0].numel())
        torch.testing.assert_close(found, factors_of(layers[name], a, g), msg=lambda text, name=name: f"{name}: {text}")
