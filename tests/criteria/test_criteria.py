from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from flatprune.coupling import Coupling
from flatprune.criteria import CRITERIA, Criterion, ScoringContext, as_criterion, banzhaf, shapley
from flatprune.cutting import surgery
from flatprune.flatness.spectrum import Flatness
from flatprune.pruning.pruner import Pruner
from flatprune.pruning.targets import Target
from kfac_ext import Curvature
from tests.pruning.pruning_networks import Run, chain, context_of, digits, mlp

QUICK = {**CRITERIA, "shapley": shapley(80), "banzhaf": banzhaf(80)}


class Declared(ScoringContext):
    """Notes what a criterion asks for."""

    asked: frozenset[str] = frozenset()

    def statistics(self, role):
        self.asked |= {"factors"}
        return super().statistics(role)

    def inverses(self, role):
        self.asked |= {"inverses"}
        return super().inverses(role)

    def output_inverses(self):
        self.asked |= {"inverses"}
        return super().output_inverses()

    def gradient(self, parameter, name):
        self.asked |= {"gradients"}
        return super().gradient(parameter, name)

    def recent_calls(self):
        self.asked |= {"forwards"}
        return super().recent_calls()


@pytest.mark.parametrize("name", [name for name in QUICK if name != "bn_scale"])
def test_a_criterion_asks_for_what_it_declares(trained_nets, name):
    run = trained_nets["chain"]
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    random, mode, steps = torch.get_rng_state(), run.model.training, run.curvature.step_count
    context = Declared(run.model, run.groups, run.curvature, seed=1)
    scores = QUICK[name].scores(context)
    assert context.asked <= set(QUICK[name].needs)
    assert [len(score) for score in scores] == [group.width for group in run.groups]
    again = QUICK[name].scores(context_of(run, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(scores, again))
    assert all(torch.equal(before[key], value) for key, value in run.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert (mode, steps) == (run.model.training, run.curvature.step_count)
    assert not any(module._forward_hooks for module in run.model.modules())


def test_other_seeds_and_steps_draw_other_numbers(trained_nets):
    first, *others = (
        CRITERIA["random"].scores(context_of(trained_nets["mlp"], *at)) for at in ((0, 0), (1, 0), (0, 1))
    )
    assert not any(torch.equal(first[0], other[0]) for other in others)


def mean_loss(model: nn.Module) -> float:
    x, y = digits()
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


def real_changes(run: Run, context: ScoringContext, criterion: Criterion, compensate: bool) -> list[float]:
    """The loss after each single removal, survivors updated where that belongs to the criterion."""
    start, changes = mean_loss(copy.deepcopy(run.model)), []
    for position, group in enumerate(context.groups):
        for j in range(group.width):
            pruned = {position: torch.tensor([j])}
            values = criterion.compensation(context, pruned) if compensate else None
            model, groups = copy.deepcopy((run.model, list(context.groups)))
            surgery.plan(model, Coupling(groups), pruned, replacements=values).commit()
            changes.append(mean_loss(model) - start)
    return changes


BOUNDS = {  # least rank correlation with real removals on the perceptron and on the conv net
    "obd": (0.85, 0.8),
    "kron_obd": (0.8, 0.5),
    "kron_obs": (0.7, 0.3),
    "c_obd": (0.8, 0.7),
    "c_obs": (0.8, 0.4),
    "taylor": (0.5, 0.5),
    "gate_fisher": (0.8, 0.4),
    "l1": (0.7, 0.4),
    "l2": (0.7, 0.4),
    "fpgm": (0.8, 0.7),
    "banzhaf": (0.7, 0.6),
    "shapley": (0.4, 0.3),
}


@pytest.fixture(scope="module")
def plain_changes(trained_nets) -> dict[str, list[float]]:
    """Real changes of the loss without compensation, which are the same for every criterion."""
    return {
        net: real_changes(trained_nets[net], context_of(trained_nets[net]), CRITERIA["obd"], compensate=False)
        for net in ("mlp", "chain")
    }


@pytest.mark.parametrize("net", ["mlp", "chain"])
@pytest.mark.parametrize("name", BOUNDS)
def test_scores_rank_neurons_like_their_real_removal(trained_nets, plain_changes, net, name):
    run = trained_nets[net]
    context, criterion = context_of(run), CRITERIA[name] if name not in ("shapley", "banzhaf") else None
    criterion = criterion or (shapley(240) if name == "shapley" else banzhaf(240))
    always = criterion.compensates == "always"
    real = real_changes(run, context, criterion, compensate=True) if always else plain_changes[net]
    correlation = float(spearmanr(torch.cat(criterion.scores(context)), real).statistic)
    assert correlation >= BOUNDS[name][net == "chain"]


def conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers.insert(6, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize(
    ("build", "bound", "seed"),
    [
        (lambda: mlp(32, 24), 0.85, 0),
        (lambda: mlp(32, 24), 0.85, 1),
        pytest.param(conv_net, 0.8, 0, marks=pytest.mark.thorough),
    ],
    ids=["mlp", "another mlp", "conv"],
)
def test_scores_of_the_method_rank_neurons_of_any_seed(build, bound, seed):
    """In a trained network: the learning rate falls to 0 from 40 % on, and with it the first-order term left out."""
    torch.manual_seed(seed)
    run = Run(build())
    for step in range(0, 400, 10):
        run.optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * max(0.0, step / 400 - 0.4) / 0.6))
        run.train(10)
    context = context_of(run)
    real = real_changes(run, context, CRITERIA["obd"], compensate=False)
    for name in ("obs", "obd"):
        assert float(spearmanr(torch.cat(CRITERIA[name].scores(context)), real).statistic) >= bound, name


@pytest.mark.parametrize(("net", "bound"), [("mlp", 0.5), ("chain", 0.7)])
def test_the_obs_score_ranks_removals_with_compensation(trained_nets, net, bound):
    """Less sharply than plain removals: what compensation leaves is small beside what the quadratic model misses."""
    run, obs = trained_nets[net], CRITERIA["obs"]
    context = context_of(run)
    real = real_changes(run, context, obs, compensate=True)
    assert float(spearmanr(torch.cat(obs.scores(context)), real).statistic) >= bound


def test_criteria_that_do_not_apply_name_the_layer():
    with pytest.raises(ValueError, match=r"criterion bn_scale: no norm with a scale .* follows layer '1'"):
        Run(mlp()).prune(100, criterion="bn_scale")
    Run(chain()).prune(100, criterion="bn_scale", layers=["0", "3"])
    run = Run(mlp())
    run.train(3)
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"1\.weight has no gradient"):
        CRITERIA["taylor"].scores(context_of(run))


