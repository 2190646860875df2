"""The flatness term: its gradient, when it acts, what it survives."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatprune.flatness import spectrum
from flatprune.flatness.spectrum import Flatness, hessian_lambda_max
from kfac_ext import Curvature
from kfac_ext.curvature.draws import Draws
from kfac_ext.curvature.fisher import projected_inputs
from kfac_ext.curvature.losses import loss_of
from kfac_ext.curvature.probing import observe
from tests.curvature import curvature_nets, curvature_oracles


def zs(curvature):
    return {name: (layer.module, layer.norm or layer.module) for name, layer in curvature.layers.items()}


def mean_log_radius(model, layers, constants, x, targets, mode):
    """(1/B) sum log rho of this batch's own factors, from loops and dense eigenvalues."""
    loss = curvature_oracles.cross_entropy_sum(targets)
    inputs, grads = curvature_oracles.observe(model, layers, x, loss)
    total = 0.0
    for name, (module, _z_module) in layers.items():
        count = targets.numel()
        A, G = curvature_oracles.factors(module, inputs[name], grads[name], mode, constants[name], count)
        radius = (curvature_oracles.top_eigenvalue(A) * curvature_oracles.top_eigenvalue(G)).max()
        total += float(radius.log()) / len(layers)
    return total


@pytest.mark.parametrize("mode", ["reduce", "expand"])
@pytest.mark.parametrize(
    "name",
    ["mlp", "mlp_norm", "sequence", "called_twice", "segmenter", "conv_norm_depthwise", "conv_circular", "volumes"],
)
def test_double_backward_gradient_equals_finite_differences(name, mode):
    model, x = curvature_nets.make(name)
    twin = copy.deepcopy(model)
    curvature = Curvature(model, kfac_approx=mode, generator=torch.Generator().manual_seed(2))
    flatness = Flatness(curvature, start=0, every=1, strength=1.0, kappa=0.0, mode="double_backward", fade_below=0)
    output = model(x)
    targets = loss_of("cross_entropy").draw(output, Draws(torch.Generator().manual_seed(2)))  # those of the update
    curvature.factors.power_iteration_(tol=1e-13, max_iter=20_000)
    loss = F.cross_entropy(output, targets)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(
        flatness.penalty(x, output, loss), parameters, materialize_grads=True, allow_unused=True
    )

    layers = {key: (twin.get_submodule(key), twin.get_submodule(layer.norm_name or key))
              for key, layer in curvature.layers.items()}  # fmt: skip
    constants = {key: layer.constant for key, layer in curvature.layers.items()}
    length = float(torch.cat([g.flatten() for g in grads]).norm())
    step, generator = 1e-5, torch.Generator().manual_seed(5)
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        for sign in (1, -1):
            for p, q, d in zip(twin.parameters(), parameters, directions):
                p.data = q.data + sign * step * d
            values.append(mean_log_radius(twin, layers, constants, x, targets, mode))
        expected = loss.item() * (values[0] - values[1]) / (2 * step)
        found = float(sum((g * d).sum() for g, d in zip(grads, directions)))
        assert abs(found - expected) < 1e-6 * max(abs(expected), length)


