"""Optimum shifting: same outputs on the batch, smaller weights, nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from flatprune.flatness.sam import MomentumSAM
from flatprune.flatness.shifting import optimum_shift
from kfac_ext import Curvature
from kfac_ext.layers import kind_of
from tests.curvature import curvature_nets, curvature_oracles


def outputs_of(model, modules, x):
    """The output of each module in one forward of a copy, so that the model's buffers stay."""
    twin, seen = copy.deepcopy(model), []
    for name in modules:
        twin.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone()))
    seen.append(twin(x).detach())
    return seen


def minimum_norm(rows, weight):
    """The least solution W' of W' X = W X by LAPACK, X the rows transposed."""
    return torch.linalg.lstsq(rows, rows @ weight.T, driver="gelsd").solution.T


def test_equals_the_minimum_norm_solution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x, twin = torch.randn(5, 12, dtype=torch.float64), copy.deepcopy(model)
    shifts = optimum_shift(model, x)
    hidden = torch.tanh(twin[0](x)).detach()
    for index, rows in ((0, x), (2, hidden)):
        expected = minimum_norm(rows, twin[index].weight.detach())
        torch.testing.assert_close(model[index].weight.detach(), expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(model[index].bias, twin[index].bias)
    assert [(s.layer, s.rank, s.inputs) for s in shifts] == [("0", 5, 12), ("2", 5, 9)]
    for s, index in zip(shifts, (0, 2)):
        assert s.norm_before == pytest.approx(float(twin[index].weight.detach().norm()))
        assert s.norm_after == pytest.approx(float(model[index].weight.detach().norm()))
        assert s.norm_after < 0.95 * s.norm_before
    torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(model(x + 1), twin(x + 1), rtol=1e-2)  # elsewhere it is another function


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in curvature_nets.NETS if name != "segmenter"])
def test_every_kind_of_layer_computes_the_same_on_the_batch(name, training):
    model, x = curvature_nets.make(name)
    model.train(training)
    x = x[: 1 if x.dim() > 2 else 2]  # few enough vectors that a layer has room
    names = [key for key, m in model.named_modules() if kind_of(m) is not None]
    before, weights = outputs_of(model, names, x), {key: p.clone() for key, p in model.named_parameters()}
    shifts = optimum_shift(model, x)
    for old, new in zip(before, outputs_of(model, names, x)):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-7)
    assert sorted(s.layer for s in shifts) == sorted(names)
    assert all(s.norm_after <= s.norm_before * (1 + 1e-12) and s.rank <= s.inputs for s in shifts)
    assert any(s.norm_after < 0.99 * s.norm_before for s in shifts)
    assert all(torch.equal(p, weights[key]) for key, p in model.named_parameters() if not key.endswith("weight"))


@pytest.mark.parametrize("name", ["conv_stride_dilation", "conv_reflect", "conv_same"])
def test_convolutions_against_patches_taken_pixel_by_pixel(name):
    model, x = curvature_nets.make(name)
    image = torch.relu(model[0](x[:1])).detach()
    conv, weight = model[2], model[2].weight.detach().flatten(1)
    optimum_shift(model, x[:1])
    rows = curvature_oracles.conv_patches(image[0], conv)
    assert torch.linalg.matrix_rank(rows) < rows.shape[1]
    torch.testing.assert_close(conv.weight.detach().flatten(1), minimum_norm(rows, weight), rtol=1e-6, atol=1e-9)


def test_groups_are_projected_apart():
    model, x = curvature_nets.make("conv_grouped")
    image = F.pad(torch.relu(model[0](x[:1])), [1] * 4).detach()
    conv, weight = model[2], model[2].weight.detach().flatten(1)
    patches = F.unfold(image, 3)[0].T.view(-1, 2, 18)
    optimum_shift(model, x[:1])
    for group in range(2):
        expected = minimum_norm(patches[:, group], weight[3 * group : 3 * group + 3])
        torch.testing.assert_close(conv.weight.detach().flatten(1)[3 * group : 3 * group + 3], expected)


def test_full_rank_changes_no_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    before = copy.deepcopy(model.state_dict())
    shifts = optimum_shift(model, torch.randn(40, 6))
    assert [(s.rank, s.inputs) for s in shifts] == [(6, 6), (5, 5)]
    assert all(s.norm_after == s.norm_before for s in shifts)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_float32_outputs_stay_on_inputs_of_all_magnitudes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 4))
    x = torch.randn(20, 50) * torch.logspace(-3, 3, 20)[:, None]
    model[0].bias.data[:5] = -1e5  # five neurons that are dead on the batch
    before = model(x).detach()
    shifts = optimum_shift(model, x)
    assert shifts[0].rank == 20 and shifts[1].rank <= 20
    error = (model(x).detach() - before).norm(dim=1) / before.norm(dim=1)
    assert float(error.max()) < 1e-4
    assert not model[2].weight[:, :5].any()  # what reads dead neurons has no effect on the outputs


def test_tolerance_trades_outputs_for_norm():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3, bias=False).double(), torch.randn(40, 8, dtype=torch.float64)
    x = x * torch.tensor([1.0, 1, 1, 1, 1, 1e-3, 1e-3, 1e-3], dtype=torch.float64)
    before, outputs = float(model.weight.detach().norm()), model(x).detach()
    (kept,) = optimum_shift(copy.deepcopy(model), x)
    (shift,) = optimum_shift(model, x, tolerance=1e-4)
    assert (kept.rank, shift.rank) == (8, 5)
    assert shift.norm_after < before
    assert 1e-6 < float((model(x).detach() - outputs).abs().max()) < 1e-2


def test_what_is_left_alone():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.frozen = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.normed, self.free, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 7)
            self.head.weight = self.embedding.weight
            parametrizations.weight_norm(self.normed)
            self.frozen.weight.requires_grad_(False)
            self.unused = nn.Linear(6, 6)

        def forward(self, tokens):
            return self.head(self.free(self.normed(torch.tanh(self.frozen(self.embedding(tokens))))))

    model, tokens = Tied(), torch.tensor([1, 4])
    before = copy.deepcopy(model.state_dict())
    assert [s.layer for s in optimum_shift(model, tokens)] == ["free"]
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["free.weight"]


def test_layers_can_be_chosen_and_nothing_else_is_disturbed():
    model, x = curvature_nets.make("conv_norm_depthwise")
    model.insert(3, nn.Dropout(0.5))
    curvature = Curvature(model)
    F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modes, steps = [m.training for m in model.modules()], curvature.step_count
    assert [s.layer for s in optimum_shift(model, x[:1], layers=["10"])] == ["10"]
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    assert changed == ["10.weight"]
    assert torch.equal(torch.get_rng_state(), rng) and curvature.step_count == steps
    assert [m.training for m in model.modules()] == modes


def test_bad_arguments_change_nothing():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, before = torch.randn(2, 6), copy.deepcopy(model.state_dict())
    for tolerance in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="optimum_shift: tolerance is"):
            optimum_shift(model, x, tolerance=tolerance)
    with pytest.raises(TypeError, match="layers is '0'"):
        optimum_shift(model, x, layers="0")
    with pytest.raises(KeyError, match="no layer '1' that can be shifted, there are 0, 2"):
        optimum_shift(model, x, layers=["0", "1"])
    with pytest.raises(ValueError, match="the inputs of layer '0' are not finite"):
        optimum_shift(model, torch.full((2, 6), float("nan")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with MomentumSAM(model, optimizer).moved(), pytest.raises(RuntimeError, match="optimum_shift: the parameters are"):
        optimum_shift(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
