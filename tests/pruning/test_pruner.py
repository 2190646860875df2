from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import nn

from flatprune.cutting.surgery import sync_attributes
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature
from tests.conftest import thorough
from tests.pruning.pruning_networks import NETWORKS, Concat, Run, chain, digits, mlp, sgd

MORE = [
    *itertools.product(("obd", "l1_uniform"), ("resnet", "attention")),
    *itertools.product(("kron_obs", "l1"), ("grouped", "transposed")),
]
SELDOM = [("obd", "attention"), ("l1_uniform", "resnet"), ("kron_obs", "grouped"), ("l1", "transposed")]


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize(("criterion", "name"), thorough([*(("obs", name) for name in NETWORKS), *MORE], seldom=SELDOM))
def test_the_target_is_reached_and_the_records_agree(name, criterion):
    torch.manual_seed(0)
    run = Run(NETWORKS[name]()).prune(100, params=0.4, criterion=criterion)
    pruner, start = run.pruner, run.pruner.params
    widths = pruner.widths()
    records = run.train(45)
    assert pruner.params == sum(p.numel() for p in run.model.parameters())
    assert 0.25 * start < pruner.params <= 1.01 * 0.4 * start
    assert records == pruner.history
    for record in records:
        assert record.step in pruner.schedule.events
        if not record.removed:  # an event before took more than its budget asked for
            assert record.params_after <= 1.01 * record.budget
            continue
        assert record.params_after < record.params_before
        assert record.removed == len(record.neurons) == record.width_before - record.width_after
        assert record.removed <= 0.5 * record.width_before
        assert widths[record.layer] == record.width_before
        assert record.width_after >= 2
        widths[record.layer] = record.width_after
    assert widths == pruner.widths()
    run.train(5)


def test_each_event_meets_its_budget():
    run = Run(mlp(60, 40)).prune(300, params=0.2)
    records = run.train(130)
    steps = {record.step: record for record in records}
    assert tuple(steps) == run.pruner.schedule.events
    for record in steps.values():
        assert record.params_after <= 1.01 * record.budget <= record.params_before
        assert record.params_after > record.budget - 80  # a neuron has at most 64 + 1 + 40 parameters
    assert run.pruner.params == records[-1].params_after


def test_compensation_is_automatic():
    def compensated(model: nn.Module, params: float, **options: object) -> list[bool]:
        records = Run(model).prune(100, params=params, **options).train(45)
        return [next(r.compensated for r in records if r.step == step) for step in {r.step: None for r in records}]

    assert all(compensated(chain(), 0.3))
    assert not any(compensated(chain(), 0.3, criterion="l1"))
    assert not any(compensated(mlp(), 0.3))
    assert compensated(mlp(100, 60), 0.03) == [False, True]
    assert all(compensated(mlp(), 0.3, compensate=True))


def test_obs_without_automatic_compensation_is_the_obd_score():
    def neurons(**options: object) -> list[tuple[int, ...]]:
        torch.manual_seed(0)
        return [record.neurons for record in Run(mlp(40, 30)).prune(100, params=0.3, **options).train(45)]

    obd = neurons(criterion="obd")
    assert neurons(criterion="obs") == obd
    assert neurons(criterion="obs", compensate=False) != obd


def test_compensation_keeps_more_accuracy_after_the_cut():
    """Real data: after a removal without further training, the compensated network classifies better."""
    x, y = digits()

    def accuracy(compensate: bool) -> float:
        torch.manual_seed(3)
        run = Run(chain()).prune(400, params=0.2, compensate=compensate)
        run.train(run.pruner.schedule.events[2])
        run.model.eval()
        with torch.no_grad():
            return float((run.model(x).argmax(1) == y).float().mean())

    assert accuracy(True) > accuracy(False)


def test_the_last_event_goes_on_until_the_target_is_reached():
    run = Run(mlp(64, 64)).prune(10, params=0.05)  # a single event; half of a layer at once is not enough
    records = run.train(5)
    assert run.pruner.params <= 1.01 * 0.05 * run.pruner.params_start
    assert [r.layer for r in records].count("1") > 1
    assert len({r.step for r in records}) == 1


