from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from flatprune.coupling import find_coupling
from flatprune.criteria import CRITERIA, ScoringContext
from flatprune.criteria.joint import JointObd, JointObs
from flatprune.criteria.members import lost_channels
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.limits import Limits, LossBudget
from flatprune.pruning.selection import End, select, select_greedily
from flatprune.pruning.ties import find_ties
from tests.pruning.greedy_oracle import DirectObs, select_directly
from tests.pruning.pruning_networks import Run, chain, digits, mlp


def context_of(run: Run) -> ScoringContext:
    return ScoringContext(run.model, find_coupling(run.model, digits()[0][:2].to(run.dtype)).groups, run.curvature)


def joint_change(context: ScoringContext, criterion: str, layer: str, columns: list[int]) -> float:
    """The dense change when all these columns go at once."""
    V, G = context.curvature.folded_weight(layer), context.curvature.factors[f"{layer}.G"]
    middle = context.statistics("consumer").covariances[layer][columns][:, columns]
    if criterion == "obs":
        middle = torch.linalg.inv(context.inverses("consumer")[layer][0][columns][:, columns])
    return 0.5 * float((V[:, columns].T @ G @ V[:, columns] @ middle).trace())


@pytest.mark.parametrize(("criterion", "kind"), [("obs", JointObs), ("obd", JointObd)])
@pytest.mark.parametrize(("name", "layer", "area"), [("mlp", "3", 1), ("chain", "3", 9)])
def test_each_neuron_is_the_one_that_brute_force_adds(double_nets, criterion, kind, name, layer, area):
    """The dense joint change of every set that has one neuron more: its minimum is the next to go, and the total."""
    context = context_of(double_nets[name])
    joint, pruned = kind(context), []
    left = list(range(context.groups[0].width))
    for _ in range(4):
        columns = {j: [area * i + k for i in (*pruned, j) for k in range(area)] for j in left}
        changes = {j: joint_change(context, criterion, layer, columns[j]) for j in left}
        best = min(changes, key=changes.__getitem__)
        scores = joint.scores[0]
        assert min(left, key=lambda j: float(scores[j])) == best
        joint.remove(0, [best])
        pruned.append(best)
        left.remove(best)
        assert joint.total == pytest.approx(changes[best], rel=1e-6)


def test_the_first_scores_are_the_independent_ones(double_nets):
    for name in ("mlp", "resnet", "grouped", "concat"):
        context = context_of(double_nets[name])
        for criterion, kind in (("obs", JointObs), ("obd", JointObd)):
            for found, expected in zip(kind(context).scores, CRITERIA[criterion].scores(context)):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "chain", "resnet", "grouped", "concat"])
