"""The search: which trials end early, which win, what is kept when it is stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from rich.console import Console

from flatprune.cli import app
from flatprune.errors import InputError, Interrupted
from flatprune.execution import DIVERGED, FAILED, Ended
from flatprune.execution.task import FINISHED
from flatprune.files.finished import HISTORY, HISTORY_FILE, finish
from flatprune.files.records import write_json_lines
from flatprune.runs.folder import read_settings
from flatprune.settings import Settings
from flatprune.tuning import EARLY, read_tuning, tune

SEARCH = """
title: Rates
base: {data: digits, epochs: 5, target_params: 0.5, widths: [8, 8], flatness: off, train_size: 200, seed: 3}
space: {lr: {low: 0.01, high: 1, log: true}, criterion: [obs, l1]}
"""


class Made:
    """Stands for runs: accuracies that rise with the epochs, up to 10 lr + 80 for l1; the files are those of a run."""

    look_seconds = 0.0

    def __init__(self, answers=None):
        self.answers, self.seen = answers or {}, []

    def default_jobs(self, on_gpus):
        return 1

    def submit(self, task, place):
        folder = Path(task.folder)
        settings = Settings.from_dict(read_settings(folder))
        self.seen.append((int(folder.name), settings))
        answer = self.answers.get(int(folder.name), finished)(folder, settings)
        return SimpleNamespace(done=lambda: True, result=lambda: answer, cancel=lambda: None)

    def close(self, *, kill=False):
        pass


def finished(folder, settings, **changes):
    best = 10.0 * settings.lr + 80.0 * (settings.criterion == "l1")
    epochs = range(1, settings.epochs + 1)
    records = [{"kind": "epoch", "epoch": i, "test_accuracy": best * i / settings.epochs} for i in epochs]
    write_json_lines(folder / HISTORY_FILE, records, HISTORY)
    summary = {"params_before": 10, "params_after": 5, "test_accuracy_last": best, "pruning_stopped": None}
    finish(folder, {**summary, **changes}, [HISTORY_FILE])
    return Ended(FINISHED)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Searches in a folder, with stand-ins for the runs."""
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)

    def call(runs=None, folder="out", text=SEARCH, **options):
        path.write_text(text)
        monkeypatch.setattr("flatprune.tuning.search.make_executor", lambda *given: runs or Made())
        return tune(read_tuning(path), tmp_path / folder, console=Console(quiet=True), **options)

    return call


def drawn(search):
    return [trial.params for trial in search.trials]


def rows(search):
    return list(csv.DictReader((search.folder / "trials.csv").open()))


def test_the_best_held_out_accuracy_wins(search):
    runs = Made()
    found = search(runs, trials=7, early="never")
    assert [settings.validation for _, settings in runs.seen] == [0.2] * 7
    values = {trial.number: trial.value for trial in found.trials}
    best = max(values, key=values.get)
    assert found.ranked[0].number == best and found.best.validation is None
    assert found.best == dict(runs.seen)[best].changed(validation=None, threads=None)
    assert float(rows(found)[best]["held_out_accuracy"]) == pytest.approx(values[best])
    assert found.table().rows[0][0] == str(best) and "7 trials" in found.table().title


def test_trials_below_the_median_end_early(search):
    found = search(trials=9)
    states = [row["state"] for row in rows(found)]
    assert states[:5] == [""] * 5 and "ended early" in states
    for row in rows(found):
        assert (row["held_out_accuracy"] == "") == (row["state"] == "ended early")
        assert int(row["epochs"]) < 5 or row["state"] == ""
    assert all(not row["state"] for row in rows(found) if int(row["trial"]) == found.ranked[0].number)


def test_what_diverged_or_is_too_large_does_not_win(search):
    too_large = lambda folder, settings: finished(  # noqa: E731
        folder, settings, test_accuracy_last=100.0, pruning_stopped="the accuracy fell"
    )
    found = search(Made({0: too_large, 1: lambda *given: Ended(DIVERGED, "the loss became nan")}), trials=3)
    assert [row["state"] for row in rows(found)] == ["too large", "diverged", ""]
    assert rows(found)[1]["note"] == "the loss became nan" and [trial.number for trial in found.ranked] == [2]