def test_a_criterion_of_ones_own():
    def last_first(context: ScoringContext) -> list:
        return [-torch.arange(group.width, dtype=torch.float32) for group in context.groups]

    run = Run(mlp()).prune(100, params=0.5, criterion=last_first)
    for record in run.train(45):
        assert record.neurons == tuple(range(record.width_before - record.removed, record.width_before))
    assert run.pruner.state_dict()["criterion"] == "last_first"
    with pytest.raises(ValueError, match=r"criterion short: scores of '1' have shape \(3,\), expected \(24,\)"):
        Criterion("short", lambda e: [torch.zeros(3)] * len(e.groups)).scores(context_of(Run(mlp())))
    with pytest.raises(ValueError, match="criterion bad: scores of '1' are not finite"):
        Criterion("bad", lambda e: [torch.full((g.width,), torch.nan) for g in e.groups]).scores(context_of(Run(mlp())))
    with pytest.raises(TypeError, match="criterion is 3, expected a name"):
        as_criterion(3)
    with pytest.raises(ValueError, match="Criterion odd: needs is 'luck'"):
        Criterion("odd", last_first, needs=("luck",))
    with pytest.raises(ValueError, match="greedy is True, but there are no joint scores"):
        Criterion("hasty", last_first, greedy=True)


@pytest.mark.parametrize(
    "name", ["taylor", "gate_fisher", "fpgm", "l2_uniform", "c_obs", "kron_obd", "c_obd", "random"]
)
def test_the_pruner_reaches_its_target_by_any_name(name):
    run = Run(chain()).prune(100, params=0.4, criterion=name)
    records = run.train(45)
    assert run.pruner.params <= 1.01 * 0.4 * run.pruner.params_start
    assert all(record.compensated == (name == "c_obs") for record in records)


def test_a_loss_that_is_not_known_is_refused_by_what_reads_it():
    model = mlp(8, 6)
    curvature = Curvature(model, loss="other", fisher_type="empirical")
    with pytest.raises(ValueError, match=r"criterion 'shapley' reads the model's output, .* name the loss"):
        Pruner(model, None, curvature, digits()[0][:2], target=Target(0.5), total_steps=4, criterion="shapley")
    with pytest.raises(ValueError, match="Flatness: the curvature's loss is 'other'"):
        Flatness(curvature, total_steps=4)


def test_the_pruner_can_say_what_the_loss_is_of():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), TwoOutputs())
    curvature = Curvature(model)
    options = {"target": Target(0.8), "total_steps": 4}
    with pytest.raises(ValueError, match=r"the loss may be of output\[0\] .* or output\[1\]"):
        Pruner(model, None, curvature, digits()[0][:2], **options)
    Pruner(model, None, curvature, digits()[0][:2], output=0, **options)
    with pytest.raises(ValueError, match="output is 0 already, and now 1"):
        Pruner(model, None, curvature, digits()[0][:2], output=1, **options)


class TwoOutputs(nn.Module):
    """Logits and probabilities."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        logits = self.head(x)
        return logits, logits.softmax(1)


class Scaled(nn.Module):
    """Channels that a learned vector makes of one number of each sample."""

    def __init__(self):
        super().__init__()
        self.vector, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.vector * x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "obs"])
def test_a_learned_vector_makes_its_channels_itself(criterion):
    model = Scaled()
    curvature, x = Curvature(model), torch.randn(8, 4)
    pruner = Pruner(model, None, curvature, x, target=Target(0.7), total_steps=1, criterion=criterion)
    (group,) = pruner.groups
    assert group.producers() == [""] and group.width == 6
    model(x).sum().backward()
    context = ScoringContext(model, pruner.groups, curvature)
    (scores,) = CRITERIA[criterion].scores(context)
    if criterion == "l1":
        torch.testing.assert_close(scores, model.vector.detach().abs().double())
    assert len(scores) == 6 and bool(scores.isfinite().all())