def test_forward_mode_is_unbiased(monkeypatch):
    monkeypatch.setattr(spectrum, "_STEP_SIZE", 1e-4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 2])
    curvature = Curvature(model, factor_update_steps=1000)
    flatness = Flatness(curvature, start=0, every=1, strength=1.0, kappa=0.0, fade_below=0)
    parameters = list(model.parameters())
    queue: list[torch.Tensor] = []
    monkeypatch.setattr(curvature.draws, "signs", lambda shape, like: queue.pop(0))
    total, grads, count = 0.0, [0.0] * 4, 0
    for signs in itertools.product([-1.0, 1.0], repeat=4):  # two samples, two blocks: all there are
        queue[:] = torch.tensor(signs, dtype=torch.float64).view(2, 2).unbind()
        output = model(x)
        loss = F.cross_entropy(output, y)
        value = flatness.penalty(x, output, loss)
        total, count = total + value.item(), count + 1
        grads = [a + b for a, b in zip(grads, torch.autograd.grad(value, parameters))]

    (W, b), (V, c) = ((model[i].weight, model[i].bias) for i in (0, 2))
    hidden = torch.tanh(x @ W.T + b)
    p = (hidden @ V.T + c).softmax(1)
    expected = 0.0
    for name, jacobian in (("0", lambda s: (s * (1 - hidden**2)) @ V.T), ("2", lambda s: s.expand(2, 3))):
        t = jacobian(curvature.factors.vector(f"{name}.G"))
        variance = ((p * t**2).sum(1) - (p * t).sum(1) ** 2).mean()
        expected = expected + variance / (2 * curvature.factors.eigenvalue(f"{name}.G"))
    u = curvature.factors.vector("2.A")
    expected = expected + ((hidden @ u[:4] + u[4]) ** 2).mean() / (2 * curvature.factors.eigenvalue("2.A"))
    expected = expected * loss.detach()
    assert total / count == pytest.approx(expected.item(), rel=1e-4)
    # the first layer's own (u.a)^2 is a constant and is left out
    for found, exact in zip(grads, torch.autograd.grad(expected, parameters, allow_unused=True)):
        torch.testing.assert_close(found / count, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
@pytest.mark.parametrize("approx", ["reduce", "expand"])
@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_every_kind_of_layer(name, approx, mode):
    model, x = curvature_nets.make(name)
    curvature = Curvature(model, kfac_approx=approx, factor_update_steps=3)
    flatness = Flatness(curvature, start=0, every=1, mode=mode)
    for _ in range(3):  # also on steps without an update of the factors
        output = model(x)
        y = torch.zeros(len(x), *output.shape[2:], dtype=torch.long)
        loss = F.cross_entropy(output, y)
        value = flatness.penalty(x, output, loss)
        model.zero_grad()
        (loss + value).backward()
        assert value.item() > 0 and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", list(curvature_nets.NETS))
def test_mean_projection_is_the_mean_over_positions_and_calls(name):
    model, x = curvature_nets.make(name)
    curvature = Curvature(model)
    capture = observe(curvature, x)
    for layer in curvature.layers.values():
        inputs = [a.detach().double().requires_grad_() for a in capture.inputs(layer.name)]
        unit = torch.randn(layer.groups, layer.patch_size + layer.constant, dtype=torch.float64)
        rows = [projected_inputs(layer, [a], unit, "expand").view(len(a), -1, layer.groups) for a in inputs]
        expected, found = torch.cat(rows, dim=1).mean(dim=1), projected_inputs(layer, inputs, unit, "reduce")
        torch.testing.assert_close(found, expected)
        for values in zip(*(torch.autograd.grad(v.square().sum(), inputs) for v in (found, expected))):
            torch.testing.assert_close(*values)


def penalties(flatness, model, x, steps, y=None):
    values = []
    for _ in range(steps):
        output = model(x)
        loss = F.cross_entropy(output, torch.zeros(len(x), dtype=torch.long) if y is None else y)
        values.append(flatness.penalty(x, output, loss))
    return values


def test_steps_on_which_it_acts():
    model, x = curvature_nets.make("mlp")
    flatness = Flatness(Curvature(model), total_steps=50, start=0.1, every=4)
    values = [value.item() for value in penalties(flatness, model, x, 15)]
    assert [i for i, value in enumerate(values) if value != 0] == [5, 9, 13]
    by_hand = Flatness(Curvature(model), start=1000, every=4)
    penalties(by_hand, model, x, 3)
    by_hand.end_warmup()
    assert [v.item() != 0 for v in penalties(by_hand, model, x, 5)] == [True, False, False, False, True]


def test_the_scale_is_the_first_finite_loss():
    model, x = curvature_nets.make("mlp")
    flatness = Flatness(Curvature(model), start=2, every=3, strength=0.1, fade_below=0)
    for value in (float("nan"), 2.0, 10.0, 0.0):
        flatness.penalty(x, model(x), torch.tensor(value))
    assert float(flatness._weight()) == pytest.approx(0.1 * 3 * 2.0)
    other = Flatness(flatness.curvature, start=2, every=3, strength=0.1, fade_below=0)
    other.load_state_dict(flatness.state_dict())
    other.penalty(x, model(x), torch.tensor(5.0))
    assert float(other._weight()) == float(flatness._weight())


def test_how_often_differs_for_convolutions():
    for name, every in (("mlp", 4), ("conv_grouped", 8)):
        model, x = curvature_nets.make(name)
        curvature = Curvature(model)
        curvature.trace(x)
        assert Flatness(curvature, start=0).every == every
        assert Flatness(curvature, start=0, every=3).every == 3


def test_blocks_below_their_floor_are_left_alone():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model)
    flatness = Flatness(curvature, start=0, every=1, kappa=2.0)
    assert penalties(flatness, model, x, 1)[0].item() == 0
    flatness.floors["2"] /= 100
    assert [block.layer.name for block in flatness._blocks()] == ["2"]
    assert penalties(flatness, model, x, 1)[0].item() > 0
    never = Flatness(curvature, start=0)
    never.end_warmup()
    assert all(float(floor) > 0 for floor in never.floors.values())  # a dead block is not pressed on