@pytest.mark.parametrize(
    ("fraction", "limits", "closely", "share"),
    [
        (0.6, Limits(1, 2, 0.5), False, None),
        pytest.param(0.4, Limits(1, 1, 1.0), True, None, marks=pytest.mark.thorough),
        (0.5, Limits(4, 2, 0.8), True, None),
        pytest.param(0.3, Limits(2, 2, 1.0), False, 0.3, marks=pytest.mark.thorough),
    ],
)
def test_the_direct_algorithm_chooses_the_same(double_nets, name, fraction, limits, closely, share):
    """With several consumers, slices, rounding, budgets and limits of the loss; the same weights come of it."""
    context = context_of(double_nets[name])
    model, groups = context.model, context.groups
    options = {"ties": find_ties(groups, False), "end": End(closely=closely)}
    budget = fraction * sum(parameter.numel() for parameter in model.parameters())

    def chosen(kind, way, limit):
        joint, losses = kind(context), LossBudget(limit)
        found = way(ParameterCount(model, groups), groups, joint, budget, limits, losses=losses, **options)
        return {position: list(map(int, neurons)) for position, neurons in found.items()}, joint

    _, whole = chosen(DirectObs, select_directly, None)
    limit = None if share is None else share * whole.total
    expected, direct = chosen(DirectObs, select_directly, limit)
    found, joint = chosen(JointObs, select_greedily, limit)
    assert found == expected and found
    assert joint.total == pytest.approx(direct.total, rel=1e-9)
    pruned = {position: torch.tensor(neurons) for position, neurons in found.items()}
    jointly, afterwards = joint.compensated(), CRITERIA["obs"].compensation(context, pruned)
    assert jointly.keys() == afterwards.keys()
    for layer, lost in lost_channels(context.layers, groups, pruned, "consumer"):
        if layer.groups == 1:
            tensors = [values[layer.weight_name].movedim(layer.input_dim, 0)[~lost] for values in (jointly, afterwards)]
            torch.testing.assert_close(*tensors, rtol=1e-8, atol=1e-10)
    for key in jointly.keys() - {layer.weight_name for layer in context.layers.values()}:
        torch.testing.assert_close(jointly[key], afterwards[key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [JointObs, JointObd])
@pytest.mark.parametrize("name", ["resnet", "grouped", "concat"])
def test_a_change_is_told_before_anything_goes(double_nets, kind, name):
    context = context_of(double_nets[name])
    joint, other = kind(context), kind(context_of(double_nets[name]))
    several = {position: [0, 3] for position in range(min(2, len(context.groups)))}
    told = joint.change(several)
    assert joint.total == 0.0
    for position, neurons in several.items():
        joint.remove(position, neurons)
        for neuron in neurons:
            other.remove(position, [neuron])
    assert joint.total == pytest.approx(told, rel=1e-9) == pytest.approx(other.total, rel=1e-9)


def test_a_layer_whose_inverse_is_indefinite_is_named(double_nets):
    context = context_of(double_nets["mlp"])
    H = context.inverses("consumer")["3"][0]
    H[2, 2] = -1.0
    with pytest.raises(ValueError, match=r"^3: the inverse .* not positive definite at the columns of neuron 2 of '1'"):
        JointObs(context)


def paired_neurons() -> ScoringContext:
    """A network whose hidden neurons come in four equal pairs: one of a pair is free, both are not."""
    torch.manual_seed(0)
    run = Run(mlp(8).double())
    run.train(40)
    first = run.model[1]
    with torch.no_grad():
        first.weight[4:], first.bias[4:] = first.weight[:4], first.bias[:4]
    run.curvature.factor_decay = 0.0
    run.curvature.step_count = 0
    run.model(digits()[0][:256].double())
    return context_of(run)


@pytest.mark.filterwarnings("ignore:Curvature")
def test_of_equal_neurons_the_joint_choice_costs_less():
    context = paired_neurons()
    model, groups, limits = context.model, context.groups, Limits(1, 1, 1.0)
    scores = [s / c for s, c in zip(CRITERIA["obs"].scores(context), ParameterCount(model, groups).neuron_costs())]
    saved = []
    for count in range(2, 7):
        budget = sum(p.numel() for p in model.parameters()) - count * 75
        joint = JointObs(context)
        greedy = select_greedily(ParameterCount(model, groups), groups, joint, budget, limits)[0]
        alone = select(ParameterCount(model, groups), groups, scores, budget, limits)[0]
        assert len(greedy) == len(alone) == count
        assert joint.total == pytest.approx(joint_change(context, "obs", "3", greedy.tolist()), rel=1e-6)
        saved.append(joint.total / joint_change(context, "obs", "3", alone.tolist()))
    assert max(saved) < 1 + 1e-6
    assert min(saved) < 0.9


@pytest.mark.filterwarnings("ignore:Curvature")
def test_a_budget_of_loss_ends_the_greedy_choice():
    context = paired_neurons()
    limits = Limits(1, 1, 1.0)
    totals = []
    for limit in (None, 1e9, 0.5, 0.05):
        joint, losses = JointObs(context), LossBudget(limit)
        costs = ParameterCount(context.model, context.groups)
        select_greedily(costs, context.groups, joint, 0, limits, losses=losses)
        assert losses.exceeded == (limit is not None and limit < totals[0])
        assert limit is None or joint.total <= limit
        totals.append(joint.total)
    assert totals[0] == totals[1] > totals[2] > 0.0


def removed(model, **options: object) -> Tensor:
    run = Run(model).prune(100, params=0.4, selection="greedy", **options)
    run.train(45)
    assert run.pruner.params <= 1.01 * 0.4 * run.pruner.params_start
    return torch.tensor(list(run.pruner.widths().values()))


def test_the_pruner_reaches_its_target_greedily():
    removed(mlp())
    removed(chain())
    assert bool((removed(mlp(64, 40), round_to=8, compensate=True) % 8 == 0).all())


def test_auto_is_greedy_with_convolutions():
    def pruned(model, selection, criterion="obs", compensate="auto"):
        options = {"selection": selection, "criterion": criterion, "compensate": compensate}
        records = Run(copy.deepcopy(model)).prune(100, params=0.3, **options).train(45)
        return [(record.layer, record.neurons) for record in records]

    convolutions, perceptron = chain(), mlp()
    assert pruned(convolutions, "auto") == pruned(convolutions, "greedy") != pruned(convolutions, "independent")
    assert pruned(convolutions, "auto", "obd") == pruned(convolutions, "independent", "obd")
    assert pruned(convolutions, "auto", compensate=False) == pruned(convolutions, "independent", compensate=False)
    assert pruned(perceptron, "auto") == pruned(perceptron, "independent") != pruned(perceptron, "greedy")


def test_only_criteria_with_joint_scores_select_greedily():
    with pytest.raises(ValueError, match=r"needs joint scores, which l1 has not; obs, obd have"):
        Run(mlp()).prune(100, criterion="l1", selection="greedy")
    with pytest.raises(ValueError, match="selection is 'magic', expected one of auto, independent, greedy"):
        Run(mlp()).prune(100, selection="magic")
