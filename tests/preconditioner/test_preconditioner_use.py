"""Which layers, failures, wrong arguments, hooks, saving."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from kfac_ext import KFACPreconditioner
from tests.curvature import curvature_nets
from tests.preconditioner.preconditioner_helpers import DAMPING, backward, classes, generator, gradients, preconditioned


def test_skipped_layers_and_norms_keep_their_gradients():
    model, x = curvature_nets.make("conv_norm_depthwise")
    before, after = preconditioned(model, x, classes(x), skip_layers=["^4$"])
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"0.weight", "9.weight", "9.bias"}


def test_unsupported_and_unused_layers_are_named_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 4), nn.Linear(4, 4)
            self.mix = nn.Bilinear(4, 4, 3)

        def forward(self, x):
            x = self.used(x)
            return self.mix(x, x)

    model, x = Net(), torch.randn(5, 3)
    with KFACPreconditioner(model, factor_update_steps=1) as preconditioner:
        for step in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                backward(model, x, classes(x))
                before = gradients(model)
                preconditioner.step()
            messages = " ".join(str(w.message) for w in caught)
            assert ("'spare'" in messages, "'mix' (Bilinear:" in messages) == (step == 0,) * 2
            assert torch.equal(model.mix.weight.grad, before["mix.weight"])
            assert not torch.equal(model.used.weight.grad, before["used.weight"])


def test_layers_that_a_step_does_not_reach_are_left_alone():
    class Switch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.use_b = True

        def forward(self, x):
            return self.a(x) + self.b(x) if self.use_b else self.a(x)

    model, x = Switch().double(), torch.randn(5, 3, dtype=torch.float64)
    preconditioner = KFACPreconditioner(model, damping=DAMPING)
    backward(model, x, classes(x))
    preconditioner.step()
    model.use_b = False
    model.zero_grad()
    backward(model, x, classes(x))
    before = gradients(model)
    preconditioner.step()
    assert model.b.weight.grad is None
    state = preconditioner.state_dict()["layers"]["a"]
    matrix = torch.cat([before["a.weight"], before["a.bias"][:, None]], dim=1)
    exact = state["G_inverse"][0] @ matrix @ state["A_inverse"][0]
    torch.testing.assert_close(model.a.weight.grad, exact[:, :3])


def test_the_empirical_fisher_where_the_loss_misses_a_layer():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.side = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            self.aside = self.side(x)
            return self.used(x)

    model, x = Side(), torch.randn(5, 3)
    before, after = preconditioned(model, x, classes(x), fisher_type="empirical")
    assert set(before) == {"used.weight", "used.bias"} and not torch.equal(before["used.weight"], after["used.weight"])


def test_a_frozen_bias_leaves_the_layer_alone_with_a_word():
    model, x = curvature_nets.make("mlp")
    model[0].bias.requires_grad_(False)
    with pytest.warns(UserWarning, match="bias of layer '0'"):
        before, after = preconditioned(model, x, classes(x))
    assert torch.equal(before["0.weight"], after["0.weight"]) and not torch.equal(before["2.weight"], after["2.weight"])


@pytest.mark.filterwarnings("ignore:.*ParametrizationList")
def test_shared_and_computed_weights_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    x = torch.randn(5, 3)
    for model, message in (
        (Tied(), "weight of layer 'first' is shared.*'second'"),
        (normed, "weight of layer '0' is c"),
    ):
        preconditioner = KFACPreconditioner(model)
        backward(model, x, classes(x))
        before = gradients(model)
        with pytest.raises(ValueError, match=f"{message}.*skip_layers"):
            preconditioner.step()
        assert all(torch.equal(value, before[key]) for key, value in gradients(model).items())


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_factor_that_cannot_be_inverted_keeps_its_inverse(fails_at):
    model, x = curvature_nets.make("mlp")
    preconditioner = KFACPreconditioner(model, damping=DAMPING, inv_update_steps=1, factor_update_steps=100)
    states = []
    for step in range(fails_at + 1):
        model.zero_grad()
        backward(model, x, classes(x))
        before = gradients(model)
        if step == fails_at:
            preconditioner.curvature.factors["2.G"].copy_(-torch.eye(5))
            preconditioner.curvature.factors["2.A"].mul_(2)
            with pytest.warns(UserWarning, match="A or G of '2' is not positive definite"):
                preconditioner.step()
        else:
            preconditioner.step()
        states.append(preconditioner.state_dict()["layers"])
    last = states[0]["2"] if fails_at else {"A_inverse": torch.eye(6)[None], "G_inverse": torch.eye(5)[None]}
    for key in ("A_inverse", "G_inverse"):
        assert torch.equal(states[-1]["2"][key], last[key].double())
    assert torch.equal(model[2].weight.grad, before["2.weight"]) == (fails_at == 0)
    assert not torch.equal(model[0].weight.grad, before["0.weight"])


def test_factors_that_are_not_finite_wait_for_the_next_step():
    model, x = curvature_nets.make("mlp")
    preconditioner = KFACPreconditioner(model, factor_update_steps=100)
    with pytest.warns(UserWarning, match="not finite"):
        model(torch.full_like(x, torch.inf)).nan_to_num().sum().backward()
    model.zero_grad()
    preconditioner.step()
    assert not preconditioner.curvature.is_updated
    backward(model, x, classes(x))
    preconditioner.step()
    assert preconditioner.curvature.is_updated


def test_bad_arguments_name_the_argument():
    model = nn.Linear(3, 3)
    for option in (
        {"damping": 0.0},
        {"damping": "much"},
        {"factor_decay": 1.0},
        {"factor_update_steps": 0},
        {"inv_update_steps": 1.5},
        {"kl_clip": 0.0, "lr": 0.1},
        {"lr": -1.0},
        {"accumulation_steps": 0},
        {"fisher_type": "exact"},
        {"kfac_approx": "both"},
    ):
        with pytest.raises(ValueError, match=next(iter(option))):
            KFACPreconditioner(model, **option)
    with pytest.raises(ValueError, match="kl_clip needs lr"):
        KFACPreconditioner(model, kl_clip=1e-3)
    with pytest.raises(TypeError, match="grad_scaler is a float"):
        KFACPreconditioner(model, grad_scaler=2.0)
    with pytest.raises(ValueError, match="model is a DataParallel"):
        KFACPreconditioner(nn.DataParallel(model))
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="no training forward"):
        KFACPreconditioner(model).step()


def test_remove_leaves_no_hooks():
    model, x = curvature_nets.make("conv_norm_depthwise")
    with KFACPreconditioner(model) as preconditioner:
        backward(model, x, classes(x))
        preconditioner.step()
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]
    preconditioner.remove()
    with pytest.raises(RuntimeError, match="removed"):
        preconditioner.step()


def train(model, preconditioner, optimizer, steps, seed):
    data = generator(seed)
    for _ in range(steps):
        x = torch.randn(8, *curvature_nets.IMAGE, generator=data)
        optimizer.zero_grad()
        backward(model, x, torch.randint(0, 3, (8,), generator=data))
        preconditioner.step()
        optimizer.step()


def test_state_continues_bit_for_bit():
    def make(model):
        options = {"factor_update_steps": 2, "inv_update_steps": 3, "kl_clip": 1e-2, "lr": 0.1}
        return KFACPreconditioner(model, **options), torch.optim.SGD(model.parameters(), lr=0.1)

    model = curvature_nets.make("conv_grouped", dtype=torch.float32)[0]
    preconditioner, optimizer = make(model)
    train(model, preconditioner, optimizer, 5, seed=1)
    file = io.BytesIO()
    torch.save(preconditioner.state_dict(), file)
    twin = copy.deepcopy(model)
    train(model, preconditioner, optimizer, 6, seed=2)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state["layers"]) == {"0", "2", "6"}
    assert {key: tuple(value.shape) for key, value in state["layers"]["2"].items()} == {
        "A": (2, 19, 19), "G": (2, 3, 3), "A_inverse": (2, 19, 19), "G_inverse": (2, 3, 3),
    }  # fmt: skip
    resumed, again = make(twin)
    resumed.load_state_dict(state)
    train(twin, resumed, again, 6, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(preconditioner.curvature.factors.buffer, resumed.curvature.factors.buffer)


def test_state_of_another_model_changes_nothing():
    model, x = curvature_nets.make("mlp")
    preconditioner = KFACPreconditioner(model)
    backward(model, x, classes(x))
    preconditioner.step()
    other_model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3))
    other = KFACPreconditioner(other_model)
    with pytest.raises(ValueError, match=r"0\.G|2\.A"):
        other.load_state_dict(preconditioner.state_dict())
    assert other.step_count == 0 and other.state_dict()["layers"] == {}
