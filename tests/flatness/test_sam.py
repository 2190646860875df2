"""Sharpness-aware minimisation: the gradient at the moved point, and nothing else changed."""

from __future__ import annotations

import copy
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatprune import runs
from flatprune.errors import Interrupted
from flatprune.flatness import sam as sam_module
from flatprune.flatness.sam import SAM
from flatprune.reporting import report
from flatprune.settings import Settings
from flatprune.training.trainer import Observer
from kfac_ext import Curvature


def network(*, dropout=0.0, norm=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5) if norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Flatten(), nn.Linear(5 * 16, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def backward(model, x, y):
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_gradient_is_that_at_the_moved_point():
    model, (x, y), radius = network(), batch(), 0.3
    sam, twin = SAM(model, radius=radius), copy.deepcopy(model)
    backward(model, x, y)
    at_hand = gradients(model)
    value = sam.replace_gradients(lambda: F.cross_entropy(model(x), y))

    length = sum(float((g**2).sum()) for g in at_hand) ** 0.5
    with torch.no_grad():
        for p, g in zip(twin.parameters(), at_hand):
            p += radius * g / length
    backward(twin, x, y)
    for found, before, p in zip(gradients(model), at_hand, twin.parameters()):
        torch.testing.assert_close(found, p.grad, rtol=1e-10, atol=1e-13)
        assert (found - before).norm() > 1e-4 * before.norm()  # the move matters
    assert float(value) == pytest.approx(F.cross_entropy(twin(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.0, math.inf])
def test_without_looking_at_the_device_it_does_the_same(monkeypatch, scale):
    """On a GPU: the same gradients, and those at hand where there is no direction."""

    def replaced(look):
        monkeypatch.setattr(sam_module, "reading_is_free", lambda device: look)
        model, (x, y) = network(norm=True), batch()
        sam = SAM(model, radius=0.3)
        backward(model, x, y)
        for p in model.parameters():
            p.grad.mul_(scale)
        value = sam.replace_gradients(lambda: F.cross_entropy(model(x), y))
        return gradients(model), value, F.cross_entropy(model(x), y).detach()

    (plain, value, still), (others, other_value, _) = replaced(True), replaced(False)
    for gradient, other in zip(plain, others):
        torch.testing.assert_close(other, gradient, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(other_value, still if value is None else value)
    assert (value is None) == (scale != 1.0)


def test_parameters_are_restored_and_gradients_written_in_place():
    model, (x, y) = network(norm=True).float(), batch()
    sam = SAM(model, radius=0.37)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, x.float(), y)
    slots = [p.grad for p in model.parameters()]
    sam.replace_gradients(lambda: F.cross_entropy(model(x.float()), y))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert all(p.grad is slot for p, slot in zip(model.parameters(), slots))


def test_second_pass_sees_the_same_masks_and_leaves_no_trace():
    model, (x, y) = network(dropout=0.5, norm=True), batch()
    curvature = Curvature(model, factor_update_steps=1)
    sam = SAM(model, radius=0.1, curvature=curvature)
    masks = []
    model[3].register_forward_hook(lambda module, args, out: masks.append((out != 0) | (args[0] == 0)))
    backward(model, x, y)
    torch.rand(7)  # the user draws numbers in between
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    factors, steps = curvature.factors.buffer.clone(), curvature.step_count
    masks_before = len(masks)

    def closure():
        torch.testing.assert_close(model[1].running_mean, buffers[0], rtol=0, atol=0)
        return F.cross_entropy(model(x), y)

    sam.replace_gradients(closure)
    assert len(masks) == masks_before + 1
    differing = (masks[-1] != masks[-2]).double().mean()
    assert differing < 0.1  # a few inputs of the dropout became zero or positive by the move; other masks: about half
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers))
    assert torch.equal(curvature.factors.buffer, factors)
    assert curvature.step_count == steps
    assert model[1].track_running_stats


def test_acts_on_every_kth_step():
    model, (x, y) = network(), batch()
    sam, calls = SAM(model, every=3), []

    def closure():
        calls.append(step)
        return F.cross_entropy(model(x), y)

    for step in range(7):
        backward(model, x, y)
        before = gradients(model)
        value = sam.replace_gradients(closure)
        changed = any(not torch.equal(a, b) for a, b in zip(before, gradients(model)))
        assert changed is (value is not None) is (step % 3 == 0)
    assert calls == [0, 3, 6]


def test_an_error_in_the_closure_leaves_everything_as_it_was():
    model, (x, y) = network(norm=True), batch()
    curvature = Curvature(model)
    sam = SAM(model, curvature=curvature)
    backward(model, x, y)
    before, state = gradients(model), {key: value.clone() for key, value in model.state_dict().items()}

    def closure():
        model(x)
        raise MemoryError

    with pytest.raises(MemoryError):
        sam.replace_gradients(closure)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert sam.step_count == 0
    backward(model, x, y)
    assert curvature.step_count == 2  # not paused any more
    assert sam.replace_gradients(lambda: F.cross_entropy(model(x), y)) is not None


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_gradients_without_a_direction_stay(value):
    model, _ = network(), batch()
    sam = SAM(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].bias.grad[0] = value
    before = gradients(model)
    assert sam.replace_gradients(lambda: pytest.fail("no second pass is wanted")) is None
    for a, b in zip(gradients(model), before):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_frozen_parameters_and_those_out_of_reach():
    model, (x, y) = network(), batch()
    model[0].weight.requires_grad_(False)
    sam, before = SAM(model), model[0].weight.clone()
    backward(model, x, y)
    sam.replace_gradients(lambda: F.cross_entropy(model(x).detach() + model[5].bias, y))
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)
    assert not model[0].bias.grad.any()  # the second pass did not reach it
    assert model[5].bias.grad.any()


def test_wrong_arguments():
    model = network()
    for radius in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="SAM: radius is"):
            SAM(model, radius=radius)
    with pytest.raises(ValueError, match="SAM: every is 0, expected >= 1"):
        SAM(model, every=0)
    with pytest.raises(ValueError, match="another model"):
        SAM(model, curvature=Curvature(network()))
    with pytest.raises(RuntimeError, match="call backward"):
        SAM(model).replace_gradients(lambda: torch.zeros(()))


def test_remove_and_copies():
    model, (x, y) = network(), batch()
    sam = SAM(model)
    backward(copy.deepcopy(model), x, y)  # the copy's hook does nothing
    sam.remove()
    sam.remove()
    backward(model, x, y)
    assert sam.replace_gradients(lambda: F.cross_entropy(model(x), y)) is not None


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_a_run_resumes_bit_for_bit(tmp_path, model, monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda *_: None)
    settings = Settings(
        model=model, widths=(8,) * 6 if model == "convnet" else (20, 10), epochs=4, train_size=120, batch_size=20,
        target_params=0.5, flatness="sam", sam_every=3,
    )  # fmt: skip
    summary = runs.run(settings, tmp_path / "whole")

    class Stop(Observer):
        def step(self, trainer):
            if trainer.progress.step == 10:  # between two steps that act
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        runs.run(settings, tmp_path / "parts", observer=lambda _: Stop())
    torch.manual_seed(5)
    resumed = runs.resume(tmp_path / "parts")
    runs.run(settings.changed(sam_every=4), tmp_path / "other")
    whole, parts, other = (
        torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"]
        for name in ("whole", "parts", "other")
    )
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not torch.equal(next(iter(other.values())), next(iter(whole.values())))
    assert resumed["test_accuracy_last"] == summary["test_accuracy_last"]
