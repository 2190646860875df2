"""The largest Hessian eigenvalue against dense Hessians in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatprune import models
from flatprune.flatness.hessian import (
    _lanczos,
    _power,
    hessian_eigenvalues,
    hessian_lambda_max,
    loss_along_top_eigenvector,
)
from tests.curvature import curvature_nets, curvature_oracles

EXACT = {"iterations": 300, "tol": 1e-9}
POWER = {"method": "power", "iterations": 5000, "tol": 1e-7}


def dense_eigenvalues(model, x, y):
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    hessian = curvature_oracles.dense_hessian(loss, list(model.parameters()))
    return torch.linalg.eigvalsh(hessian).flip(0).tolist()


def dense_lambda_max(model, x, y):
    return dense_eigenvalues(model, x, y)[0]


@pytest.mark.parametrize("name", ["mlp", "sequence", "called_twice", "conv_grouped"])
def test_equals_the_dense_hessian(name):
    model, x = curvature_nets.make(name)
    y = torch.tensor([0, 1, 2, 0, 1])
    expected = dense_lambda_max(copy.deepcopy(model).eval(), x, y)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(expected, rel=1e-7)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, batch_size=2, **EXACT) == pytest.approx(expected, rel=1e-7)
    generator = torch.Generator().manual_seed(8)
    found = hessian_lambda_max(model, x, y, F.cross_entropy, generator=generator)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["mlp", "conv_grouped", "mlp_norm"])
def test_power_iteration_equals_the_dense_hessian(name):
    model, x = curvature_nets.make(name)
    y = torch.tensor([0, 1, 2, 0, 1])
    twin = folded_by_hand(model) if name == "mlp_norm" else copy.deepcopy(model).eval()
    expected = functional_lambda_max(twin, x, y)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **POWER) == pytest.approx(expected, rel=1e-6)


def functional_lambda_max(model, x, y):
    """By torch.func, forward over reverse, parameter by parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = torch.func.hessian(lambda values: F.cross_entropy(functional_call(model, values, (x,)), y))(parameters)
    sizes = {name: p.numel() for name, p in parameters.items()}
    rows = [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in sizes], dim=1) for a in sizes]
    return float(torch.linalg.eigvalsh(torch.cat(rows))[-1])


@pytest.mark.parametrize("name", ["mlp", "conv_grouped"])
def test_the_largest_eigenvalues_equal_the_dense_hessians(name):
    model, x = curvature_nets.make(name)
    y = torch.tensor([0, 1, 2, 0, 1])
    expected = dense_eigenvalues(copy.deepcopy(model).eval(), x, y)[:5]
    found = hessian_eigenvalues(model, x, y, F.cross_entropy, k=5, **EXACT)
    assert found == pytest.approx(expected, rel=1e-7)


def test_no_eigenvalue_is_found_twice():
    diagonal = torch.logspace(-6, 6, 200, dtype=torch.float64)
    start = torch.ones(200, dtype=torch.float64)
    found = _lanczos(lambda v: diagonal * v, start, 20, 200, 1e-9)[0]
    assert found == pytest.approx(diagonal.flip(0)[:20].tolist(), rel=1e-6)


def folded_by_hand(model):
    """The same function in eval mode without batch norms, which are put into the layers' weights and biases."""
    modules = []
    for module in copy.deepcopy(model).eval():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            before = modules[-1]
            scale = module.weight.data / (module.running_var + module.eps).sqrt()
            shift = module.bias.data - module.running_mean * scale
            bias = 0 if before.bias is None else before.bias.data
            before.weight.data = before.weight.data * scale.view(-1, *[1] * (before.weight.dim() - 1))
            before.bias = nn.Parameter(scale * bias + shift)
        else:
            modules.append(module)
    return nn.Sequential(*modules)


@pytest.mark.parametrize("name", ["mlp_norm", "conv_norm_depthwise"])
def test_batch_norms_are_folded(name):
    model, x = curvature_nets.make(name)
    y = torch.tensor([0, 1, 2, 0, 1])
    twin = folded_by_hand(model)
    torch.testing.assert_close(twin(x), copy.deepcopy(model).eval()(x))
    expected = dense_lambda_max(twin, x, y)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(expected, rel=1e-7)


def test_scaling_a_weight_under_a_batch_norm_changes_nothing():
    model, x = curvature_nets.make("conv_norm_depthwise")
    y = torch.tensor([0, 1, 2, 0, 1])
    before = hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT)
    model[0].weight.data *= 10
    model[1].running_mean *= 10
    model[1].running_var.mul_(100).add_(99 * model[1].eps)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(before, rel=1e-7)


def test_batch_norm_without_an_affine_map():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2))
    model.double()
    model[1].running_mean.uniform_(-1, 1)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    scale = 1 / (model[1].running_var + model[1].eps).sqrt()
    plain[0].weight.data = model[0].weight.data * scale[:, None]
    plain[0].bias = nn.Parameter(-model[1].running_mean * scale, requires_grad=False)  # constant, no parameter
    plain[2].load_state_dict(model[3].state_dict())
    expected = hessian_lambda_max(plain, x, y, F.cross_entropy, **EXACT)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(expected, rel=1e-7)


