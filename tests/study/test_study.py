"""Studies from the command line: killed and continued, refused, diverged, and what they report."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import time

import pytest

from flatprune.errors import InputError
from flatprune.files.lock import HOLDER_FILE, locked
from flatprune.runs import TIMES
from tests.study.study_command import call, command


def summaries(out):
    return {path.parent.name: path for path in out.glob("runs/*/summary.json")}


def wait_for(condition, process):
    deadline = time.monotonic() + 600  # only what hangs; a busy machine takes minutes
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def started(path, out):
    return subprocess.Popen(command(path, "--out", out, "--jobs", 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study with a source, its architecture from scratch, a tuned variant and one that diverges."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "small.yaml"
    path.write_text(
        """
title: Small & quick
base: {data: digits, model: mlp, epochs: 1, widths: [8, 8], flatness: off}
grid: {target_params: [0.5], seed: [1, 2]}
tune: {validation: 0.5, seed: [1]}
reference: method
variants:
  method: {}
  same: {}
  other: {lr: 0.3}
  scratch: {scratch_of: method}
  wild: {lr: 1e30}
  tuned: {target_params: 1, tune: {lr: [1e-6, 0.2]}}
"""
    )
    outcome = call(path, "--out", folder / "out", "--jobs", 2)
    assert outcome.returncode == 0, outcome.stderr
    return path, folder / "out", outcome.stdout


def rows(out, name):
    return list(csv.DictReader((out / name).open()))


def test_equal_cells_share_a_run(finished):
    runs = {(row["variant"], row["seed"]): row for row in rows(finished[1], "runs.csv")}
    assert runs["method", "1"]["folder"] == runs["same", "1"]["folder"] != runs["method", "2"]["folder"]


def test_means_and_deviations_are_those_of_the_runs(finished):
    runs = [float(row["test_accuracy_last"]) for row in rows(finished[1], "runs.csv") if row["variant"] == "method"]
    (group,) = (row for row in rows(finished[1], "table.csv") if row["variant"] == "method")
    assert float(group["test_accuracy_last_mean"]) == pytest.approx(sum(runs) / 2)
    assert float(group["test_accuracy_last_sd"]) == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
    assert group["test_accuracy_last_n"] == "2"


def test_differences_are_paired_by_seed(finished):
    _, out, text = finished
    runs = {(row["variant"], row["seed"]): float(row["test_accuracy_last"]) for row in rows(out, "runs.csv")}
    gains = [runs["other", seed] - runs["method", seed] for seed in "12"]
    cell = f"{sum(gains) / 2:+.2f} ± {abs(gains[0] - gains[1]) / 2:.2f} (2)"
    title = "test accuracy, %, less that of 'method' by seed, mean ± standard error (n)"
    table = (out / "table.md").read_text().split(f"{title}**")[1].split("**")[0]
    assert f"| other | {cell} |" in table and "| same | +0.00 ± 0.00 (2) |" in table and "| method |" not in table
    assert cell in text and cell in (out / "report.html").read_text()


def test_from_scratch_has_the_widths_of_its_source(finished):
    runs = {(row["variant"], row["seed"]): row for row in rows(finished[1], "runs.csv")}
    source, scratch = runs["method", "2"], runs["scratch", "2"]
    assert scratch["params_after"] == source["params_after"] and scratch["params_left"] == "100.0"
    assert scratch["test_nll"] != source["test_nll"]


def test_tuning_takes_the_better_candidate(finished):
    (group,) = (row for row in rows(finished[1], "table.csv") if row["variant"] == "tuned")
    assert group["chosen"] == "lr 0.2"


def test_a_diverged_run_is_recorded_and_stops_no_other(finished):
    _, out, text = finished
    (group,) = (row for row in rows(out, "table.csv") if row["variant"] == "wild")
    assert group["state"] == "diverged 2 of 2"
    assert "diverged 2 of 2" in text and "diverged: the loss became" in text
    assert "the loss became" in (out / "report.html").read_text()


def test_the_report_stands_alone(finished):
    page = (finished[1] / "report.html").read_text()
    assert "Small &amp; quick" in page and 'src="data:image/png;base64,' in page and "http" not in page
    assert (finished[1] / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_once_more_runs_nothing(finished, study):
    path, out, _ = finished
    before = {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*")}
    outcome = study(path, "--out", out)
    assert outcome.returncode == 0 and "12 done already" in outcome.stdout
    assert {file: file.stat().st_mtime_ns for file in out.glob("runs/*/*")} == before


def test_report_only(finished, study):
    out = finished[1]
    table = (out / "table.md").read_text()
    for name in ("table.md", "report.html"):
        (out / name).unlink()
    assert study("--report-only", out).returncode == 0
    assert (out / "table.md").read_text() == table and (out / "report.html").is_file()
    assert "no study was begun" in study("--report-only", out.parent).stderr


@pytest.mark.thorough
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued(study_file, study, tmp_path, how):
    path = study_file(
        """