def test_a_target_out_of_reach_is_said_with_the_figure():
    run = Run(mlp(8, 8)).prune(100, params=0.1, min_width=4)
    reachable = run.pruner.reachable_params()
    assert reachable > 0.1 * run.pruner.params
    with pytest.warns(UserWarning, match=rf"out of reach: {reachable} are left with min_width=4"):
        records = run.train(45)
    assert run.pruner.params == reachable == records[-1].params_after
    assert "out of reach" in records[-1].note
    assert set(run.pruner.widths().values()) == {4}


def test_an_event_that_removes_nothing_says_so():
    run = Run(mlp()).prune(100, params=1.0)
    records = run.train(45)
    assert [r.step for r in records] == list(run.pruner.schedule.events)
    assert all(r.removed == 0 and r.layer == "" and "nothing removed: the budget is met" in r.note for r in records)
    assert run.pruner.history == records
    run = Run(mlp(2, 2)).prune(100, params=0.5)
    with pytest.warns(UserWarning, match="out of reach"):
        records = run.train(45)
    assert "the limits let no group" in records[0].note
    assert "out of reach" in records[-1].note


def test_rounding():
    run = Run(mlp(64, 40)).prune(100, params=0.3, round_to=8)
    run.train(45)
    assert all(width % 8 == 0 for width in run.pruner.widths().values())
    assert run.pruner.params <= 1.01 * 0.3 * run.pruner.params_start


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"criterion": "magic"}, ValueError, "criterion is 'magic', expected one of obs"),
        ({"compensate": "maybe"}, ValueError, "compensate is 'maybe'"),
        ({"round_to": 0}, ValueError, "round_to is 0"),
        ({"min_width": 0}, ValueError, "min_width is 0"),
        ({"max_layer_fraction": 0.0}, ValueError, "max_layer_fraction is 0.0"),
        ({"total_steps": 0}, ValueError, "total_steps is 0"),
        ({"target": 0.5}, TypeError, r"target is 0\.5, expected a flatprune\.Target"),
        ({"exclude": "1"}, TypeError, "exclude is '1', expected a list of names"),
        ({"layers": "1"}, TypeError, "layers is '1', expected a list of names"),
        ({"exclude": ["9"]}, KeyError, "no module named '9'"),
        ({"layers": ["9"]}, KeyError, "no module named '9'"),
        ({"layers": ["5"]}, ValueError, "layer '5' cannot be pruned: it is an output of the model"),
        ({"layers": ["2"]}, ValueError, "layer '2' cannot be pruned: it is no Linear or convolution"),
        ({"exclude": ["1", "3"]}, ValueError, "no layer can be pruned: '1': it is excluded"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    model = mlp()
    arguments = {"target": Target(0.5), "total_steps": 100, **options}
    with pytest.raises(error, match=message):
        Pruner(model, sgd(model), Curvature(model), digits()[0][:2], **arguments)


def test_foreign_optimizers_and_curvatures_are_refused():
    model, other = mlp(), mlp()
    arguments = {"target": Target(0.5), "total_steps": 100}
    with pytest.raises(ValueError, match="Pruner: optimizer: SGD holds no parameter of the model"):
        Pruner(model, sgd(other), Curvature(model), digits()[0][:2], **arguments)
    with pytest.raises(ValueError, match="curvature belongs to another model"):
        Pruner(model, sgd(model), Curvature(other), digits()[0][:2], **arguments)


def test_layers_and_exclude_choose_what_is_pruned():
    for options in ({"layers": ["3"]}, {"exclude": ["1"]}):
        run = Run(mlp()).prune(100, params=0.9, **options)
        run.train(45)
        assert run.model[1].out_features == 24
        assert run.model[3].out_features < 16


def test_layers_without_factors_are_judged_by_magnitude():
    for criterion, widths in (("obs", {"3"}), ("l1", {"1", "3"})):
        model = mlp()
        curvature = Curvature(model, skip_layers=[r"^3$"])
        arguments = {"target": Target(0.7), "total_steps": 100, "criterion": criterion}
        if criterion == "obs":
            with pytest.warns(UserWarning, match="'1': layer '3', which reads it, has no factors"):
                pruner = Pruner(model, sgd(model), curvature, digits()[0][:2], **arguments)
        else:
            pruner = Pruner(model, sgd(model), curvature, digits()[0][:2], **arguments)
        assert set(pruner.widths()) == widths


@pytest.mark.filterwarnings("ignore:Curvature")
def test_only_surprising_refusals_are_warned_of(recwarn):
    Run(Concat()).prune(100)
    assert not [w for w in recwarn if "Pruner" in str(w.message)]


def test_magnitudes_may_be_compensated_too():
    run = Run(chain()).prune(100, params=0.4, criterion="l1", compensate=True)
    assert all(record.compensated for record in run.train(45))
    assert run.pruner.params <= 1.01 * 0.4 * run.pruner.params_start


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["mlp", "chain", "depthwise", "grouped"])
def test_on_a_cuda_device(name):
    x, y = (t.cuda() for t in digits())
    model = NETWORKS[name]().cuda().train()
    optimizer, curvature = sgd(model), Curvature(model)
    pruner = Pruner(model, optimizer, curvature, x[:2], target=Target(0.4), total_steps=100, compensate=True)
    for step in range(45):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[step::45]), y[step::45]).backward()
        optimizer.step()
        pruner.step()
    assert pruner.params <= 1.01 * 0.4 * pruner.params_start
    assert all(p.is_cuda for p in model.parameters())