def test_algebraic_maximum_and_early_end():
    diagonal = torch.tensor([-5.0, 1.0, 2.0], dtype=torch.float64)
    start = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    assert _lanczos(lambda v: diagonal * v, start, 1, 10, 1e-12)[0] == pytest.approx([2.0])
    assert _lanczos(lambda v: 0 * v, start, 1, 10, 1e-12)[0] == [0]
    assert _power(lambda v: diagonal * v, start, 200, 1e-12) == pytest.approx(2.0)  # -5 dominates, and is shifted away
    assert _power(lambda v: 0 * v, start, 10, 1e-12) == 0
    assert _power(lambda v: -diagonal * v, start, 3, 1e-12) < 5.0  # cut short: less, never more


def test_the_model_is_left_as_it_was():
    model, x = curvature_nets.make("conv_norm_depthwise")
    y = torch.tensor([0, 1, 2, 0, 1])
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        hessian_lambda_max(model, x, y, F.cross_entropy, iterations=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and all(p.grad is None for p in model.parameters())


def test_bad_arguments():
    model, x = curvature_nets.make("mlp")
    with pytest.raises(ValueError, match="5 inputs and 4 targets"):
        hessian_lambda_max(model, x, torch.zeros(4, dtype=torch.long), F.cross_entropy)
    with pytest.raises(ValueError, match="method is 'qr', expected 'lanczos' or 'power'"):
        hessian_lambda_max(model, x, torch.zeros(5, dtype=torch.long), F.cross_entropy, method="qr")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        hessian_lambda_max(model, x, torch.zeros(5, dtype=torch.long), F.cross_entropy)
    with pytest.raises(ValueError, match="k is 0, expected 1 to 100"):
        hessian_eigenvalues(model, x, y=torch.zeros(5, dtype=torch.long), criterion=F.cross_entropy, k=0)


def test_fewer_distinct_eigenvalues_than_asked_for():
    model, x = nn.Linear(1, 2, bias=False).double(), torch.ones(4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="k is 3, but only 2"):
        hessian_eigenvalues(model, x, torch.tensor([0, 1, 1, 1]), F.cross_entropy, k=3)


def test_attention_has_a_second_derivative():
    """PyTorch's fused attention has none; the one written out must serve, on a shipped transformer."""
    model = models.build("vit_tiny", (1, 8, 8), 3, (16, 8)).double()
    del model.blocks[1:]
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    (value,) = hessian_eigenvalues(model, x, y, F.cross_entropy, k=1, tol=1e-4)
    names, parameters = zip(*model.named_parameters())

    def loss(*values):
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(functional_call(model, dict(zip(names, values)), (x,)), y)

    gradients = torch.autograd.grad(loss(*parameters), parameters, create_graph=True)
    vector, size = [torch.randn_like(p) for p in parameters], 0.0
    for _ in range(60):
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        size = float(torch.cat([p.flatten() for p in product]).norm())
        vector = [p / size for p in product]
    assert abs(value) <= size * 1.001  # power iteration finds the eigenvalue of largest magnitude
    assert value == pytest.approx(size, rel=1e-2)


class _Tied(nn.Module):
    """A layer under two names, two layers with one weight, and a batch norm behind one of those."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.alias, self.third.weight = self.first, self.second.weight
        self.norm, self.head = nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.alias(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.third(torch.tanh(self.norm(self.second(x))))))


@pytest.mark.parametrize("norm", [False, True])
def test_shared_weights_count_once_and_are_not_folded(norm):
    torch.manual_seed(4)
    model, x, y = _Tied(norm).double(), torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    model(x)
    expected = dense_lambda_max(copy.deepcopy(model).eval(), x, y)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(expected, rel=1e-7)
    assert model.third.weight is model.second.weight


def test_a_norm_that_serves_two_layers_is_not_folded():
    torch.manual_seed(5)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    model(x)
    expected = dense_lambda_max(copy.deepcopy(model).eval(), x, y)
    assert hessian_lambda_max(model, x, y, F.cross_entropy, **EXACT) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", ["mlp", "conv_grouped"])
def test_the_loss_along_the_top_eigenvector(name):
    model, x = curvature_nets.make(name)
    y = torch.tensor([0, 1, 2, 0, 1])
    before = copy.deepcopy(model.state_dict())
    step = 1e-3
    valley = loss_along_top_eigenvector(
        model, x, y, F.cross_entropy, reach=step, points=3, batch_size=2, iterations=300, tol=1e-9
    )
    assert valley.distances == [-step, 0.0, step]
    assert valley.curvature == pytest.approx(dense_lambda_max(copy.deepcopy(model).eval(), x, y), rel=1e-6)
    left, middle, right = valley.losses
    assert middle == pytest.approx(float(F.cross_entropy(copy.deepcopy(model).eval()(x), y)), rel=1e-12)
    assert (left - 2 * middle + right) / step**2 == pytest.approx(valley.curvature, rel=1e-3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"reach": 0.0}, {"reach": float("inf")}, {"reach": float("nan")}, {"points": 2}, {"points": 3.5}]
)
def test_a_line_that_cannot_be_drawn(options):
    model, x = curvature_nets.make("mlp")
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        loss_along_top_eigenvector(model, x, torch.zeros(5, dtype=torch.int64), F.cross_entropy, **options)
