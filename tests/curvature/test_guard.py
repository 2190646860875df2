"""Forwards that stay out of the running factors."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kfac_ext
from kfac_ext.curvature.guard import UpdateGuard

FORMS = {"true": "expand", "empirical": "reduce"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def train(model, curvature, batches):
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
    curvature.finish_update()


def batches(count, spoil=(), value=1e20):
    drawn = [(torch.randn(16, 3), torch.randint(0, 4, (16,))) for _ in range(count)]
    for place in spoil:
        drawn[place][0][0, 1] = value
    return drawn


@pytest.mark.parametrize("value", [1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("fisher_type", FORMS)
def test_a_batch_that_is_not_finite_changes_no_factor(value, fisher_type):
    found = []
    for spoil in ((), (2,)):
        model, drawn = network(), batches(6, spoil, value)
        generator = torch.Generator().manual_seed(1)
        options = {"fisher_type": fisher_type, "kfac_approx": FORMS[fisher_type], "generator": generator}
        curvature = kfac_ext.Curvature(model, factor_update_steps=1, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, curvature, drawn[:2])
            before = curvature.factors.buffer.clone()
            train(model, curvature, drawn[2:3])
            stayed = torch.equal(before, curvature.factors.buffer)
            train(model, curvature, drawn[3:])
        found.append((stayed, len(caught), sum(curvature.left_out.values()) > 0))
        assert bool(curvature.factors.buffer.isfinite().all())
    assert found == [(False, 0, False), (True, 1, True)]


def test_the_warning_names_the_layer_and_counts():
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1, fisher_type="empirical")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, curvature, batches(14, range(1, 14)))
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and "'0'" in texts[0] and "1 update " in texts[0] and "10 updates" in texts[1]
    assert curvature.left_out == {"0": 13}


def test_a_first_batch_that_is_not_finite_begins_nothing():
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1)
    with pytest.warns(UserWarning, match="left out"):
        train(model, curvature, batches(1, [0]))
    assert not curvature.is_updated
    train(model, curvature, batches(1))
    assert curvature.is_updated


def test_counts_are_in_the_state():
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1, outlier_factor=10.0, outlier_window=7)
    with pytest.warns(UserWarning, match="left out"):
        train(model, curvature, batches(4, [2]))
    state = curvature.state_dict()
    other = kfac_ext.Curvature(network(), factor_update_steps=1, outlier_factor=10.0, outlier_window=7)
    other.load_state_dict(state)
    assert other.left_out == curvature.left_out == {"0": 1}
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(other.state_dict()["guard"].values(), state["guard"].values())
    )


@pytest.mark.parametrize("factor", [None, 50.0])
def test_outliers_are_left_out_on_request(factor):
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1, outlier_factor=factor, outlier_window=8)
    drawn = batches(12, [9], value=1e4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, curvature, drawn)
    assert curvature.left_out == ({} if factor is None else {"0": 1})
    assert (float(curvature.factors["0.A"].diagonal().max()) > 100) == (factor is None)


def test_a_new_level_is_none_but_for_a_while():
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1, outlier_factor=50.0, outlier_window=8)
    drawn = [(x * (1 if i < 8 else 100), y) for i, (x, y) in enumerate(batches(24))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, curvature, drawn)
    assert 3 <= curvature.left_out["0"] <= 5  # until half the window has it
    assert float(curvature.factors["0.A"].diagonal().max()) > 100


def verdict(guard, name, x, g):
    capture = SimpleNamespace(gradients={name: [g]}, calls=lambda _: [(x, g)], made={})
    return guard.settle(*guard.judged(capture, 1.0), waits=False)


def test_sums_over_positions_that_overflow():
    x, g = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 1e18)  # squares fit float32, those of sums do not
    guard = UpdateGuard(["conv"], torch.zeros(0))
    assert verdict(guard, "conv", x, g * 1e-3) is True
    with pytest.warns(UserWarning, match="'conv'"):
        assert verdict(guard, "conv", x, g) is False
    assert guard.left_out == {"conv": 1}


def test_float64_layers_bear_what_float32_does_not():
    x = torch.full((2, 3), 1e100, dtype=torch.float64)
    assert verdict(UpdateGuard(["fc"], x.new_zeros(0)), "fc", x, x) is True


def test_decisions_of_a_device_that_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("kfac_ext.curvature.guard.reading_is_free", lambda device: False)
    monkeypatch.setattr("kfac_ext.curvature.running.UpdateGuard.warn", lambda self: None)
    model = network()
    curvature = kfac_ext.Curvature(model, factor_update_steps=1)
    train(model, curvature, batches(2))
    before = curvature.factors.buffer.clone()
    train(model, curvature, batches(1, [0]))
    assert torch.equal(curvature.factors.buffer, before)
    train(model, curvature, batches(1))
    assert not torch.equal(curvature.factors.buffer, before)
    assert sum(curvature.left_out.values()) >= 1


def test_a_preconditioner_goes_on_after_an_outlier():
    model = nn.Linear(3, 4)
    preconditioner = kfac_ext.KFACPreconditioner(model, damping=1e-2, factor_update_steps=1, inv_update_steps=1)
    with pytest.warns(UserWarning, match="left out"):
        for x, y in batches(8, [2]):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            preconditioner.step()
    assert bool((model.weight.grad[:, 1] != 0).all())
    state = preconditioner.state_dict()
    other = kfac_ext.KFACPreconditioner(nn.Linear(3, 4), damping=1e-2)
    other.load_state_dict(state)
    assert other.curvature.left_out == preconditioner.curvature.left_out != {}


@pytest.mark.parametrize("bad", [{"outlier_factor": 0.5}, {"outlier_factor": float("nan")}, {"outlier_window": 0}])
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kfac_ext.Curvature(network(), **bad)