base: {data: digits, model: mlp, epochs: 60, target_params: 0.5, widths: [8, 8], flatness: off}
variants: {short: {epochs: 1}, long: {}}
"""
    )
    out = tmp_path / "out"
    process = started(path, out)
    wait_for(lambda: len(summaries(out)) == 1, process)
    running = lambda: [p for p in out.glob("runs/*/checkpoint.pt") if p.parent.name not in summaries(out)]  # noqa: E731
    wait_for(running, process)
    process.send_signal(how)
    text = process.communicate()[0].decode()
    assert process.returncode == (130 if how == signal.SIGINT else -how), text
    if how == signal.SIGINT:
        assert "the same command goes on" in text
        assert running()
    times = {key: file.stat().st_mtime_ns for key, file in summaries(out).items()}
    outcome = study(path, "--out", out, "--jobs", 1)
    assert outcome.returncode == 0, outcome.stderr
    assert len(summaries(out)) == 2
    assert all(summaries(out)[key].stat().st_mtime_ns == before for key, before in times.items())
    for file in out.glob("runs/*/history.jsonl"):
        epochs = [r["epoch"] for r in map(json.loads, file.read_text().splitlines()) if r["kind"] == "epoch"]
        assert epochs in ([1], list(range(1, 61)))  # nothing lost and nothing twice


def test_two_studies_in_one_folder_refuse_each_other(study_file, study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        outcome = study(study_file(), "--out", out)
        assert outcome.returncode == 2 and f"in use by process {os.getpid()} on " in outcome.stderr
        with pytest.raises(InputError, match="in use"), locked(out):
            pass
    assert not (out / "runs").exists()
    (out / HOLDER_FILE).write_text("process 1 on here\n")  # left behind; process 1 lives, but does not hold it
    with locked(out):
        assert (out / HOLDER_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert not (out / HOLDER_FILE).exists()


def test_an_impossible_entry_is_named_before_the_first_run(study_file, study, tmp_path):
    text = "base: {widths: [8, 8]}\ngrid: {target_params: [0.5, 0.01]}"
    outcome = study(study_file(text), "--out", tmp_path / "out")
    assert outcome.returncode == 2 and not (tmp_path / "out").exists()
    assert "target_params 0.01, seed 0: target_params is 0.01" in outcome.stderr and outcome.stderr.count("\n") == 1
    outcome = study(study_file("variants: {a: {}, b: {data: none.npz}}"), "--out", tmp_path / "out")
    assert outcome.returncode == 2 and "none.npz" in outcome.stderr


@pytest.mark.thorough
def test_a_full_disk_stops_the_study(study_file, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # noqa: E731
    outcome = call(study_file(), "--out", tmp_path / "out", "--jobs", 1, preexec_fn=limit)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1, outcome.stderr
    assert "checkpoint.pt: cannot be saved" in outcome.stderr and "the study is stopped" in outcome.stderr
    assert not summaries(tmp_path / "out")


@pytest.mark.thorough
def test_runs_of_one_process_are_those_of_many(finished, study_file, tmp_path):
    """What a process did before does not matter: with the order turned round, every figure is the same."""
    path, out, _ = finished
    text = path.read_text().replace("{target_params: [0.5], seed: [1, 2]}", "{target_params: [0.5], seed: [2, 1]}")
    outcome = call(study_file(text), "--out", tmp_path / "again", "--jobs", 1)
    assert outcome.returncode == 0, outcome.stderr

    def figures(file):
        own = (*TIMES, "settings")
        return {k: v for k, v in json.loads(file.read_text()).items() if k not in own}

    before, again = summaries(out), summaries(tmp_path / "again")
    assert len(again) == len(before) == 10
    for key in before.keys() & again.keys():
        assert figures(again[key]) == figures(before[key])
    assert len(before.keys() & again.keys()) >= 8  # but for those from scratch, whose settings name a folder
