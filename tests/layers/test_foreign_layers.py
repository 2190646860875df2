"""Layers with a forward of their own: their factors are those of what their operators see, or there are none."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_ext import Curvature
from kfac_ext.curvature.probing import fresh_predictions, observe
from kfac_ext.curvature.recent import Call
from tests.curvature import curvature_oracles
from tests.layers import foreign_layers


def found_and_expected(name, mode, fisher_type="empirical"):
    """(curvature after one step, A and G of each layer by loops over the plain network)."""
    model, plain, x, places = foreign_layers.make(name)
    torch.testing.assert_close(copy.deepcopy(model)(x), copy.deepcopy(plain)(x))
    curvature = Curvature(model, kfac_approx=mode, fisher_type=fisher_type)
    y = torch.randint(0, 3, (len(x),))
    F.cross_entropy(model(x), y).backward()
    modules = {key: tuple(plain.get_submodule(place) for place in both) for key, both in places.items()}
    inputs, grads = curvature_oracles.observe(plain, modules, x, curvature_oracles.cross_entropy_sum(y))
    expected = {}
    for key, (module, _z) in modules.items():
        constant = curvature.layers[key].constant
        expected[key] = curvature_oracles.factors(module, inputs[key], grads[key], mode, constant, len(x))
    return curvature, modules, expected


@pytest.mark.parametrize("mode", ["expand", "reduce"])
@pytest.mark.parametrize("name", foreign_layers.CASES)
def test_factors_are_those_of_the_operators(name, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature, modules, expected = found_and_expected(name, mode)
    assert list(curvature.layers) == list(expected)
    for key, (module, z_module) in modules.items():
        layer = curvature.layers[key]
        assert (layer.norm is not None) == (z_module is not module)
        assert layer.constant == (layer.bias is not None or layer.norm is not None)
        for factor, exact in zip((f"{key}.A", f"{key}.G"), expected[key]):
            found = curvature.factors[factor].view_as(exact)
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))


@pytest.mark.parametrize("name", foreign_layers.CASES)
def test_matrix_and_folded_weight_are_those_of_the_plain_layer(name):
    model, plain, x, places = foreign_layers.make(name)
    curvature, exact = Curvature(model), Curvature(plain, fold_norms=name != "norm_with_activation")
    curvature.trace(x)
    exact.trace(x)
    for key, (place, _) in places.items():
        layer, other = curvature.layers[key], exact.layers[place]
        assert torch.equal(layer.weight_matrix(), other.weight_matrix())
        assert torch.equal(layer.weight_like(layer.weight_matrix()), layer.weight)
        assert (layer.outputs, layer.inputs, layer.groups) == (other.outputs, other.inputs, other.groups)
        assert layer.weight_name in model.state_dict()
        d = layer.patch_size
        torch.testing.assert_close(layer.folded_weight()[:, :d], other.folded_weight()[:, :d])


def test_names_of_parameters_that_are_not_called_weight():
    model, _, x, _ = foreign_layers.make("attention")
    curvature = Curvature(model)
    curvature.trace(x)
    fused, out = list(curvature.layers.values())[:2]
    assert (fused.name, fused.weight_name, fused.bias_name) == (
        "0.in_proj_weight",
        "0.in_proj_weight",
        "0.in_proj_bias",
    )
    assert (out.name, out.weight_name, out.bias_name) == ("0.out_proj", "0.out_proj.weight", "0.out_proj.bias")
    curvature = Curvature(model, skip_layers=["in_proj"])
    curvature.trace(x)
    assert list(curvature.layers) == ["0.out_proj", "3"]


def test_the_base_of_an_adapter_has_factors_beside_it():
    model = nn.Sequential(foreign_layers.Adapted(4, 6), nn.Tanh(), nn.Linear(6, 3))
    curvature = Curvature(model)
    curvature.trace(torch.randn(5, 4))
    assert list(curvature.layers) == ["0", "0.down", "0.up", "2"]


class Used(nn.Module):
    """A Linear's parameters in a forward that is given."""

    def __init__(self, use):
        super().__init__()
        self.weight, self.bias, self.use = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4)), use

    def forward(self, x):
        return self.use(self, x)


