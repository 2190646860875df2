"""Pruning ends when the accuracy on held-out training images falls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flatprune.data import load_dataset
from flatprune.errors import InputError
from flatprune.pruning.predicted_vs_measured import predicted_vs_measured
from flatprune.reporting.progress import phase, remarks
from flatprune.settings import Settings
from flatprune.training.figures import results as figures
from flatprune.training.stopping import AccuracyGuard, hold_out
from flatprune.training.trainer import Trainer


def test_held_out_images_are_not_trained_on(npz):
    dataset = load_dataset(str(npz()))
    rest, x, y = hold_out(dataset, seed=3)
    assert (len(rest.x_train), len(x), len(y)) == (86, 10, 10)
    everything = torch.cat([rest.x_train, x]).flatten(1)
    assert sorted(everything.sum(1).tolist()) == pytest.approx(sorted(dataset.x_train.flatten(1).sum(1).tolist()))
    assert not (rest.x_train.flatten(1)[:, None] == x.flatten(1)[None]).all(dim=2).any()
    assert torch.equal(rest.x_test, dataset.x_test) and rest.digest == dataset.digest
    again = hold_out(dataset, seed=3)
    assert torch.equal(again[1], x) and not torch.equal(hold_out(dataset, seed=4)[1], x)
    trainer = Trainer(Settings(data=str(npz()), stop_accuracy_drop=5.0, batch_size=16), dataset)
    assert len(trainer.dataset.x_train) == 86 and len(trainer.guard.x) == 10
    with pytest.raises(InputError, match="14 are too few, need 20"):
        hold_out(load_dataset(str(npz()), train_size=14), seed=0)


def test_the_guard_objects_to_a_fall_below_the_best():
    accuracies = iter([50.0, 80.0, 76.0, 75.0, 74.9])
    guard = AccuracyGuard(torch.zeros(7, 1), torch.zeros(7), 5.0, lambda *_: (next(accuracies), 0.0))
    assert [guard.objection(torch.nn.Identity()) for _ in range(4)] == [""] * 4
    assert guard.objection(torch.nn.Identity()) == (
        "the accuracy on 7 held-out images fell from 80.00 % to 74.90 %, by more than 5 points"
    )
    assert guard.best == 80.0


def test_a_stop_ends_pruning_and_training_goes_on(npz, monkeypatch):
    path = str(npz())
    trainer = Trainer(Settings(data=path, batch_size=16, epochs=50, stop_accuracy_drop=5.0), load_dataset(path))
    events = trainer.pruner.schedule.events
    assert len(events) >= 3
    asked = []

    def objection(_model):
        asked.append(trainer.pruner.step_count + 1)
        return "it fell" if len(asked) == 2 else ""

    monkeypatch.setattr(trainer.guard, "objection", objection)
    trainer.train()
    assert asked == list(events[:2])
    records = [record for record in trainer.history if record["kind"] != "epoch"]
    assert {record["step"] for record in records[:-1]} == {events[0]}
    assert (records[-1]["kind"], records[-1]["note"]) == ("stop", "pruning stopped: it fell")
    assert trainer.progress.step == trainer.total_steps
    assert phase(trainer) == "pruning stopped"
    results = figures(trainer)
    assert results["pruning_stopped"] == "it fell" and results["cost_after"] == results["params_after"]
    assert remarks(results)[0] == "pruning stopped: it fell"


def test_phases_follow_the_schedule():
    def at(step: int, stopped: str = "") -> str:
        pruner = SimpleNamespace(step_count=step, stopped=stopped, schedule=SimpleNamespace(events=(40, 60, 80)))
        return phase(SimpleNamespace(pruner=pruner))

    assert [at(step) for step in (0, 39, 40, 79, 80)] == [
        *("training", "training", "pruning, event 1 of 3", "pruning, event 2 of 3", "settling")
    ]
    assert at(70, "enough") == "pruning stopped"
    assert phase(SimpleNamespace(pruner=None)) == "training"


def test_nothing_to_remark_on_a_run_without_pruning():
    assert remarks({"pruning_stopped": None, "predicted_vs_measured": predicted_vs_measured([])}) == []


def test_the_dense_comparison_neither_prunes_nor_stops():
    dense = Settings(target_macs=0.2, stop_accuracy_drop=3.0, max_predicted_loss=1.0, compare_dense=True).dense()
    assert (dense.target_params, dense.target_macs, dense.target.fraction) == (1.0, None, 1.0)
    assert dense.stop_accuracy_drop is None and dense.max_predicted_loss is None and not dense.compare_dense
