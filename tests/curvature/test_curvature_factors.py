"""Factors against loops over samples and positions; when and how they are updated."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd

from kfac_ext import Curvature, FactorSet
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.losses import loss_of
from kfac_ext.curvature.modes import undisturbed
from kfac_ext.curvature.probing import fresh_look
from tests.curvature import curvature_nets, curvature_oracles

NORMS = {
    "mlp_norm": {"0": "1"},
    "residual": {"first": "norm"},
    "conv_norm_depthwise": {"0": "1", "4": "5"},
    **{name: {"0": "1"} for name in curvature_nets.NETS if name.startswith("sequence_conv")},
    **{name: {"2": "3"} for name in curvature_nets.NETS if name.startswith(("transposed", "volumes"))},
    "volumes_called_twice": {},
}


def oracle_layers(model, name):
    """name -> (module, the module whose output is z), from the table above and not from the package."""
    modules = dict(model.named_modules())
    norms = NORMS.get(name, {})
    return {
        key: (module, modules[norms.get(key, key)])
        for key, module in modules.items()
        if isinstance(module, (nn.Linear, _ConvNd))
    }


def assert_factors(curvature, reference, x, name, mode, summed_loss, tolerance=1e-12):
    layers = oracle_layers(reference, name)
    inputs, grads = curvature_oracles.observe(reference, layers, x, summed_loss)
    assert set(curvature.layers) == set(layers)
    with torch.no_grad():
        predictions = loss_of("cross_entropy").terms(reference(x))
    for key, (module, z_module) in layers.items():
        constant = module.bias is not None or z_module is not module
        A, G = curvature_oracles.factors(module, inputs[key], grads[key], mode, constant, predictions)
        for factor, expected in ((f"{key}.A", A), (f"{key}.G", G)):
            found = curvature.factors[factor].view_as(expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["reduce", "expand"])
@pytest.mark.parametrize("name", ["residual", "conv_called_twice"])
def test_an_update_is_one_call_for_all_layers(name, mode, monkeypatch):
    calls, accumulate = [], FactorSet.accumulate_

    def spy(factors, updates):
        updates = list(updates)
        calls.append({update.key for update in updates})
        accumulate(factors, updates)

    monkeypatch.setattr(FactorSet, "accumulate_", spy)
    model, x = curvature_nets.make(name)
    curvature = Curvature(model, kfac_approx=mode, factor_update_steps=2)
    for _ in range(3):
        model(x)
    assert calls == [set(curvature.factors)] * 2


@pytest.mark.parametrize("mode", ["reduce", "expand"])
@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_true_fisher_equals_loops(name, mode):
    model, x = curvature_nets.make(name)
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    curvature = Curvature(model, kfac_approx=mode, generator=generator)
    output = model(x)
    targets = loss_of("cross_entropy").draw(output, Draws(torch.Generator().manual_seed(3)))
    assert_factors(curvature, reference, x, name, mode, curvature_oracles.cross_entropy_sum(targets))


@pytest.mark.parametrize("mode", ["reduce", "expand"])
@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_empirical_fisher_equals_loops(name, mode):
    model, x = curvature_nets.make(name)
    reference = copy.deepcopy(model)
    curvature = Curvature(model, kfac_approx=mode, fisher_type="empirical")
    output = model(x)
    y = torch.randint(0, 3, (len(x), *output.shape[2:]))
    assert not curvature.is_updated
    F.cross_entropy(output, y).backward()
    assert_factors(curvature, reference, x, name, mode, curvature_oracles.cross_entropy_sum(y))


def test_layers_are_in_forward_order_with_their_norms():
    for name, norms in NORMS.items():
        model, x = curvature_nets.make(name)
        curvature = Curvature(model)
        curvature.trace(x[:1])
        assert {key: layer.norm_name for key, layer in curvature.layers.items() if layer.norm} == norms
        assert all(
            layer.norm is model.get_submodule(layer.norm_name) for layer in curvature.layers.values() if layer.norm
        )
    model, x = curvature_nets.make("residual")
    model.forward = lambda x: model.head(torch.relu(model.second(model.first(x))).mean(dim=(2, 3)))
    curvature = Curvature(model)
    curvature.trace(x)
    assert list(curvature.layers) == ["first", "second", "head"]


def test_factors_take_no_memory_before_the_first_update():
    model, x = curvature_nets.make("mlp")
    curvature, other = Curvature(model), Curvature(copy.deepcopy(model))
    curvature.trace(x)
    state = curvature.state_dict()
    assert state["factors"] is None and state["layers"]
    other.load_state_dict(state)
    assert not other.is_updated and other.state_dict()["factors"] is None
    for watched in (curvature, other):
        watched.generator.manual_seed(0)
        watched.model(x)
    assert torch.equal(curvature.factors.buffer, other.factors.buffer) and bool(curvature.factors.buffer.any())


def test_an_inplace_relu_before_the_norm_is_not_overlooked():
    # relu_ returns the very tensor that the convolution made
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 2))
    curvature = Curvature(model)
    curvature.trace(torch.randn(5, 3))
    assert curvature.layers["0"].norm is None


def test_mean_squared_error_estimates_the_gauss_newton_factor():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(20000, 3, dtype=torch.float64)
    curvature = Curvature(model, loss="mse", generator=torch.Generator().manual_seed(0))
    model(x)
    torch.testing.assert_close(curvature.factors[".G"], torch.eye(4, dtype=torch.float64) * 2 / 4, rtol=0, atol=0.02)


def test_sampled_labels_follow_the_prediction():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).repeat(200_000, 1)
    drawn = (
        loss_of("cross_entropy").draw(logits, Draws(torch.Generator().manual_seed(1))).bincount(minlength=4) / 200_000
    )
    torch.testing.assert_close(drawn, logits[0].softmax(0), rtol=0, atol=5e-3)


def test_running_average_and_update_steps():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, factor_update_steps=3, factor_decay=0.9)
    batches = [torch.randn_like(x) for _ in range(7)]
    expected = None
    for step, batch in enumerate(batches):
        model(batch)
        rows = torch.cat([batch, torch.ones(5, 1, dtype=torch.float64)], dim=1)
        value = rows.T @ rows / 5
        if step % 3 == 0:
            expected = value if expected is None else 0.9 * expected + 0.1 * value
        torch.testing.assert_close(curvature.factors["0.A"], expected)
    assert curvature.step_count == 7


def test_callables_of_the_step():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, factor_update_steps=lambda step: 1 + step, factor_decay=lambda step: 0.0)
    for _ in range(3):
        model(x)
        model(torch.zeros_like(x))
    rows = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(curvature.factors["0.A"], rows.T @ rows / 5)  # updated at step 0 only


def test_half_precision_is_accumulated_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    x = torch.randn(64, 8)
    curvature = Curvature(model, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    assert curvature.factors["0.G"].dtype == torch.float32
    rows = torch.cat([x, torch.ones(64, 1)], dim=1)
    torch.testing.assert_close(curvature.factors["0.A"], rows.T @ rows / 64)


def test_forwards_of_moved_weights_leave_no_casts_of_them():
    model, x = nn.Linear(8, 6), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        kept = model.weight.detach().clone()
        with undisturbed(model), torch.no_grad():
            model.weight.zero_()
            inside = model(x)
            model.weight.copy_(kept)
        after = model(x)
    torch.testing.assert_close(inside, model.bias.bfloat16().expand(4, 6))
    assert torch.equal(after, before) and after.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["conv_same", "conv_circular", "conv_grouped", "sequence_conv", "transposed"])
def test_bfloat16_convolutions_keep_float32_factors(name, autocast):
    """Their error is that of the inputs, not that of factors kept in bfloat16."""
    model, x = curvature_nets.make(name, dtype=torch.float32)
    exact, exact_x = copy.deepcopy(model).double(), x.double()
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
        exact, exact_x = copy.deepcopy(model).double(), x.double()
    found, wanted = (Curvature(net, generator=torch.Generator().manual_seed(0)) for net in (model, exact))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(x)
    exact(exact_x)
    assert output.dtype == torch.bfloat16
    assert found.factors.buffer.dtype == torch.float32
    first = next(iter(found.layers))  # its input is exact, so its A must be as exact as float32
    torch.testing.assert_close(found.factors[f"{first}.A"].double(), wanted.factors[f"{first}.A"], rtol=1e-5, atol=1e-6)


def test_output_that_is_not_finite_leaves_the_factors():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, factor_update_steps=1)
    model(x)
    before = curvature.factors.buffer.clone()
    with pytest.warns(UserWarning, match="not finite"):
        model(x * float("inf"))
    assert torch.equal(curvature.factors.buffer, before)


def test_empirical_gradient_scale_and_missing_backward():
    model, x = curvature_nets.make("mlp")
    y = torch.tensor([0, 1, 2, 0, 1])
    plain = Curvature(model, fisher_type="empirical", factor_update_steps=1)
    model(x)  # no backward: nothing is taken
    F.cross_entropy(model(x), y).backward()
    plain.remove()
    scaled = Curvature(model, fisher_type="empirical", factor_update_steps=1, grad_scale=lambda: 1024.0)
    (F.cross_entropy(model(x), y) * 1024).backward()
    torch.testing.assert_close(scaled.factors.buffer, plain.factors.buffer)


def test_radii_are_products_of_top_eigenvalues():
    for name in ("mlp", "conv_norm_depthwise"):
        model, x = curvature_nets.make(name)
        curvature = Curvature(model, factor_update_steps=1, factor_decay=0.99)
        for _ in range(60):  # the same batch: warm starts add up
            model(x)
        radii = curvature.spectral_radii()
        for key, value in radii.items():
            A, G = curvature.factors[f"{key}.A"], curvature.factors[f"{key}.G"]
            expected = (curvature_oracles.top_eigenvalue(A) * curvature_oracles.top_eigenvalue(G)).max()
            assert value.shape == ()
            torch.testing.assert_close(value, expected, rtol=1e-2, atol=0)
        values = torch.stack(list(radii.values()))
        assert curvature.spectral_radius() == pytest.approx(float(values.max()))
        assert curvature.geometric_mean_radius() == pytest.approx(float(values.prod() ** (1 / len(values))))


@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_folded_weight_gives_z(name):
    model, x = curvature_nets.make(name)
    curvature = Curvature(model)
    curvature.trace(x)
    model.eval()
    layers = oracle_layers(model, name)
    inputs, outputs = {}, {}
    for key, (module, z_module) in layers.items():
        module.register_forward_pre_hook(lambda _m, args, key=key: inputs.__setitem__(key, args[0]))
        z_module.register_forward_hook(lambda _m, _a, out, key=key: outputs.__setitem__(key, out.clone()))
    model(x)
    for key, (module, _z_module) in layers.items():
        rows = curvature_oracles.input_rows(module, inputs[key])
        expected = curvature_oracles.gradient_rows(module, outputs[key])
        V, groups = curvature.folded_weight(key), getattr(module, "groups", 1)
        d = rows.shape[-1] // groups
        parts = [rows[..., g * d : (g + 1) * d] @ block[:, :d].T for g, block in enumerate(V.chunk(groups))]
        z = torch.cat(parts, dim=-1)
        z = z + V[:, d] if curvature.layers[key].constant else z
        torch.testing.assert_close(z, expected)


def test_fresh_look():
    model, x = curvature_nets.make("conv_norm_depthwise")
    curvature = Curvature(model)
    for part in (x[:2], x[2:]):
        model(part)
    assert torch.equal(torch.cat([call.args[0] for call in curvature.recent_calls]), x)
    buffers, rng = {k: v.clone() for k, v in model.named_buffers()}, torch.get_rng_state()
    factors = curvature.factors.buffer.clone()
    for training in (True, False):
        model.train(training)
        fresh, predictions = fresh_look(curvature, ["4", "9"], curvature.recent_calls, mode="expand")
        assert model.training is training and model[1].training is training
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(curvature.factors.buffer, factors)
    with torch.no_grad():
        model.train()
        seen = torch.cat([model[:4](part) for part in (x[:2], x[2:])])  # each call with its own batch statistics
        for found, part in zip(predictions, (x[:2], x[2:]), strict=True):
            torch.testing.assert_close(found, model(part))
    rows = curvature_oracles.input_rows(model[4], seen).flatten(0, 1)
    for channel in range(4):
        a = torch.cat([rows[:, channel * 9 : channel * 9 + 9], torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(fresh["4"][channel], a.T @ a / len(a))
    assert fresh["9"].shape == (5, 5)
    with pytest.raises(KeyError, match="no layer named 'x'"):
        fresh_look(curvature, ["x"], curvature.recent_calls)


def test_recent_calls_hold_256_samples():
    model, _ = curvature_nets.make("mlp")
    curvature = Curvature(model)
    for _ in range(9):
        model(torch.randn(100, 4, dtype=torch.float64))
    assert [call.samples for call in curvature.recent_calls] == [100, 100, 100]
    assert not any(call.args[0].requires_grad for call in curvature.recent_calls)


@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_no_network_of_these_tests_is_degenerate(name):
    """A crop that leaves nothing of the input, say, would let every comparison above pass on zeros."""
    model, x = curvature_nets.make(name)
    output = model(x)
    F.cross_entropy(output, torch.zeros(len(x), *output.shape[2:], dtype=torch.long)).backward()
    matrices = {key: p.grad for key, p in model.named_parameters() if p.dim() > 1}
    assert all(bool(grad.count_nonzero()) for grad in matrices.values()), matrices.keys()
