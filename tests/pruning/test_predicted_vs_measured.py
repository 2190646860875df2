"""Predicted against measured change of the loss: what is measured, what is recorded, how they correlate."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flatprune.criteria.loss_change import LossChange, divergence
from flatprune.cutting.surgery import plan
from flatprune.pruning.limits import LossBudget
from flatprune.pruning.predicted_vs_measured import (
    Cut,
    calibration,
    cuts,
    in_words,
    pearson,
    predicted_vs_measured,
    ranks,
)
from flatprune.pruning.removals import Removal
from flatprune.pruning.schedule import CubicSchedule
from flatprune.pruning.targets import Target
from kfac_ext.curvature.losses import loss_of
from tests.pruning.pruning_networks import NETWORKS, Run, chain, mlp


def removal(predicted: float | None, measured: float | None, step: int = 1, number: int = 0) -> dict:
    return {
        "kind": "removal",
        "step": step,
        "round": number,
        "predicted_change": predicted,
        "measured_change": measured,
    }


def test_correlation_by_hand():
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6)
    assert pearson([1.0, 2.0, 3.0], [0.0, 3.0, 3.0]) == pytest.approx(3 / math.sqrt(12))
    assert pearson([1.0, 2.0, 4.0, 8.0], [3.0, 5.0, 9.0, 17.0]) == pytest.approx(1.0)
    assert pearson([1.0, 2.0, 3.0], [9.0, 4.0, -1.0]) == pytest.approx(-1.0)
    x = torch.randn(9, generator=torch.Generator().manual_seed(0)).double()
    y = x.square() + x
    assert pearson(x.tolist(), y.tolist()) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]))


def test_ranks_share_ties():
    assert ranks([0.3, -1.0, 7.0, 0.3]) == [2.5, 1.0, 4.0, 2.5]
    assert ranks([5.0, 5.0, 5.0]) == [2.0, 2.0, 2.0]


def record(predicted, measured, step=1, compensated=True, factor=1.0):
    found = Removal.nothing(step, 10, 5.0, "params", 10.0, "", "removal")
    return replace(
        found, predicted_change=predicted, measured_change=measured, compensated=compensated, calibration=factor
    )


def test_cuts_so_far_calibrate_the_next():
    first, other = record(0.1, 0.3), record(0.6, 0.2, step=2, factor=3.0)
    assert calibration([], True) == 1.0
    assert calibration([first, first], True) == pytest.approx(3.0)  # two groups of one cut
    assert calibration([first, other], True) == pytest.approx((0.5 * 0.3 + 0.2) / (0.5 * 0.1 + 0.2))
    assert calibration([first], False) == 1.0  # another kind of prediction
    assert calibration([first, record(None, None, step=2), record(0.1, -0.2, step=3)], True) == pytest.approx(3.0)
    assert (calibration([record(1e-9, 1.0)], True), calibration([record(1.0, 1e-9)], True)) == (10.0, 0.1)


def test_records_tell_the_calibration():
    torch.manual_seed(0)
    run = Run(chain()).prune(400, params=0.2, criterion="obd", compensate=False)
    records = run.train(200)
    assert len({record.step for record in records}) > 2 and records[0].calibration == 1.0
    cuts = [record for record in records if record.kind == "removal"]
    for record in cuts:
        before = [other for other in records if other.step < record.step]
        assert record.calibration == calibration(before, False)
    assert cuts[-1].calibration != 1.0


def test_predicted_vs_measured_counts_each_cut_once():
    history = [
        {"kind": "epoch", "step": 1},
        removal(0.1, 0.2),
        removal(0.1, 0.2),  # another group of the same cut
        removal(0.2, 0.9, number=1),
        {**removal(None, None, step=2), "kind": "event"},
        removal(0.4, 0.8, step=3),
        removal(None, 0.5, step=4),
        removal(0.3, float("nan"), step=5),
    ]
    assert cuts(history) == [Cut(1, 0.1, 0.2), Cut(1, 0.2, 0.9), Cut(3, 0.4, 0.8)]
    found = predicted_vs_measured(history)
    assert (found["cuts"], found["predicted_sum"], found["measured_sum"]) == (3, pytest.approx(0.7), pytest.approx(1.9))
    assert found["spearman"] == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2
    assert found["pearson"] == pearson([0.1, 0.2, 0.4], [0.2, 0.9, 0.8])
    assert found["median_ratio"] == pytest.approx((4.5 + 2.0) / 2)  # not of the first, which nothing calibrated
    assert predicted_vs_measured(history[:1])["median_ratio"] is None


def test_too_few_or_constant_changes_have_no_correlation():
    assert predicted_vs_measured([removal(0.1, 0.2), removal(0.2, 0.3, step=2)])["pearson"] is None
    flat = predicted_vs_measured([removal(0.1, 0.1 * step, step=step) for step in range(5)])
    assert flat["cuts"] == 5 and flat["pearson"] is None and flat["spearman"] is None
    assert "too few" in in_words(flat)
    assert "no cut" in in_words(predicted_vs_measured([]))
    assert in_words(predicted_vs_measured([removal(0.01, 0.12)])).startswith(
        "1 cut: loss predicted +0.01, measured +0.12 (12 times as much)"
    )
    assert "hardly alike (Spearman -1.00" in in_words(
        predicted_vs_measured([removal(s, -s, step=s) for s in (1, 2, 3)])
    )


def test_divergence_is_the_expected_change_of_the_loss():
    generator, entropy = torch.Generator().manual_seed(0), loss_of("cross_entropy")
    before, after = (torch.randn(6, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for sample, position in itertools.product(range(6), range(3)):
        p = before[sample, :, position].softmax(0)
        for label in range(4):  # mean over labels of the model's own prediction
            losses = [
                nn.functional.cross_entropy(out[sample, :, position], torch.tensor(label)) for out in (before, after)
            ]
            total += float(p[label] * (losses[1] - losses[0]))
    assert divergence([before[:2], before[2:]], [after[:2], after[2:]], entropy) == pytest.approx(total / 18)
    assert divergence([before], [before], entropy) == pytest.approx(0.0, abs=1e-12)
    assert divergence([torch.zeros(2, 2)], [torch.tensor([[1.0, 0.0], [0.0, 3.0]])], loss_of("mse")) == 2.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_neuron_changes_the_loss_about_as_predicted(seed):
    torch.manual_seed(seed)
    schedule = CubicSchedule(100, 0.3, 0.4, 10)
    options = {"layers": ["3"], "criterion": "obd", "compensate": False, "schedule": schedule}
    run = Run(chain()).prune(100, target=Target(neurons=0.92), **options)  # 11 of 12
    (record,) = run.train(41)
    assert record.removed == 1
    assert 0.4 < record.measured_change / record.predicted_change < 2.5


def test_measuring_disturbs_nothing():
    def trained(measure: bool) -> tuple[list, dict[str, Tensor], dict]:
        torch.manual_seed(0)
        model = nn.Sequential(*chain()[:-1], nn.Dropout(0.3), chain()[-1])
        run = Run(model).prune(100, measure=measure)
        records = run.train(45)
        return records, run.model.state_dict(), run.curvature.state_dict()["factors"]

    (with_it, tensors, factors), (without, plain, plain_factors) = trained(True), trained(False)
    assert all(torch.equal(tensors[key], plain[key]) for key in plain)
    assert all(torch.equal(values, plain_factors[key]) for key, values in factors.items() if isinstance(values, Tensor))
    assert [r.neurons for r in with_it] == [r.neurons for r in without]
    assert all(r.measured_change is None and r.predicted_change is not None for r in without)
    assert all(r.measured_change > 0.0 for r in with_it)


def test_the_change_is_measured_on_the_newest_calls():
    run = Run(mlp())
    run.train(6)  # batches of 64
    change = LossChange(run.curvature)
    recent = torch.cat([call.args[0] for call in run.curvature.recent_calls[3:]])
    assert len(recent) == 64
    assert change.measure() == pytest.approx(0.0, abs=1e-9)
    before = copy.deepcopy(run.model)
    with torch.no_grad():
        run.model[5].bias += torch.linspace(0, 1, 10)
        expected = divergence([before(recent)], [run.model(recent)], loss_of("cross_entropy"))
    assert change.measure() == pytest.approx(expected, rel=1e-5)
    shown = LossChange(run.curvature, [before(call.args[0]).detach() for call in run.curvature.recent_calls])
    assert shown.measure() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Curvature")
@pytest.mark.parametrize("name", ["mlp", "grouped"])
def test_records_explain_themselves(name):
    torch.manual_seed(0)
    run = Run(NETWORKS[name]()).prune(100, params=0.4)
    run.train(run.pruner.schedule.events[0] - 1)
    pruner = run.pruner
    costs = pruner._tracker.on_paper().neuron_costs()
    records = run.train(1)
    positions = {group.name: number for number, group in enumerate(pruner.groups)}
    predicted = 0.0
    for record in records:
        assert record.neuron_cost == costs[positions[record.layer]]
        assert record.lowest_removed <= record.highest_removed
        if pruner.groups[positions[record.layer]].groups == 1:
            assert record.highest_removed <= record.lowest_kept
        predicted += record.neuron_cost * record.lowest_removed * record.removed
    (change,) = {record.predicted_change for record in records}
    assert predicted <= change * (1 + 1e-9)
    assert change <= sum(r.neuron_cost * r.highest_removed * r.removed for r in records) * (1 + 1e-9)
    assert len({record.measured_change for record in records}) == 1


def test_magnitudes_predict_no_loss():
    run = Run(mlp()).prune(100, params=0.4, criterion="l1")
    records = run.train(45)
    assert all(r.predicted_change is None and r.measured_change > 0.0 for r in records)
    assert all(r.lowest_removed > 0.0 for r in records)


def test_a_budget_of_predicted_loss_ends_an_event():
    def records(limit: float | None) -> list:
        torch.manual_seed(0)
        run = Run(mlp(60, 40)).prune(300, params=0.2, max_predicted_loss=limit)
        return run.train(118)

    free = records(None)
    sums = {record.step: record.predicted_change for record in free}
    limit = 0.5 * sums[60]
    bound = records(limit)
    assert {r.step for r in bound} == {r.step for r in free}
    for record in bound:
        assert record.predicted_change is None or record.predicted_change <= limit
    last_of_first = [r for r in bound if r.step == 60][-1]
    assert last_of_first.params_after > last_of_first.budget
    assert f"max_predicted_loss={limit:g} ended the event" in last_of_first.note
    # one neuron more would have been too much
    first_free = [r for r in free if r.step == 60]
    assert sum(r.removed for r in bound if r.step == 60) < sum(r.removed for r in first_free)


def test_a_budget_that_allows_nothing_says_so():
    torch.manual_seed(0)
    run = Run(mlp()).prune(100, params=0.4, max_predicted_loss=1e-12)
    with pytest.warns(UserWarning, match=r"max_predicted_loss=1e-12 ended the event at \d+ parameters, the budget was"):
        records = run.train(45)
    assert any(r.kind == "event" for r in records)
    for record in records:  # only neurons that do nothing may go
        assert "max_predicted_loss=1e-12 ended the event" in record.note
        assert record.note.startswith("nothing removed: ") == (record.removed == 0)
        assert record.removed == 0 or record.predicted_change <= 1e-12


def test_the_loss_budget_of_an_event_covers_all_its_cuts():
    run = Run(mlp(64, 64)).prune(10, params=0.05)  # one event of several cuts
    cut_sums = {r.round: r.predicted_change for r in run.train(5)}
    assert len(cut_sums) > 1
    limit = 1.5 * cut_sums[0]
    torch.manual_seed(0)
    bound = Run(mlp(64, 64)).prune(10, params=0.05, max_predicted_loss=limit)
    with pytest.warns(UserWarning, match="ended the event"):
        found = {r.round: r.predicted_change or 0.0 for r in bound.train(5)}
    assert sum(found.values()) <= limit


def test_a_loss_budget_refuses_once_it_is_spent():
    budget = LossBudget(1.0)
    assert budget.allows(0.6) and not budget.exceeded
    budget.spent += 0.6
    assert budget.allows(0.4)
    assert not budget.allows(0.5) and budget.exceeded
    assert LossBudget(None).allows(1e9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_predicted_loss": 0.0}, "max_predicted_loss is 0.0, expected a number above 0"),
        ({"max_predicted_loss": float("nan")}, "max_predicted_loss is nan"),
        ({"max_predicted_loss": 0.1, "criterion": "l1"}, "criterion 'l1' predicts no loss"),
    ],
)
def test_bad_loss_budgets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Run(mlp()).prune(100, **options)


def test_stopping_ends_pruning_for_good():
    run = Run(mlp(60, 40)).prune(300, params=0.2)
    run.train(62)
    widths = run.pruner.widths()
    with pytest.raises(ValueError, match="reason is empty"):
        run.pruner.stop("")
    record = run.pruner.stop("enough")
    assert (record.kind, record.removed, record.note) == ("stop", 0, "pruning stopped: enough")
    assert run.pruner.history[-1] is record
    assert run.train(70) == [] and run.pruner.widths() == widths
    assert not run.pruner.is_event()
    with pytest.raises(RuntimeError, match=r"stopped already \(enough\)"):
        run.pruner.stop("again")
    other = Run(mlp(60, 40)).prune(300, params=0.2)
    plan(other.model, other.pruner.coupling, {0: torch.arange(60 - widths["1"])}).commit()
    plan(other.model, other.pruner.coupling, {1: torch.arange(40 - widths["3"])}).commit()
    other.pruner.load_state_dict(run.pruner.state_dict())
    assert other.pruner.stopped == "enough" and other.pruner.history == run.pruner.history


def test_an_event_is_known_before_it_comes():
    run = Run(mlp()).prune(100, params=0.5)
    seen = []
    for step in range(1, 46):
        coming = run.pruner.is_event()
        assert bool(run.train(1)) == coming
        seen += [step] if coming else []
    assert tuple(seen) == run.pruner.schedule.events
