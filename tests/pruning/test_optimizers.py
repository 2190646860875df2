"""Optimizers as people have them: several, in the backward, with parameters of a loss, forgotten or made later."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatprune
from tests.pruning.optimizer_runs import SGD, STEPS, Trained, muon_and_adamw, net


def test_muon_and_adamw_are_both_cut():
    model = net()
    optimizers = muon_and_adamw(model)
    Trained(model, optimizers).train().check()
    for optimizer, key in zip(optimizers, ("momentum_buffer", "exp_avg_sq")):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert held and all(optimizer.state[p][key].shape == p.shape for p in held)


def test_optimizers_that_step_in_the_backward_are_cut():
    model = net()
    of = {p: torch.optim.Adam([p], foreach=False) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        of[parameter].step()
        of[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    trained = Trained(model, [], given=of).train()
    before = [p.clone() for p in model.parameters()]
    trained.check()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))  # the hooks are still called
    assert all(o.state[p]["exp_avg"].shape == p.shape for p, o in of.items())


def test_groups_keep_options_of_their_own():
    model = net()
    rest = [model[0].bias, *model[2].parameters()]
    groups = [
        {"params": [model[0].weight], "lr": 0.1, "momentum": 0.5},
        {"params": rest, "masks": [torch.ones_like(p) for p in rest]},
        {"params": model[4].parameters(), "lr": torch.tensor(0.2)},
    ]
    optimizer = SGD(groups, lr=0.01, momentum=0.9, foreach=False)
    Trained(model, optimizer).train().check()
    assert [g["momentum"] for g in optimizer.param_groups] == [0.5, 0.9, 0.9]
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([0.1, 0.01, 0.2])
    assert [mask.shape for mask in optimizer.param_groups[1]["masks"]] == [p.shape for p in rest]


def test_sparse_gradients_are_cut():
    layers = [nn.Flatten(), nn.Linear(16 * 6, 20), nn.ReLU(), nn.Linear(20, 5)]
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True), *layers)
    optimizers = [torch.optim.SparseAdam(model[0].parameters()), torch.optim.AdamW(model[2:].parameters())]
    curvature = flatprune.Curvature(model, factor_update_steps=2)
    words = torch.randint(0, 50, (16, 6))
    options = {"target": flatprune.Target(params=0.5), "total_steps": STEPS}
    pruner = flatprune.Pruner(model, optimizers, curvature, words[:2], **options)
    for _ in range(STEPS):
        model.zero_grad()
        F.cross_entropy(model(words), torch.randint(0, 5, (16,))).backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step()
        assert model[0].weight.grad.is_sparse and model[0].weight.grad.shape == model[0].weight.shape
    assert model[0].weight.shape[1] < 16
    assert optimizers[0].state[model[0].weight]["exp_avg"].shape == model[0].weight.shape


@pytest.mark.parametrize("together", [True, False])
def test_parameters_of_the_loss_are_left_alone(together):
    model, centers = net(), nn.Parameter(torch.randn(5, 32))  # of the shape that a weight could have
    if together:
        optimizers = [torch.optim.Adam([{"params": model.parameters()}, {"params": [centers], "lr": 0.1}])]
    else:
        optimizers = [torch.optim.Adam(model.parameters()), torch.optim.Adam([centers])]
    first = centers.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Pruner")
        trained = Trained(model, optimizers, loss=lambda z, y: F.cross_entropy(z + centers.mean(1), y))
    trained.train().check()
    assert centers.shape == (5, 32) and optimizers[-1].state[centers]["exp_avg"].shape == (5, 32)
    assert not torch.equal(centers, first)


@pytest.mark.parametrize("make", [lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1)])
def test_schedulers_that_hold_each_optimizer_go_on(make):
    model = net()
    optimizers = muon_and_adamw(model)
    schedulers = [make(optimizer) for optimizer in optimizers]
    trained = Trained(model, optimizers)
    for _ in range(STEPS):
        trained.train(1)
        for scheduler in schedulers:
            scheduler.step()
    trained.check()
    assert [s.last_epoch for s in schedulers] == [STEPS, STEPS]


def test_trainable_parameters_that_no_optimizer_holds_are_named():
    model = net()
    muon, adamw = muon_and_adamw(model)
    with pytest.warns(
        UserWarning, match=r"no optimizer that was given holds '0\.bias', '2\.bias', '4\.bias'; give all"
    ):
        Trained(model, [muon, adamw], given=muon)
    for p in adamw.param_groups[0]["params"]:
        p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Pruner")
        Trained(model, [muon], given=muon)


@pytest.mark.parametrize("given", [None, 0, 1])
def test_an_optimizer_that_was_not_given_is_noticed(given):
    model = net()
    optimizers = muon_and_adamw(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Trained(model, optimizers, given=None if given is None else optimizers[given]).train().check()
    names = {None: "AdamW, Muon", 0: "AdamW", 1: "Muon"}
    texts = [str(warning.message) for warning in told if "was not given" in str(warning.message)]
    assert len(texts) == 1 and f"Pruner: {names[given]}, which was not given" in texts[0]


def test_an_optimizer_that_is_made_later_is_noticed():
    model = net()
    first = torch.optim.Adam(model.parameters())
    trained = Trained(model, first, schedule=flatprune.CubicSchedule(STEPS, start=0.6, end=0.7))
    trained.train(2)
    trained.optimizers = [SGD(model.parameters(), lr=0.01, momentum=0.9)]
    with pytest.warns(UserWarning, match="Pruner: SGD, which was not given, trains parameters of the model"):
        trained.train(STEPS - 2)
    trained.check()


def test_an_optimizer_without_states_need_not_be_given():
    model = net()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Pruner")
        Trained(model, torch.optim.SGD(model.parameters(), lr=0.1), given=None).train().check()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: "adam", TypeError, "Pruner: optimizer is str, expected an optimizer with param_groups"),
        (lambda m: [SGD(m.parameters()), None], TypeError, r"Pruner: optimizer\[1\] is NoneType"),
        (lambda m: torch.optim.swa_utils.AveragedModel(m), TypeError, "copies of the model are ema_models="),
        (lambda m: torch.optim.lr_scheduler.ConstantLR(SGD(m.parameters())), TypeError, r"give its \.optimizer"),
        (lambda m: SGD(net().parameters()), ValueError, "Pruner: optimizer: SGD holds no parameter of the model"),
    ],
)
def test_what_is_no_optimizer_of_the_model_is_refused(make, error, message):
    model = net()
    with pytest.raises(error, match=message):
        Trained(model, make(model))
