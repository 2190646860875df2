from __future__ import annotations

import copy

import pytest
import torch
from pruning_networks import Run, chain, digits, mlp
from torch import Tensor

from flatprune.criteria import CRITERIA, Evidence
from flatprune.criteria.joint import JointObs, JointOutgoing
from flatprune.cutting.graph import neuron_groups
from flatprune.pruning.costs import ParameterCount
from flatprune.pruning.greedy import select_greedily
from flatprune.pruning.selection import Limits, LossBudget, select


def evidence_of(run: Run) -> Evidence:
    return Evidence(run.model, neuron_groups(run.model, digits()[0][:2].to(run.dtype)).groups, run.curvature)


def joint_change(evidence: Evidence, criterion: str, layer: str, columns: list[int]) -> float:
    """The dense change when all these columns go at once."""
    V, G = evidence.curvature.folded_weight(layer), evidence.curvature.factors[f"{layer}.G"]
    middle = evidence.statistics("consumer").covariances[layer][columns][:, columns]
    if criterion == "obs":
        middle = torch.linalg.inv(evidence.inverses("consumer")[layer][0][columns][:, columns])
    return 0.5 * float((V[:, columns].T @ G @ V[:, columns] @ middle).trace())


@pytest.mark.parametrize(("criterion", "kind"), [("obs", JointObs), ("outgoing", JointOutgoing)])
@pytest.mark.parametrize(("name", "layer", "area"), [("mlp", "3", 1), ("chain", "3", 9)])
def test_each_neuron_is_the_one_that_brute_force_adds(double_nets, criterion, kind, name, layer, area):
    """The dense joint change of every set that has one neuron more: its minimum is the next to go, and the total."""
    evidence = evidence_of(double_nets[name])
    joint, gone = kind(evidence), []
    left = list(range(evidence.groups[0].width))
    for _ in range(4):
        columns = {j: [area * i + k for i in (*gone, j) for k in range(area)] for j in left}
        changes = {j: joint_change(evidence, criterion, layer, columns[j]) for j in left}
        best = min(changes, key=changes.__getitem__)
        scores = joint.scores[0]
        assert min(left, key=lambda j: float(scores[j])) == best
        joint.remove(0, best)
        gone.append(best)
        left.remove(best)
        assert joint.total == pytest.approx(changes[best], rel=1e-6)


def test_the_first_scores_are_the_independent_ones(double_nets):
    for name in ("mlp", "resnet", "grouped", "concat"):
        evidence = evidence_of(double_nets[name])
        for criterion, kind in (("obs", JointObs), ("outgoing", JointOutgoing)):
            for found, expected in zip(kind(evidence).scores, CRITERIA[criterion].scores(evidence)):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def paired_neurons() -> Evidence:
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
    return evidence_of(run)


@pytest.mark.filterwarnings("ignore:Curvature")
def test_where_neurons_stand_in_for_each_other_the_joint_choice_costs_less():
    evidence = paired_neurons()
    model, groups, limits = evidence.model, evidence.groups, Limits(1, 1, 1.0)
    scores = [s / c for s, c in zip(CRITERIA["obs"].scores(evidence), ParameterCount(model, groups).neuron_costs())]
    saved = []
    for count in range(2, 7):
        budget = sum(p.numel() for p in model.parameters()) - count * 75
        joint = JointObs(evidence)
        greedy = select_greedily(ParameterCount(model, groups), groups, joint, budget, limits)[0]
        alone = select(ParameterCount(model, groups), groups, scores, budget, limits)[0]
        assert len(greedy) == len(alone) == count
        assert joint.total == pytest.approx(joint_change(evidence, "obs", "3", greedy.tolist()), rel=1e-6)
        saved.append(joint.total / joint_change(evidence, "obs", "3", alone.tolist()))
    assert max(saved) < 1 + 1e-6
    assert min(saved) < 0.9


@pytest.mark.filterwarnings("ignore:Curvature")
def test_a_budget_of_loss_ends_the_greedy_choice():
    evidence = paired_neurons()
    limits = Limits(1, 1, 1.0)
    totals = []
    for limit in (None, 1e9, 0.5, 0.05):
        joint, losses = JointObs(evidence), LossBudget(limit)
        costs = ParameterCount(evidence.model, evidence.groups)
        select_greedily(costs, evidence.groups, joint, 0, limits, losses=losses)
        assert losses.exceeded == (limit is not None and limit < totals[0])
        assert limit is None or joint.total <= limit
        totals.append(joint.total)
    assert totals[0] == totals[1] > totals[2] > 0.0


def removed(model, **options: object) -> Tensor:
    run = Run(model).prune(100, params=0.4, selection="greedy", **options)
    run.train(45)
    assert run.pruner.params <= 0.4 * run.pruner.params_start
    return torch.tensor(list(run.pruner.widths().values()))


def test_the_pruner_reaches_its_target_greedily():
    removed(mlp())
    removed(chain())
    assert bool((removed(mlp(64, 40), round_to=8, compensate=True) % 8 == 0).all())


def test_auto_is_greedy_with_convolutions():
    def gone(model, selection, criterion="obs", compensate="auto"):
        options = {"selection": selection, "criterion": criterion, "compensate": compensate}
        records = Run(copy.deepcopy(model)).prune(100, params=0.3, **options).train(45)
        return [(record.layer, record.neurons) for record in records]

    convolutions, perceptron = chain(), mlp()
    assert gone(convolutions, "auto") == gone(convolutions, "greedy") != gone(convolutions, "independent")
    assert gone(convolutions, "auto", "outgoing") == gone(convolutions, "independent", "outgoing")
    assert gone(convolutions, "auto", compensate=False) == gone(convolutions, "independent", compensate=False)
    assert gone(perceptron, "auto") == gone(perceptron, "independent") != gone(perceptron, "greedy")


def test_only_criteria_with_joint_scores_select_greedily():
    with pytest.raises(ValueError, match=r"needs joint scores, which l1 has not; obs, outgoing have"):
        Run(mlp()).prune(100, criterion="l1", selection="greedy")
    with pytest.raises(ValueError, match="selection is 'magic', expected one of auto, independent, greedy"):
        Run(mlp()).prune(100, selection="magic")