REFUSED = {
    "view": (lambda m, x: F.linear(x, m.weight.view(4, 4)), "view takes its weight"),
    "turned besides": (lambda m, x: x @ m.weight.T + m.weight.T.sum(), "sum takes its weight too"),
    "computed": (lambda m, x: F.linear(x, m.weight * 2), "mul takes its weight"),
    "einsum": (lambda m, x: torch.einsum("ni,io->no", x, m.weight), "einsum takes its weight"),
    "left factor": (lambda m, x: (m.weight @ x.T).T, "matmul takes its weight"),
    "scaled": (lambda m, x: torch.addmm(m.bias, x, m.weight, alpha=2), "addmm takes its weight"),
    "two ways": (lambda m, x: F.linear(x, m.weight) + x @ m.weight, "multiplied in several ways"),
    "two biases": (lambda m, x: F.linear(F.linear(x, m.weight), m.weight, m.bias), "several biases"),
    "used besides": (lambda m, x: F.linear(x, m.weight) + m.weight.sum(), "sum takes its weight too"),
    "bias": (lambda m, x: F.linear(x, m.weight, m.bias * 2), "its bias is no parameter of its own"),
    "unused": (lambda m, x: x + m.bias, "no operator takes its weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_operator_takes_itself_is_named_with_the_reason(name):
    use, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(4, 4), Used(use), nn.Linear(4, 2))
    curvature = Curvature(model, factor_update_steps=1)
    with pytest.warns(UserWarning) as caught:
        model(torch.randn(5, 4))
    (message,) = [str(w.message) for w in caught]
    assert "no factors for '1' (Used: " in message and reason in message
    assert list(curvature.layers) == ["0", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(5, 4))


def test_a_forward_replaced_in_one_instance_is_foreign():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    plain, linear = copy.deepcopy(model), model[0]
    linear.forward = lambda x: F.linear(2 * x, linear.weight, linear.bias)
    curvature, x = Curvature(model), torch.randn(5, 4, dtype=torch.float64)
    model(x)
    expected = Curvature(plain)
    plain(2 * x)
    torch.testing.assert_close(curvature.factors["0.A"], expected.factors["0.A"])
    assert vars(linear)["forward"](x).shape == (5, 4)


def test_a_geometry_that_changes_is_an_error():
    class Dilated(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias, dilation=1 if len(x) == 1 else 2)

    model = nn.Sequential(Dilated(2, 3, 2), foreign_layers.Pooled(2, 3))
    curvature = Curvature(model, factor_update_steps=1)
    model(torch.randn(1, 2, 6, 6))
    with pytest.raises(ValueError, match=r"layer '0' is called with .*'dilation': \(2, 2\).*skip_layers"):
        model(torch.randn(2, 2, 6, 6))
    assert "forward" not in vars(model[0])
    curvature.remove()
    model(torch.randn(2, 2, 6, 6))


def test_a_depthwise_convolution_may_be_cut():
    model = nn.Sequential(foreign_layers.PaddedConv(4, 4, 2, groups=4), foreign_layers.Pooled(2, 3))
    curvature = Curvature(model, factor_update_steps=1)
    model(torch.randn(5, 4, 3, 3))
    module, kept = model[0], torch.tensor([0, 2])
    module.weight, module.bias = nn.Parameter(module.weight[kept]), nn.Parameter(module.bias[kept])
    module.groups = 2
    curvature.narrow({}, {"0.A": kept, "0.G": kept})
    model(torch.randn(5, 2, 3, 3))
    assert curvature.factors["0.A"].shape == (2, 5, 5)


def test_a_forward_that_fails_leaves_no_watch():
    def fail(_module, _x):
        raise KeyboardInterrupt

    model = nn.Sequential(Used(lambda m, x: F.linear(x, m.weight)), nn.Linear(4, 2))
    curvature = Curvature(model, factor_update_steps=1)
    model(torch.randn(5, 4))
    before = curvature.factors.buffer.clone()
    model[0].use = fail
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(5, 4))
    assert torch.overrides._get_current_function_mode_stack() == []
    curvature.remove()
    assert "forward" not in vars(model[0]) and torch.equal(curvature.factors.buffer, before)


def test_state_is_loaded_by_what_operators_saw():
    model, _, x, _ = foreign_layers.make("padded_depthwise")
    curvature = Curvature(model)
    model(x)
    file = io.BytesIO()
    torch.save(curvature.state_dict(), file)
    file.seek(0)
    other = Curvature(copy.deepcopy(model))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [a.state() == b.state() for a, b in zip(other.layers.values(), curvature.layers.values())] == [True] * 3
    other.model(x)
    assert torch.equal(other.factors.buffer, curvature.factors.buffer)
    plain = nn.Sequential(nn.Bilinear(4, 4, 2))
    state = curvature.state_dict()
    state["layers"] = {"0": {**state["layers"]["0"], "operator": None}}
    with pytest.raises(ValueError, match=r"'0' \(Bilinear\) is of no registered kind"):
        Curvature(plain).load_state_dict(state)


def test_running_statistics_of_foreign_norms_are_left_alone():
    model, _, x, _ = foreign_layers.make("norm_with_activation")
    curvature = Curvature(model)
    model(x)
    before = {key: value.clone() for key, value in model.named_buffers()}
    observe(curvature, x)
    fresh_predictions(curvature, [Call((x,), {})])
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