def test_fades_with_the_size_of_the_network():
    model, x = curvature_nets.make("mlp")
    flatness = Flatness(Curvature(model), start=0)
    penalties(flatness, model, x, 1)
    full = float(flatness._weight())
    for part, fraction in ((0.05, 1.0), (0.0375, 0.5), (0.025, 0.0), (0.01, 0.0)):
        flatness._full_size = flatness._size() / part
        assert float(flatness._weight()) == pytest.approx(fraction * full)


@pytest.mark.parametrize("approx", ["reduce", "expand"])
def test_dropout_masks_are_those_of_the_users_forward(approx, monkeypatch):
    # another mask would change the output by something that does not vanish with the step
    monkeypatch.setattr(spectrum, "_STEP_SIZE", 1e-7)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3)).double()
    flatness = Flatness(Curvature(model, kfac_approx=approx), start=0, every=1)
    x = torch.randn(32, 4, dtype=torch.float64)
    assert all(0 < value.item() < 10 for value in penalties(flatness, model, x, 3))
    output = model(x).clone()  # not the tensor the model returned: the forward is repeated
    assert 0 < flatness.penalty(x, output, F.cross_entropy(output, torch.zeros(32, dtype=torch.long))).item() < 10


def test_repeated_forward_gives_the_same_value():
    model, x = curvature_nets.make("conv_norm_depthwise")
    values = []
    for detour in (lambda output: output, torch.clone):
        curvature = Curvature(copy.deepcopy(model), generator=torch.Generator().manual_seed(1))
        output = detour(curvature.model(x))
        loss = F.cross_entropy(output, torch.zeros(5, dtype=torch.long))
        flatness = Flatness(curvature, start=0)
        curvature.generator.manual_seed(9)
        values.append(flatness.penalty(x, output, loss).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_autocast_penalty_is_computed_in_full_precision():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(64, 8)
    values = []
    for enabled in (False, True):
        curvature = Curvature(copy.deepcopy(model), factor_update_steps=1000)
        curvature.model(x)
        flatness = Flatness(curvature, start=0)
        curvature.generator.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = curvature.model(x)
            loss = F.cross_entropy(output, torch.zeros(64, dtype=torch.long))
            values.append(flatness.penalty(x, output, loss).item() / loss.item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)


def test_accumulated_gradients_add_up():
    model, x = curvature_nets.make("mlp")
    curvature = Curvature(model, factor_update_steps=100)
    flatness = Flatness(curvature, start=0, every=1, mode="double_backward")
    parameters, expected = list(model.parameters()), None
    for part in (x[:3], x[3:]):
        output = model(part)
        loss = F.cross_entropy(output, torch.zeros(len(part), dtype=torch.long))
        total = (loss + flatness.penalty(part, output, loss)) / 2
        grads = torch.autograd.grad(total, parameters, retain_graph=True)
        expected = grads if expected is None else [a + b for a, b in zip(expected, grads)]
        total.backward()
    for p, grad in zip(parameters, expected):
        torch.testing.assert_close(p.grad, grad)


def test_empirical_factors_do_not_contain_the_penalty():
    model, x = curvature_nets.make("mlp")
    twin = copy.deepcopy(model)
    y = torch.tensor([0, 1, 2, 0, 1])
    plain = Curvature(twin, fisher_type="empirical", factor_update_steps=1)
    curvature = Curvature(model, fisher_type="empirical", factor_update_steps=1)
    flatness = Flatness(curvature, start=0, every=1, strength=10.0)
    for _ in range(2):
        F.cross_entropy(twin(x), y).backward()
        output = model(x)
        loss = F.cross_entropy(output, y)
        value = flatness.penalty(x, output, loss)
        assert value.item() > 0
        (loss + value).backward()
    torch.testing.assert_close(curvature.factors.buffer, plain.factors.buffer)


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_survives_a_removal(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)).double()
    x = torch.randn(16, 4, dtype=torch.float64)
    curvature = Curvature(model, factor_update_steps=5)
    flatness = Flatness(curvature, start=0, every=1, mode=mode, kappa=0.0)
    penalties(flatness, model, x, 2)
    keep = torch.tensor([1, 3, 4])
    for parameter, data in (
        (model[0].weight, model[0].weight.data[keep]),
        (model[0].bias, model[0].bias.data[keep]),
        (model[2].weight, model[2].weight.data[:, keep]),
    ):
        parameter.data = data
    model[0].weight, model[0].bias, model[2].weight = (
        nn.Parameter(p.data) for p in (model[0].weight, model[0].bias, model[2].weight)
    )
    curvature.narrow({"0.G": keep, "2.A": torch.tensor([1, 3, 4, 6])})
    for value in penalties(flatness, model, x, 5):
        assert value.item() > 0 and value.isfinite()
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)


