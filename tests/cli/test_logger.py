"""`flatprune run --logger`: curves of a run beside its files, loggers that cannot be had or fail."""

import json
from functools import partial

import pytest

from flatprune import runs
from flatprune.checkpoint import load_checkpoint
from flatprune.integrations.loggers import LOGGERS
from flatprune.reporting.logged import LoggedRun, Observers
from flatprune.settings import Settings
from flatprune.training.trainer import Observer
from tests.integrations.tensorboard_files import scalars_in

EVENTS = {"prune_start": 0.2, "prune_end": 0.85, "prune_every": 2}
RUN = ("run", "--epochs", 2, "--target-params", 0.3, "--prune-end", 0.8)


def test_curves_are_those_of_the_history(flatprune, npz, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    outcome = flatprune(*RUN, "--data", npz(), "--compare-dense", "--logger", "tensorboard", "--out", out)
    assert outcome.code == 0, outcome.err
    _, *history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    epochs = [record for record in history if record["kind"] == "epoch"]
    removals = [record for record in history if record["kind"] == "removal"]
    curves = scalars_in(out / "tensorboard/pruned")
    for key, name in (("train_loss", "train/loss"), ("test_accuracy", "test/accuracy")):
        assert curves[name] == [(record["step"], pytest.approx(record[key])) for record in epochs]
    removed = {}
    for record in removals:
        removed[record["step"]] = removed.get(record["step"], 0) + record["removed"]
    assert curves["event/removed"] == sorted(removed.items()) and removed
    assert len(curves["event/predicted_change"]) == len(removed)
    summary = json.loads((out / "summary.json").read_text())
    assert curves["size/macs"][0] == (0, summary["macs_before"])
    assert curves["size/macs"][-1][1] == summary["macs_after"]
    assert curves["size/params"][-1][1] == summary["params_after"]
    assert curves["width/1"][-1][1] == summary["widths_after"]["1"] < curves["width/1"][0][1]
    dense = scalars_in(out / "tensorboard/dense")
    assert len(dense["test/loss"]) == 2 and "event/removed" not in dense


class Killed(Observer):
    """Ends the run in its second epoch, without a checkpoint of that."""

    def step(self, trainer):
        if trainer.progress.step == trainer.total_steps - 1:
            raise KeyboardInterrupt


def test_curves_go_on_with_a_resumed_run(flatprune, npz, tmp_path):
    pytest.importorskip("tensorboard")
    out, data = tmp_path / "out", npz()

    def observer(title):
        return Observers(LoggedRun("tensorboard", partial(LOGGERS["tensorboard"], out, title)), Killed())

    settings = Settings(data=str(data), epochs=2, target_params=0.3, batch_size=16, **EVENTS)
    with pytest.raises(KeyboardInterrupt):
        runs.run(settings, out, observer=observer)
    before = scalars_in(out / "tensorboard/pruned")["event/removed"]
    assert before[-1][0] > load_checkpoint(out / "checkpoint.pt")["progress"]["step"] > 0  # what it does not know of
    outcome = flatprune("run", "--resume", "--logger", "tensorboard", "--out", out)
    assert outcome.code == 0, outcome.err
    curves = scalars_in(out / "tensorboard/pruned")
    _, *history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    events = sorted({record["step"] for record in history if record["kind"] == "removal"})
    assert [step for step, _ in curves["event/removed"]] == events and len(events) > 1
    assert [step for step, _ in curves["test/loss"]] == [r["step"] for r in history if r["kind"] == "epoch"]
    assert curves["size/params"][0][0] == 0


class Failing:
    def log(self, step, scalars):
        raise ConnectionError("no route")

    def close(self):
        raise AssertionError("was left alone")


def test_a_logger_that_fails_does_not_end_the_run(flatprune, npz, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda *_: Failing())
    outcome = flatprune(*RUN, "--data", npz(), "--logger", "tensorboard", "--out", tmp_path / "out")
    assert outcome.code == 0 and (tmp_path / "out/summary.json").exists()
    warning = "flatprune: warning: --logger tensorboard: ConnectionError('no route'); no more is logged"
    assert outcome.err.splitlines().count(warning) == 1 and outcome.err.count("--logger") == 1


def test_a_logger_that_cannot_be_had_is_said_at_once(flatprune, npz, tmp_path, monkeypatch):
    out = tmp_path / "out"
    outcome = flatprune(*RUN, "--data", npz(), "--logger", "wand", "--out", out)
    assert (outcome.code, outcome.err) == (2, "flatprune: logger is 'wand', did you mean wandb?\n")
    assert not out.exists()

    def refuse(*_):
        raise PermissionError("no key")

    pytest.importorskip("tensorboard")
    monkeypatch.setitem(LOGGERS, "tensorboard", refuse)
    outcome = flatprune(*RUN, "--data", npz(), "--logger", "tensorboard", "--out", out)
    assert (outcome.code, outcome.err) == (2, "flatprune: --logger tensorboard: no key\n")
