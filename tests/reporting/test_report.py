from __future__ import annotations

import itertools
from io import StringIO

import pytest
from rich.console import Console

from flatprune import runs
from flatprune.files.finished import read_history
from flatprune.reporting import progress
from flatprune.reporting.drawing import spread
from flatprune.settings import Settings
from tests.conftest import thorough


def test_labels_are_moved_apart():
    places = spread([0.5, 0.5, 0.52], [0.05, 0.05, 0.05])
    assert all(b - a >= 0.1 - 1e-3 for a, b in itertools.pairwise(places))
    assert sum(places) / 3 == pytest.approx(0.507, abs=0.01)
    assert spread([0.1, 0.9], [0.05, 0.05]) == [0.1, 0.9]
    assert max(spread([1.0, 1.0, 1.0], [0.05] * 3)) <= 1.0 + 1e-6


def test_sparkline():
    assert progress.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert progress.sparkline([5, 10], floor=0.0) == "▅█"
    assert progress.sparkline([]) == ""
    assert len(progress.sparkline(list(range(1000)))) <= 48


def test_durations():
    assert [progress.duration(s) for s in (0.2, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


def test_live_display_shows_every_figure(npz, tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=110)
    settings = Settings(data=str(npz()), epochs=3, batch_size=32, target_params=0.5)
    summary = runs.run(settings, tmp_path / "out", observer=lambda title: progress.observer(console, title))
    progress.print_summary(console, summary, "out")
    text = console.file.getvalue()
    for word in ("epoch 3/3", "loss", "accuracy", "parameters", "radius", "left", f"{summary['params_after']:,}"):
        assert word in text
    assert f"{summary['test_accuracy_last']:.2f} %" in text


@pytest.mark.parametrize("terminal", thorough([True, False], but=[True]))
def test_epochs_that_are_not_tested(npz, tmp_path, terminal):
    values = {"data": str(npz()), "batch_size": 32, "target_params": 0.5, "epochs": 5}
    everything = runs.run(Settings(**values), tmp_path / "all")
    console = Console(file=StringIO(), force_terminal=terminal, width=160)
    settings = Settings(**values, test_every=2, compare_dense=True)
    some = runs.run(settings, tmp_path / "some", observer=lambda title: progress.observer(console, title))
    tested = [
        r.get("test_accuracy") is not None
        for r in read_history(tmp_path / "some" / "history.jsonl")
        if r["kind"] == "epoch"
    ]
    assert tested == [False, True, False, True, True]
    assert some["test_accuracy_last"] == everything["test_accuracy_last"]
    assert f"{some['test_accuracy_last']:.2f} %" in console.file.getvalue()
    assert ("test not done" in console.file.getvalue()) != terminal
    last_only = runs.run(settings.changed(test_every=9), tmp_path / "last")
    assert last_only["test_accuracy_best"] == last_only["test_accuracy_last"] == some["test_accuracy_last"]


def test_learning_rate():
    flat, cosine = Settings(), Settings(schedule="cosine")
    assert [flat.learning_rate(step, 100, 0.1) for step in (0, 39, 40)] == [0.1, 0.1, 0.1]
    assert flat.learning_rate(70, 100, 0.1) == pytest.approx(0.05)
    assert 0 < flat.learning_rate(99, 100, 0.1) < 1e-4
    assert cosine.learning_rate(50, 100, 0.1) == pytest.approx(0.05)
    rates = [flat.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates == sorted(rates, reverse=True)


def test_settings_survive_the_checkpoint():
    settings = Settings(widths=(30, 20), exclude=("fc",), flatness="off", lr=0.3)
    assert Settings.from_dict(settings.as_dict()) == settings