def test_bad_arguments_name_the_argument():
    model, _ = curvature_nets.make("mlp")
    curvature = Curvature(model)
    for options, name in (
        ({"mode": "exact"}, "mode"),
        ({"every": 0, "start": 0}, "every"),
        ({"strength": -1.0}, "strength"),
        ({"strength": None}, "strength is None"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"kappa": -1.0}, "kappa"),
        ({}, "total_steps"),
        ({"total_steps": 10, "start": 1.5}, "start"),
    ):
        with pytest.raises(ValueError, match=name):
            Flatness(curvature, **options)


def test_the_penalty_flattens():
    digits = load_digits()
    x, y = torch.tensor(digits.data[:500] / 16, dtype=torch.float32), torch.tensor(digits.target[:500])
    found = {}
    for strength in (0.0, 0.02):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(inplace=True), nn.Linear(32, 10))
        curvature = Curvature(model, generator=torch.Generator().manual_seed(0))
        flatness = Flatness(curvature, total_steps=200, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        order = torch.Generator().manual_seed(0)
        for _ in range(200):
            index = torch.randint(0, 500, (64,), generator=order)
            optimizer.zero_grad()
            output = model(x[index])
            loss = F.cross_entropy(output, y[index])
            (loss + flatness.penalty(x[index], output, loss)).backward()
            optimizer.step()
        found[strength] = hessian_lambda_max(model, x, y, nn.CrossEntropyLoss()), curvature.geometric_mean_radius()
    assert found[0.02][0] < 0.6 * found[0.0][0]
    assert found[0.02][1] < 0.6 * found[0.0][1]


class _Attends(nn.Module):
    """Attention with layers of its own for queries, keys and values, by `scaled_dot_product_attention`."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0]).mean(1)


def attending(backend, approx):
    """Gradients of the penalty on a step of which the factors are known, and the forwards that it took."""
    torch.manual_seed(1)
    model, x, y = _Attends().double(), torch.randn(6, 5, 4, dtype=torch.float64), torch.arange(6) % 4
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    curvature = Curvature(model, kfac_approx=approx, generator=torch.Generator().manual_seed(3))
    flatness = Flatness(curvature, start=0, every=1, strength=1.0, kappa=0.0, mode="double_backward")
    curvature.trace(x)
    calls.clear()
    with sdpa_kernel(backend):
        output = model(x)
    curvature.generator.manual_seed(9)  # the labels of a repeated forward are those of the first
    capture = curvature.recorder.record
    capture.targets = None
    penalty = flatness.penalty(x, output, F.cross_entropy(output, y))
    return torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True), len(calls)


@pytest.mark.parametrize("approx", ["reduce", "expand"])
def test_double_backward_goes_through_fused_attention(approx):
    """It has no second derivative: the forward is repeated with the one written out, and the gradient is the same."""
    exact, forwards = attending(SDPBackend.MATH, approx)
    assert forwards == 1  # the recorded one
    found, forwards = attending([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], approx)
    assert forwards == 2
    for a, b in zip(found, exact):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_blocks_that_are_rounding_are_left_alone(mode):
    """Keys in a softmax have no gradient when it is summed over positions: their radius is rounding, its log noise."""
    torch.manual_seed(1)
    model, x, y = _Attends(), torch.randn(32, 5, 4), torch.arange(32) % 4
    curvature = Curvature(model, kfac_approx="reduce", factor_update_steps=1)
    flatness = Flatness(curvature, start=0, every=1, kappa=0.0, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        output = model(x)
        loss = F.cross_entropy(output, y)
        penalty = flatness.penalty(x, output, loss)
        optimizer.zero_grad()
        (loss + penalty).backward()
        assert float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()) < 10
        optimizer.step()
    radii = {name: float(rho) for name, rho in curvature.spectral_radii().items()}
    assert radii["key"] < 1e-10 * max(radii.values())
    rest = [rho for name, rho in radii.items() if name != "key"]
    assert curvature.geometric_mean_radius() == pytest.approx(math.prod(rest) ** (1 / 3), rel=1e-5)


class _TakesADict(nn.Module):
    """Of one argument, a dict whose keys are no names of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, batch):
        return self.net(batch["x"])


