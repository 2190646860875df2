"""What optimizers keep of parameters, in any layout: cut along with them, or refused by name before training."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import flatprune
from flatprune.coupling import find_coupling
from flatprune.cutting import states
from flatprune.cutting.states import rehearsed
from tests.cutting import toy_optimizers as toy
from tests.pruning.optimizer_runs import STEPS, Trained, muon_and_adamw, net, same, square, states_of

STATES = {
    "nested": toy.Nested,
    "flat": toy.Flat,
    "per axis": toy.PerAxis,
    "adafactor": torch.optim.Adafactor,
    "slow weights": lambda p: toy.SlowWeights(torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "swa": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("make", [net, square])
def test_states_of_every_kind_are_cut(kind, make):
    model = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    Trained(model, STATES[kind](model.parameters()), ema_models=[averaged]).train().check()
    assert [p.shape for p in averaged.module.parameters()] == [p.shape for p in model.parameters()]


def index_states(model: nn.Module, optimizer: torch.optim.Optimizer, keys: dict[str, int]) -> None:
    """Every entry of a state becomes the number of the row (0) or column (1) that it belongs to."""
    for p in model.parameters():
        for key, dim in keys.items():
            if key in optimizer.state[p]:
                entry = optimizer.state[p][key]
                entry.copy_(torch.arange(p.shape[dim]).view(entry.shape))


FACTORED = {
    "torch": {"row_var": 0, "col_var": 1},
    "transformers": {"exp_avg_sq_row": 0, "exp_avg_sq_col": 1},
}


@pytest.mark.parametrize("kind", FACTORED)
def test_adafactor_of_square_weights_is_cut_as_rows_and_columns(kind):
    keys = FACTORED[kind]
    adafactor = torch.optim.Adafactor if kind == "torch" else pytest.importorskip("transformers").optimization.Adafactor
    model = square()
    for index, layer in enumerate(model[::2]):
        layer.weight.data = torch.arange(144.0).view(12, 12) + 1000 * index
    start = [layer.weight.clone() for layer in model[::2]]
    optimizer = adafactor(model.parameters())
    trained = Trained(model, optimizer, compensate=False)
    trained.backward()
    optimizer.step()
    index_states(model, optimizer, keys)
    for layer, weight in zip(model[::2], start):
        layer.weight.data = weight  # whose entries tell row and column
    for _ in range(STEPS):
        trained.curvature.finish_update()
        trained.model(torch.randn(8, 12))
        trained.pruner.step()
    assert trained.pruner.params <= 1.01 * 0.5 * trained.pruner.params_start
    for index, layer in enumerate(model[::2]):
        entries = layer.weight.detach() - 1000 * index
        row, column = (optimizer.state[layer.weight][key].flatten() for key in keys)
        assert torch.equal(row, entries[:, 0] // 12)
        assert torch.equal(column, entries[0] % 12)


REFUSED = {
    "preconditioned": (toy.Preconditioned, r"0\.weight: state 'pre_cond_0' of Preconditioned, of a stand-in"),
    "wants a closure": (toy.Closured, r"0\.weight: state 'pre_cond_0' of Closured, of a stand-in"),
    "rotated": (toy.Rotated, r"0\.weight: state 'Q' of Rotated"),
    "quantised": (toy.Quantised, r"0\.weight: state 'state1' of Quantised.* is quantised \(uint8\), in blocks"),
    "packed": (toy.Packed, r"0\.weight: state 'exp_avg' of Packed.* is of type Bytes"),
    "projected": (toy.Projected, r"0\.weight: state 'projector' of Projected.* is of type Projector"),
    "copies": (toy.Copies, r"attribute 'flat' of Copies holds a tensor of shape \(432,\)"),
    "shared": (toy.Shared, r"state 'history' of Shared holds a tensor of shape \(7,\)"),
    "lbfgs": (torch.optim.LBFGS, r"Pruner: optimizer is LBFGS: it keeps its history of all parameters in one piece"),
}


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_cut_is_refused_by_the_constructor(kind, stepped):
    make, message = REFUSED[kind]
    model = square()
    del model[6:]
    optimizer = make(model.parameters())
    if stepped:

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 12)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure if kind in ("lbfgs", "wants a closure") else closure() and None)
    with pytest.raises(ValueError, match=message):
        Trained(model, optimizer)


@pytest.mark.parametrize("name", ["Shampoo", "ScalableShampoo", "SOAP", "Lookahead", "CAME", "Kron"])
def test_optimizers_of_a_library_are_cut_or_refused_by_name(name):
    library = pytest.importorskip("pytorch_optimizer")
    model = square()
    inner = [torch.optim.AdamW(model.parameters())] if name == "Lookahead" else [model.parameters()]
    optimizer = getattr(library, name)(*inner)
    if name in ("Lookahead", "CAME"):
        Trained(model, optimizer).train().check()
    else:
        with pytest.raises(ValueError, match=rf"0\.weight: state .* of {name}"):
            Trained(model, optimizer)


def test_layers_that_stay_may_have_any_state():
    model = net()
    optimizers = [
        toy.Preconditioned(model[4].parameters()),
        torch.optim.AdamW(model[:4].parameters()),
    ]
    with pytest.raises(ValueError, match=r"4\.weight: state 'pre_cond_0'"):
        Trained(model, optimizers)  # its inputs go
    trained = Trained(model, optimizers, exclude=["2"])
    trained.train(2)
    assert optimizers[0].state[model[4].weight]["pre_cond_1"].shape == (24, 24)


def test_the_rehearsal_leaves_no_trace():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    groups = find_coupling(model, torch.randn(2, 20)).groups
    parameters, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    seen = rehearsed(model, groups, [optimizer])
    handle.remove()
    assert seen[id(optimizer), 2, "['exp_avg']"] == {(0, 1)}
    assert calls == [] and dict(optimizer.state) == {}
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert scheduler.last_epoch == 0 and torch.equal(rng, torch.get_rng_state())


def test_a_state_that_comes_late_stops_the_removal_alone():
    model = net()
    optimizers = [
        torch.optim.Adam(model[0].parameters()),
        toy.Later([*model[2].parameters(), *model[4].parameters()], after=3),
    ]
    trained = Trained(model, optimizers, schedule=flatprune.CubicSchedule(STEPS, start=0.6, end=0.7))
    trained.train(3)
    before = copy.deepcopy(model.state_dict())
    kept = states_of(optimizers)
    factors = trained.curvature.factors.buffer.clone()
    with pytest.raises(ValueError, match=r"2\.weight: state 'basis' of Later has shape \(25, 2\), expected \(24, 32\)"):
        trained.pruner.step()
    assert same(before, model.state_dict()) and same(kept, states_of(optimizers))
    assert torch.equal(factors, trained.curvature.factors.buffer)
    assert trained.pruner.step_count == 3 and trained.pruner.widths() == {"0": 32, "2": 24}


def test_an_error_in_cutting_any_state_changes_no_optimizer(monkeypatch):
    model = net()
    optimizers = muon_and_adamw(model)
    trained = Trained(model, optimizers, schedule=flatprune.CubicSchedule(STEPS, start=0.6, end=0.7))
    trained.train(3)
    before, tensors, cut = states_of(optimizers), copy.deepcopy(model.state_dict()), states.cut_state
    failures = 0
    while True:  # fail at the first state, then at the second, ... until the event gets through
        calls = itertools.count()

        def failing(*arguments, calls=calls, at=failures):
            if next(calls) == at:
                raise MemoryError
            return cut(*arguments)

        monkeypatch.setattr(states, "cut_state", failing)
        try:
            trained.pruner.step()
        except MemoryError:
            failures += 1
            assert same(before, states_of(optimizers)) and same(tensors, model.state_dict())
            continue
        break
    assert failures >= 5  # the momenta of Muon, two averages a bias of AdamW
    trained.check()
