"""Clipping, scaled losses, accumulation, numbers that are functions of the step."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from kfac_ext import KFACPreconditioner
from tests.curvature import curvature_nets
from tests.preconditioner.preconditioner_helpers import DAMPING, backward, classes, generator, gradients, preconditioned


def kl(before, after):
    return sum(float((before[key] * after[key]).sum()) for key in before)


def test_kl_clip_bounds_the_change():
    model, x = curvature_nets.make("mlp")
    y = classes(x)
    before, free = preconditioned(copy.deepcopy(model), x, y, generator=generator())
    size = 0.1**2 * kl(before, free)
    _, loose = preconditioned(copy.deepcopy(model), x, y, generator=generator(), kl_clip=2 * size, lr=0.1)
    _, clipped = preconditioned(copy.deepcopy(model), x, y, generator=generator(), kl_clip=size / 9, lr=0.1)
    for key in free:
        torch.testing.assert_close(loose[key], free[key], rtol=1e-12, atol=0)
        torch.testing.assert_close(clipped[key], free[key] / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fisher_type", ["true", "empirical"])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_scaled_gradients_give_the_same_step(fisher_type, unscale_first):
    model, x = curvature_nets.make("conv_grouped", dtype=torch.float32)
    y, scaled_model = classes(x), copy.deepcopy(model)
    options = {"fisher_type": fisher_type, "damping": DAMPING, "kl_clip": 1e-4, "lr": 0.1, "factor_update_steps": 1}
    plain = KFACPreconditioner(model, generator=generator(), **options)
    optimizer = torch.optim.SGD(scaled_model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, growth_interval=1)  # another scale on every step
    scaled = KFACPreconditioner(scaled_model, generator=generator(), grad_scaler=scaler, **options)
    for _ in range(2):
        model.zero_grad()
        backward(model, x, y)
        plain.step()
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(scaled_model(x), y)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaled.step()
        if not unscale_first:
            scaler.unscale_(optimizer)
        found = gradients(scaled_model)
        scaler.step(optimizer)
        scaler.update()
        for key, value in gradients(model).items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert scaler.get_scale() == 2.0**13


def test_the_scale_of_the_loss_is_not_waited_for(monkeypatch):
    """`get_scale` copies a number from the device."""
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", None)
    model, x = curvature_nets.make("mlp", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    options = {"fisher_type": "empirical", "grad_scaler": scaler, "accumulation_steps": 2}
    with KFACPreconditioner(model, generator=generator(), **options) as preconditioner:
        for _ in range(2):
            scaler.scale(F.cross_entropy(model(x), classes(x)) / 2).backward()
        preconditioner.step()
        assert torch.equal(preconditioner._loss_scale(), torch.tensor(4.0))
        assert preconditioner.curvature.factors.buffer.isfinite().all()


def test_accumulated_batches_count_equally():
    # the factors of one step of two halves, and of the running average after it, are those of the whole batch
    model, x = curvature_nets.make("mlp")
    x = torch.cat([x, 2 * x[:3]])
    twin, y = copy.deepcopy(model), classes(x)
    options = {"damping": DAMPING, "fisher_type": "empirical", "factor_update_steps": 1, "inv_update_steps": 1}
    whole = KFACPreconditioner(model, **options)
    halves = KFACPreconditioner(twin, accumulation_steps=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.zero_grad()
            twin.zero_grad()
            backward(model, x, y)
            whole.step()
            for half in (slice(0, 4), slice(4, 8)):
                backward(twin, x[half], y[half], scale=0.5)
            halves.step()
            torch.testing.assert_close(halves.curvature.factors.buffer, whole.curvature.factors.buffer)
            for key, value in gradients(model).items():
                torch.testing.assert_close(gradients(twin)[key], value)
            for network in (model, twin):
                torch.optim.SGD(network.parameters(), lr=0.1).step()


def test_another_number_of_forwards_than_told_is_said_once():
    model, x = curvature_nets.make("mlp")
    preconditioner = KFACPreconditioner(model, factor_update_steps=1)
    for step in range(2):
        backward(model, x, classes(x))
        backward(model, x, classes(x))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            preconditioner.step()
        assert ["2 training forwards in one step" in str(w.message) for w in caught] == [True] * (step == 0)


def test_every_number_may_be_a_function_of_the_step():
    model, x = curvature_nets.make("mlp")
    asked = {}

    def follow(name, values):
        def function(step):
            asked.setdefault(name, []).append(step)
            return values(step)

        return function

    preconditioner = KFACPreconditioner(
        model,
        damping=follow("damping", lambda step: 0.1 / (1 + step)),
        factor_decay=follow("factor_decay", lambda step: 0.9),
        factor_update_steps=follow("factor_update_steps", lambda step: 2 if step < 4 else 3),
        inv_update_steps=follow("inv_update_steps", lambda step: 4),
        kl_clip=follow("kl_clip", lambda step: 1e-3),
        lr=follow("lr", lambda step: 0.0),
    )
    factors, inverses = [], []
    for _ in range(7):
        backward(model, x, classes(x))
        preconditioner.step()
        factors.append(preconditioner.curvature.factors.buffer.clone())
        inverses.append(preconditioner.state_dict()["layers"]["0"]["A_inverse"])
    renewed = [not torch.equal(a, b) for a, b in itertools.pairwise(factors)]
    assert renewed == [False, True, False, False, False, True]  # steps 2 and 6; 4 % 3 is 1
    assert [not torch.equal(a, b) for a, b in itertools.pairwise(inverses)] == [False, False, False, True, False, False]
    assert asked["damping"] == [0, 4] and asked["kl_clip"] == asked["lr"] == list(range(7))
    assert asked["factor_update_steps"] == list(range(1, 8)) and set(asked["factor_decay"]) == {2, 6}


def test_out_of_range_names_the_step_and_changes_nothing():
    model, x = curvature_nets.make("mlp")
    preconditioner = KFACPreconditioner(model, damping=lambda step: 0.1 - step, inv_update_steps=1)
    backward(model, x, classes(x))
    preconditioner.step()
    backward(model, x, classes(x))
    before = gradients(model)
    with pytest.raises(ValueError, match=r"damping is -0\.9 at step 1, expected a finite number > 0"):
        preconditioner.step()
    assert all(torch.equal(value, before[key]) for key, value in gradients(model).items())
