"""Momentum-SAM: the gradient at w - radius v / |v|, and everything else as without it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatprune.flatness.sam import MomentumSAM
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import Target
from kfac_ext import Curvature


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def train(model, optimizer, msam, count):
    for x, y in batches(count):
        optimizer.zero_grad()
        with msam.moved():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()


def gradients_at(model, weights, x, y):
    """Of the loss at other weights."""
    values = dict(zip(dict(model.named_parameters()), weights))
    loss = F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)
    return torch.autograd.grad(loss, weights)


def test_equals_a_loop_by_hand_with_sgd():
    model, radius, lr, mu, decay = network(), 0.2, 0.1, 0.9, 1e-2
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=mu, weight_decay=decay)
    train(model, optimizer, MomentumSAM(model, optimizer, radius=radius), 6)

    w = [p.detach().clone() for p in twin.parameters()]
    v = [torch.zeros_like(p) for p in w]
    for x, y in batches(6):
        length = sum(float((b**2).sum()) for b in v) ** 0.5
        moved = [p - radius * b / length if length else p.clone() for p, b in zip(w, v)]
        g = gradients_at(twin, [p.requires_grad_() for p in moved], x, y)
        v = [mu * b + (d + decay * p) for b, d, p in zip(v, g, w)]
        w = [p - lr * b for p, b in zip(w, v)]
    for p, expected in zip(model.parameters(), w):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_moves_on_along_the_last_step():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    msam = MomentumSAM(model, optimizer, radius=0.25)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    train(model, optimizer, msam, 1)
    after = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    with msam.moved():
        moved = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    torch.testing.assert_close(moved - after, 0.25 * (after - before) / (after - before).norm())


def test_adam_moves_along_its_first_moment():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    msam = MomentumSAM(model, optimizer, radius=0.5)
    train(model, optimizer, msam, 2)
    momenta = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    length = sum(float((m**2).sum()) for m in momenta) ** 0.5
    expected = [p.detach() - 0.5 * m / length for p, m in zip(model.parameters(), momenta)]
    with msam.moved():
        for p, value in zip(model.parameters(), expected):
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)


def test_parameters_come_back_to_the_bit_whatever_happens():
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    msam = MomentumSAM(model, optimizer, radius=0.37)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with msam.moved():
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    with pytest.raises(MemoryError), msam.moved():
        raise MemoryError
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    with msam.moved():  # and nothing stays refused
        pass
    optimizer.step()


def test_no_momentum_yet_or_a_zero_one_moves_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    msam = MomentumSAM(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for momentum in (None, torch.zeros_like):
        for p in model.parameters() if momentum else ():
            optimizer.state[p]["momentum_buffer"] = momentum(p)
        with msam.moved():
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_what_is_refused_inside():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    msam, curvature = MomentumSAM(model, optimizer), Curvature(model)
    schedule = CubicSchedule(4, start=0.0, every=1)
    (x, _), *_ = batches(1)
    pruner = Pruner(
        model, optimizer, curvature, x, target=Target(params=0.6), total_steps=4, criterion="l1", schedule=schedule
    )
    train(model, optimizer, msam, 2)
    before, factors = [p.detach().clone() for p in model.parameters()], curvature.factors.buffer.clone()
    with msam.moved(), pytest.raises(RuntimeError, match=r"optimizer.step\(\) inside of moved"):
        optimizer.step()
    with msam.moved(), pytest.raises(RuntimeError, match="moved: the parameters are moved"), msam.moved():
        pass
    with msam.moved(), pytest.raises(RuntimeError, match="Pruner: the parameters are moved"):
        pruner.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert torch.equal(curvature.factors.buffer, factors) and pruner.step_count == 0
    assert pruner.step()[0].removed > 0
    assert model[0].weight.shape == optimizer.state[model[0].weight]["momentum_buffer"].shape != (6, 4)
    train(model, optimizer, msam, 2)  # the momentum was cut with the parameters


def test_factors_are_those_of_the_moved_point():
    model, (x, y) = network(), next(batches(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn_like(p)
    msam, curvature = MomentumSAM(model, optimizer, radius=2.0), Curvature(model)
    twin = copy.deepcopy(model)
    with msam.moved():
        F.cross_entropy(model(x), y).backward()
        twin.load_state_dict(model.state_dict())
    hidden = torch.cat([torch.tanh(twin[0](x)), torch.ones(8, 1)], dim=1).detach()
    torch.testing.assert_close(curvature.factors["2.A"], hidden.T @ hidden / 8)
    assert curvature.step_count == 1


def test_wrong_arguments():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for radius in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="MomentumSAM: radius is"):
            MomentumSAM(model, sgd, radius=radius)
    with pytest.raises(ValueError, match="group 0 of SGD has no momentum"):
        MomentumSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="group 0 of Adagrad has no momentum"):
        MomentumSAM(model, torch.optim.Adagrad(model.parameters()))


def test_an_optimizer_that_keeps_its_momentum_elsewhere():
    model = network()
    optimizer = torch.optim.Adamax(model.parameters(), lr=0.01)
    msam = MomentumSAM(model, optimizer)
    train(model, optimizer, msam, 1)
    for state in optimizer.state.values():
        state["mine"] = state.pop("exp_avg")
    with pytest.raises(RuntimeError, match="Adamax keeps no 'momentum_buffer' or 'exp_avg'"), msam.moved():
        pass