def test_the_penalty_is_of_the_call_that_was_made():
    """Whatever the loop gives for its inputs; where the forward is repeated, a dict is read as the model takes it."""
    values = []
    for give, same in ((lambda x: {"x": x}, True), (lambda x: {"x": x}, False), (lambda x: {"x": 0 * x}, True)):
        torch.manual_seed(1)
        model, x = _TakesADict(), torch.randn(16, 4)
        flatness = Flatness(Curvature(model, generator=torch.Generator().manual_seed(0)), start=0, every=1)
        output = model({"x": x})
        loss = F.cross_entropy(output, torch.arange(16) % 3)
        values.append(flatness.penalty(give(x), output if same else output.clone(), loss).item())
    assert values[0] > 0 and values == pytest.approx([values[0]] * 3)


def test_forwards_that_nothing_has_seen_are_told_of():
    """At once, and as an error where the term should begin; nothing is said of a forward that counts."""
    model, x = curvature_nets.make("mlp")
    flatness = Flatness(Curvature(model), total_steps=30)
    outputs = model.eval()(x)
    loss = outputs.square().mean()
    with pytest.warns(UserWarning, match="Flatness: the term cannot begin, .* calls in evaluation mode") as said:
        for _ in range(3):
            flatness.penalty(x, outputs, loss)
    assert len(said) == 1 and flatness.step_count == flatness.warmup_steps == 3
    with pytest.raises(RuntimeError, match="Flatness: the term cannot begin"):
        flatness.penalty(x, outputs, loss)
    assert flatness.step_count == 3
    outputs = model.train()(x)
    assert float(flatness.penalty(x, outputs, outputs.square().mean())) != 0.0
