"""Optimizers as people have them: several, wrapped, in the backward, with parameters of a loss, with any states."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
import toy_optimizers as toy
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import flatprune
from flatprune.coupling import find_coupling
from flatprune.cutting.states import rehearsed

STEPS = 6
SGD = torch.optim.SGD


def net(*widths: int) -> nn.Sequential:
    """A perceptron; by default all its hidden weights are of different shapes."""
    sizes = [20, *(widths or (32, 24)), 5]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def square() -> nn.Sequential:
    """Every weight is [12, 12], the last one too."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(12, 12, bias=False), nn.Tanh())][:-1])


class Trained:
    """A network, its optimizers and a pruner, on random data."""

    def __init__(self, model: nn.Sequential, optimizers, given="same", loss=F.cross_entropy, **options) -> None:
        self.model, self.loss = model, loss
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.curvature = flatprune.Curvature(model, factor_update_steps=2)
        self.pruner = flatprune.Pruner(
            model,
            optimizers if given == "same" else given,
            self.curvature,
            torch.randn(2, model[0].in_features),
            target=flatprune.Target(params=0.5),
            total_steps=STEPS,
            **options,
        )

    def backward(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = torch.randn(16, self.model[0].in_features), torch.randint(0, 5, (16,))
        self.loss(self.model(x), y).backward()

    def train(self, steps: int = STEPS) -> Trained:
        for _ in range(steps):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.pruner.step()
        return self

    def check(self) -> None:
        assert self.pruner.params <= 0.5 * self.pruner.params_start
        self.backward()  # once more, with what was cut at the end
        for optimizer in self.optimizers:
            optimizer.step()
        assert all(bool(p.isfinite().all()) for p in self.model.parameters())


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others)]


def states_of(optimizers: list[torch.optim.Optimizer]) -> list:
    return copy.deepcopy([[o.state[p] for g in o.param_groups for p in g["params"]] for o in optimizers])


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# several


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


# states


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
    assert trained.pruner.params <= 0.5 * trained.pruner.params_start
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


def test_a_state_that_comes_late_stops_only_the_removal():
    model = net()
    optimizers = [
        torch.optim.Adam(model[0].parameters()),
        toy.Later([*model[2].parameters(), *model[4].parameters()], after=3),
    ]
    trained = Trained(model, optimizers, schedule=flatprune.CubicSchedule(STEPS, start=0.6, end=0.7))
    trained.train(3)
    before = copy.deepcopy(model.state_dict())
    states = states_of(optimizers)
    factors = trained.curvature.factors.buffer.clone()
    with pytest.raises(ValueError, match=r"2\.weight: state 'basis' of Later has shape \(25, 2\), expected \(24, 32\)"):
        trained.pruner.step()
    assert same(before, model.state_dict()) and same(states, states_of(optimizers))
    assert torch.equal(factors, trained.curvature.factors.buffer)
    assert trained.pruner.step_count == 3 and trained.pruner.widths() == {"0": 32, "2": 24}


# what no optimizer holds


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