def test_no_optimizer_is_needed():
    model = mlp()
    curvature = Curvature(model)
    pruner = Pruner(model, None, curvature, digits()[0][:2], target=Target(0.5), total_steps=5)
    model(digits()[0][:64])
    assert [record for _ in range(5) for record in pruner.step()]
    assert pruner.params <= 1.01 * 0.5 * pruner.params_start


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("name", ["mlp", "chain", "grouped"])
def test_going_on_from_a_state_gives_the_same_network(name):
    def start() -> Run:
        torch.manual_seed(0)
        return Run(NETWORKS[name]())

    straight = start().prune(150, params=0.3)
    straight.train(80)

    first = start().prune(150, params=0.3)
    first.train(45)  # after the first event, in the midst of the schedule
    assert 0 < len({r.step for r in first.pruner.history}) < len(first.pruner.schedule.events)
    buffer = io.BytesIO()
    parts = {"model": first.model, "optimizer": first.optimizer, "curvature": first.curvature, "pruner": first.pruner}
    torch.save({key: part.state_dict() for key, part in parts.items()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    model = NETWORKS[name]()
    own = model.state_dict(keep_vars=True)
    for key, tensor in state["model"].items():
        own[key].data = tensor
    sync_attributes(model)
    second = Run(model)
    second.prune(150, params=0.3)
    second.optimizer.load_state_dict(state["optimizer"])
    second.curvature.load_state_dict(state["curvature"])
    second.pruner.load_state_dict(state["pruner"])
    second.step_count = 45
    second.train(35)

    assert second.pruner.history == straight.pruner.history
    assert second.pruner.widths() == straight.pruner.widths()
    for key, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key]), key


def test_a_state_that_does_not_fit_changes_nothing():
    run = Run(mlp()).prune(100, params=0.5)
    run.train(25)
    state = run.pruner.state_dict()
    for options, message in (
        ({"params": 0.4}, "target is"),
        ({"total_steps": 200}, "events is"),
        ({"criterion": "obd"}, "criterion is 'obs' in the state, expected 'obd'"),
        ({}, "neurons in the state, 24 in the model; load the pruned model first"),
    ):
        other = Run(mlp()).prune(**{"total_steps": 100, "params": 0.5, **options})
        before = other.pruner.state_dict()
        with pytest.raises(ValueError, match=message):
            other.pruner.load_state_dict(state)
        assert other.pruner.state_dict() == before


def test_a_step_before_any_forward_counts_as_none():
    """Long before the first event; a forward in evaluation mode is none."""
    model = mlp()
    pruner = Pruner(model, None, Curvature(model), digits()[0][:2], target=Target(0.5), total_steps=100)
    model.eval()(digits()[0][:8]).sum().backward()
    assert not pruner.is_event()
    with pytest.raises(RuntimeError, match="no training forward, by which criterion 'obs' judges; calls in evaluation"):
        pruner.step()
    assert pruner.step_count == 0