def test_what_failed_is_tried_again(search):
    found = search(Made({1: lambda *given: Ended(FAILED, "killed")}), trials=3)
    assert found.failed == {1: "killed"} and [row["state"] for row in rows(found)] == ["", "unfinished", ""]
    runs = Made()
    again = search(runs, trials=3)
    assert [number for number, _ in runs.seen] == [1] and drawn(again) == drawn(found)
    assert len(again.ended) == 3 and not again.failed


def test_a_search_goes_on_where_it_was_stopped(search):
    def stop(folder, settings):
        signal.raise_signal(signal.SIGTERM)
        return Ended("stopped")

    with pytest.raises(Interrupted, match="stopped with 2 of 4 trials; the same command goes on"):
        search(Made({2: stop}), trials=4)
    runs = Made()
    found = search(runs, trials=4)
    assert [number for number, _ in runs.seen] == [2, 3]
    assert len({trial.params["lr"] for trial in found.trials}) == 4  # no draw is repeated
    assert search(trials=2).trials == found.trials  # there are more already


def test_a_search_is_the_same_every_time(search):
    assert drawn(search(trials=4)) == drawn(search(folder="again", trials=4))


def test_settings_that_do_not_go_together_are_refused(search):
    text = SEARCH.replace("criterion: [obs, l1]", "selection: [auto, greedy], criterion: [l1]")
    found = search(text=text, trials=5)
    for row in rows(found):
        assert (row["state"] == "refused") == (row["selection"] == "greedy")
    assert {row["state"] for row in rows(found)} == {"", "refused"}


def test_another_search_in_the_folder_is_refused(search, tmp_path):
    search(trials=1)
    for old, new in (("epochs: 5", "epochs: 6"), ("low: 0.01", "low: 0.02")):
        with pytest.raises(InputError, match="out: holds trials of another base or space"):
            search(text=SEARCH.replace(old, new), trials=2)
    (tmp_path / "out" / "trials.db").write_text("no data base")
    with pytest.raises(InputError, match=r"trials.db: cannot be used"):
        search(trials=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trials", 0), "trials is 0, expected 1 or more"),
        (("--jobs", 0), "jobs is 0"),
        (("--timeout", 0), "minutes is 0"),
        (("--early", "mean"), "early is 'mean'"),
        (("--executor", "dusk"), "did you mean dask"),
        (("--executor-option", "x"), "expected KEY=VALUE"),
        (("--executor-option", "cpus=2"), "it has none"),
    ],
)
def test_options_that_cannot_be_used(flatprune, tmp_path, options, words):
    path = tmp_path / "search.yaml"
    path.write_text(SEARCH)
    outcome = flatprune("tune", path, "--out", tmp_path / "out", *options)
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_optuna_is_named_where_it_is_missing(flatprune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    (tmp_path / "search.yaml").write_text(SEARCH)
    outcome = flatprune("tune", tmp_path / "search.yaml", "--out", tmp_path / "out")
    assert outcome.code == 2 and "pip install 'kfac-ext[tune]'" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.thorough
def test_killed_and_continued(flatprune, tmp_path):
    """A search by processes of their own, whose result is a file that `flatprune run` takes."""
    path, out = tmp_path / "search.yaml", tmp_path / "out"
    path.write_text(SEARCH.replace("epochs: 5", "epochs: 40, test_every: 8"))
    line = ("tune", str(path), "--out", str(out), "--trials", "3")
    process = subprocess.Popen([sys.executable, "-m", "flatprune", *line], start_new_session=True)
    while not (out / "trials/0001/checkpoint.pt").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = flatprune(*line)
    assert outcome.code == 0, outcome.err
    assert "3 trials, 1 done already" in outcome.out and "trial 1: lr" in outcome.out
    summaries = [json.loads(file.read_text()) for file in sorted(out.glob("trials/*/summary.json"))]
    best = max(summaries, key=lambda summary: summary["test_accuracy_last"])["settings"]
    printed = flatprune("run", "--config", out / "best.yaml", "--print-config").out
    assert f"\nlr: {best['lr']}\n" in printed and f"criterion: {best['criterion']}\n" in printed
    assert "validation: null\n" in printed


def test_completion_knows_how_trials_end(flatprune):
    (option,) = (one for one in typer.main.get_command(app).commands["tune"].params if one.name == "early")
    assert tuple(item.value for item in option.shell_complete(None, "")) == EARLY
